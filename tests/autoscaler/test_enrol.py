"""Enrolment over HTTP: once per proof, with a Redis user that reaches its own keys only."""

import hashlib
import json
from typing import Any

import pytest
import redis
from django.test import Client

from autoscaler import reconcile
from autoscaler.models import MachineState
from controlplane.api import internal
from tests.autoscaler.conftest import Scaling


@pytest.fixture
def launched(scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> tuple[Scaling, str, str]:
    """(scaling, machine id, proof) of a machine that waits to enrol."""
    from django.conf import settings

    monkeypatch.setattr(internal, "build_cell", lambda: scaling.house.cell)
    monkeypatch.setattr(internal, "limit", internal.RateLimit(1000, 1000))
    assert settings.ENV.redis_url.startswith("redis://corral:")
    scaling.queue("a")
    scaling.tick()
    machine_id = scaling.machine().id.hex
    return scaling, machine_id, scaling.provider.proofs[machine_id]


def _post(body: Any) -> Any:
    data = body if isinstance(body, str) else json.dumps(body)
    return Client().post("/internal/enrol", data=data, content_type="application/json")


def test_a_proof_gives_credentials_that_work_for_the_machines_keys_only(
    launched: tuple[Scaling, str, str],
) -> None:
    scaling, machine_id, proof = launched
    answer = _post({"machine_id": machine_id, "proof": proof, "capabilities": {"n_cpus": 2}})
    assert answer.status_code == 200
    assert answer.headers["Cache-Control"] == "no-store"
    body = answer.json()
    assert (body["machine_id"], body["cell"]) == (machine_id, "c0")
    machine = scaling.machine()
    assert (machine.state, machine.capabilities) == (MachineState.ENROLLED, {"n_cpus": 2})
    keys = scaling.house.cell.keys.machine(machine_id)
    with redis.Redis.from_url(body["redis_url"]) as client:
        client.set(keys.heartbeat(), b"beat")
        client.publish(keys.event_channel, b"hello")
        for forbidden in (
            lambda: client.get("c0:req:1"),
            lambda: client.set("c0:m:other:hb", b"x"),
            lambda: client.publish("c0:wake", b"x"),
            lambda: client.config_get("*"),
            lambda: client.keys("*"),
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                forbidden()


def test_a_used_proof_is_refused_and_the_first_user_stays(launched: tuple[Scaling, str, str]) -> None:
    _, machine_id, proof = launched
    first = _post({"machine_id": machine_id, "proof": proof}).json()
    again = _post({"machine_id": machine_id, "proof": proof})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "conflict")
    assert "launch the machine again" in again.json()["error"]["message"]
    with redis.Redis.from_url(first["redis_url"]) as client:
        assert client.ping()


def test_wrong_proof_and_unknown_machine_look_alike(launched: tuple[Scaling, str, str]) -> None:
    scaling, machine_id, proof = launched
    wrong = _post({"machine_id": machine_id, "proof": proof + "x"})
    unknown = _post({"machine_id": "f" * 32, "proof": proof})
    assert (wrong.status_code, unknown.status_code) == (403, 403)
    assert wrong.json() == unknown.json()
    assert scaling.machine().state == MachineState.PENDING


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ("{", None),
        ([], None),
        ({"proof": "x"}, "machine_id"),
        ({"machine_id": "../..", "proof": "x"}, "machine_id"),
        ({"machine_id": "f" * 32}, "proof"),
        ({"machine_id": "f" * 32, "proof": ""}, "proof"),
        ({"machine_id": "f" * 32, "proof": "x" * 1000}, "proof"),
        ({"machine_id": "f" * 32, "proof": "x", "capabilities": [1]}, "capabilities"),
        ({"machine_id": "f" * 32, "proof": "x", "capabilities": {"a": "b" * 9000}}, "capabilities"),
    ],
)
def test_bad_input_is_named(launched: tuple[Scaling, str, str], body: Any, field: str | None) -> None:
    answer = _post(body)
    assert (answer.status_code, answer.json()["error"]["field"]) == (400, field)


def test_oversized_wrong_method_and_too_many(
    launched: tuple[Scaling, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _post("x" * 20_000).status_code == 413
    assert Client().get("/internal/enrol").status_code == 405
    monkeypatch.setattr(internal, "limit", internal.RateLimit(0.0, 2))
    assert [_post({}).status_code for _ in range(3)] == [400, 400, 429]


def test_redis_away_spends_nothing(
    launched: tuple[Scaling, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler.cell import Cell

    scaling, machine_id, proof = launched
    dead = Cell("redis://127.0.0.1:1/0", scaling.house.cell.keys)
    monkeypatch.setattr(internal, "build_cell", lambda: dead)
    answer = _post({"machine_id": machine_id, "proof": proof})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "2")
    monkeypatch.setattr(internal, "build_cell", lambda: scaling.house.cell)
    assert _post({"machine_id": machine_id, "proof": proof}).status_code == 200


def test_neither_proof_nor_password_is_stored_or_logged(
    launched: tuple[Scaling, str, str], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    scaling, machine_id, proof = launched
    url = _post({"machine_id": machine_id, "proof": proof}).json()["redis_url"]
    password = redis.connection.parse_url(url)["password"]
    machine = scaling.machine()
    assert bytes(machine.enroll_proof_digest) == hashlib.sha256(proof.encode()).digest()
    assert machine.redis_password_digest == hashlib.sha256(password.encode()).hexdigest()
    said = "".join(capfd.readouterr()) + caplog.text
    assert "machine.enrolled" in said
    assert proof not in said
    assert password not in said


def test_a_lost_redis_user_is_made_again_with_the_same_password(launched: tuple[Scaling, str, str]) -> None:
    scaling, machine_id, proof = launched
    url = _post({"machine_id": machine_id, "proof": proof}).json()["redis_url"]
    scaling.house.cell.redis.acl_deluser(f"m-{machine_id}")
    assert not scaling.house.cell.has_user(machine_id)
    assert reconcile.restore(scaling.house) >= 1
    with redis.Redis.from_url(url) as client:
        assert client.ping()
