"""/healthz, /readyz and /metrics answer whatever else is down."""

import dataclasses
import socket
from threading import Event
from time import monotonic

import pytest
from django.conf import settings as django_settings
from django.db import DatabaseError
from django.test import Client

from controlplane import health
from controlplane.health import Readiness


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_alive_needs_nothing() -> None:
    answer = Client().get("/healthz", headers={"host": "10.0.0.7"})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.django_db(transaction=True)
def test_ready_with_postgres_and_redis(redis_url: str) -> None:
    answer = Client().get("/readyz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ready"})


@pytest.mark.django_db(transaction=True)
def test_redis_away_is_503_and_names_it(settings) -> None:
    away = f"redis://127.0.0.1:{free_port()}/0"
    settings.ENV = dataclasses.replace(django_settings.ENV, redis_url=away)
    answer = Client().get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"status": "unavailable", "failing": {"redis": "ConnectionError"}}
    assert answer["Retry-After"] == "2"


def test_postgres_away_is_named_and_comes_back() -> None:
    answers = iter([DatabaseError("secret host name"), None])

    def check() -> None:
        answer = next(answers)
        if answer:
            raise answer

    readiness = Readiness({"postgres": check})
    assert readiness.failing() == {"postgres": "DatabaseError"}
    assert readiness.failing() == {}


def test_a_hanging_check_is_a_timeout_and_runs_once_however_often_asked(monkeypatch) -> None:
    monkeypatch.setattr(health, "READY_WITHIN_S", 0.05)
    release, n_started = Event(), 0

    def hang() -> None:
        nonlocal n_started
        n_started += 1
        release.wait(30)

    readiness = Readiness({"postgres": hang, "redis": lambda: None})
    try:
        for _ in range(3):
            assert readiness.failing() == {"postgres": "timeout"}
        assert n_started == 1
    finally:
        release.set()
    deadline = monotonic() + 10
    while readiness.failing() and monotonic() < deadline:
        pass
    assert readiness.failing() == {}


def test_metrics_are_in_the_format_of_prometheus() -> None:
    answer = Client().get("/metrics")
    assert answer["Content-Type"].startswith("text/plain")
    assert b"corral_web_request_seconds" in answer.content
