"""Enrolment over HTTP: once per proof, with a Redis user that reaches its own keys only."""

import hashlib
import json
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from django.test import Client
from django.utils import timezone

from autoscaler import reconcile
from autoscaler.models import Machine, MachineState
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


NONCE = "n" * 43


def test_whoever_lost_the_answer_is_answered_the_same_again_and_nobody_else_is(
    launched: tuple[Scaling, str, str],
) -> None:
    scaling, machine_id, proof = launched
    asked = {"machine_id": machine_id, "proof": proof, "nonce": NONCE, "capabilities": {"box_public": "b"}}
    first = _post(asked)
    scaling.house.cell.redis.acl_deluser(
        f"m-{machine_id}"
    )  # lost with the answer: the process died before it
    again = _post(asked)
    assert (first.status_code, again.status_code) == (200, 200)
    assert again.json() == first.json()
    with redis.Redis.from_url(again.json()["redis_url"]) as client:
        assert client.ping()
    others: tuple[dict[str, Any], ...] = (
        {"nonce": "m" * 43},  # another process that has the proof
        {"nonce": ""},
        {"capabilities": {"box_public": "c"}},
        {"machine_id": "f" * 32},
        {"proof": "x" + proof[1:]},
    )
    for other in others:
        assert _post({**asked, **other}).status_code in (403, 409), other
    with redis.Redis.from_url(first.json()["redis_url"]) as client:
        assert client.ping()


@pytest.mark.parametrize("later", ["five minutes", "renewed", "ready", "gone"])
def test_the_same_question_is_answered_for_a_short_while_only(
    launched: tuple[Scaling, str, str], later: str
) -> None:
    _, machine_id, proof = launched
    asked = {"machine_id": machine_id, "proof": proof, "nonce": NONCE}
    assert _post(asked).status_code == 200
    changes: dict[str, Any] = {
        "five minutes": {"enroll_used_at": timezone.now() - timedelta(minutes=5)},
        "renewed": {"redis_password_digest": "0" * 64},
        "ready": {"state": MachineState.READY},
        "gone": {"state": MachineState.GONE, "gone_at": timezone.now()},
    }[later]
    Machine.objects.update(**changes)
    assert _post(asked).status_code == 409


def test_the_password_is_not_what_the_nonce_alone_gives(
    launched: tuple[Scaling, str, str], settings: Any
) -> None:
    from autoscaler.services import _password

    made = _password(UUID(int=1), NONCE)
    assert (len(made), made == _password(UUID(int=1), NONCE)) == (43, True)
    others = {_password(UUID(int=2), NONCE), _password(UUID(int=1), "m" * 43), _password(UUID(int=1), "")}
    settings.SECRET_KEY = "another secret of the house"
    assert made not in others | {_password(UUID(int=1), NONCE)}


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
        ({"machine_id": "f" * 32, "proof": "x", "nonce": 3}, "nonce"),
        ({"machine_id": "f" * 32, "proof": "x", "nonce": "short"}, "nonce"),
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
