"""Enrolment by signed instance identity: the machine that was launched, once; nobody else, and nothing replayed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from django.test import Client

from autoscaler.identity import Expected
from autoscaler.models import Machine, MachineState
from controlplane.api import internal
from tests.autoscaler.conftest import Scaling
from tests.cloud.imds import certificate, signed

REGION, IMAGE = "us-east-1", "ami-1"


@pytest.fixture
def launched(scaling: Scaling, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that waits to enrol, in a pool whose provider signs."""
    pem = tmp_path / "certificate.pem"
    pem.write_bytes(certificate())
    monkeypatch.setattr(internal, "build_cell", lambda: scaling.house.cell)
    monkeypatch.setattr(internal, "expected_identity", lambda: Expected(pem, REGION, IMAGE))
    monkeypatch.setattr(internal, "limit", internal.RateLimit(1000, 1000))
    scaling.queue("a")
    scaling.tick()
    return scaling.machine()


def _document(machine: Machine, **changes: str) -> dict[str, str]:
    return {
        "instanceId": machine.provider_ref,
        "region": REGION,
        "imageId": IMAGE,
        "accountId": "1",
    } | changes


def _enrol(machine: Machine, identity: Any, **more: Any) -> Any:
    body = {"machine_id": machine.id.hex, "identity": identity, "capabilities": {}, **more}
    return Client().post("/internal/enrol", data=json.dumps(body), content_type="application/json")


def test_the_machine_that_was_launched_enrols_once(launched: Machine) -> None:
    identity = signed(_document(launched))
    answer = _enrol(launched, identity)
    assert answer.status_code == 200
    assert answer.json()["machine_id"] == launched.id.hex
    replayed = _enrol(launched, identity)
    assert (replayed.status_code, replayed.json()["error"]["code"]) == (409, "conflict")


def test_another_machines_document_is_refused(launched: Machine) -> None:
    answer = _enrol(launched, signed(_document(launched, instanceId="i-another")))
    assert answer.status_code == 403
    assert Machine.objects.get().state == MachineState.PENDING


@pytest.mark.parametrize(
    "changes", [{"region": "eu-central-1"}, {"imageId": "ami-2"}], ids=["region", "image"]
)
def test_a_document_of_another_pool_is_refused(launched: Machine, changes: dict[str, str]) -> None:
    assert _enrol(launched, signed(_document(launched, **changes))).status_code == 403


def test_a_document_that_aws_did_not_sign_is_refused(launched: Machine) -> None:
    ours = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    assert _enrol(launched, signed(_document(launched), ours)).status_code == 403
    good = signed(_document(launched, instanceId="i-another"))
    changed = {**good, "document": good["document"].replace("i-another", launched.provider_ref)}
    assert _enrol(launched, changed).status_code == 403
    assert Machine.objects.get().state == MachineState.PENDING


@pytest.mark.parametrize(
    "identity",
    [
        {},
        {"document": "{}"},
        {"document": "x" * 10_000, "signature": "eA=="},
        {"document": 3, "signature": 4},
        "text",
        [1],
    ],
)
def test_what_is_no_identity_is_a_bad_request(launched: Machine, identity: Any) -> None:
    assert _enrol(launched, identity).status_code == 400


@pytest.mark.parametrize("signature", ["!!!", "AAAA"])
def test_what_is_no_signature_is_refused(launched: Machine, signature: str) -> None:
    identity = {**signed(_document(launched)), "signature": signature}
    assert _enrol(launched, identity).status_code == 403


def test_a_proof_is_worth_nothing_where_machines_are_signed_for(launched: Machine, scaling: Scaling) -> None:
    proof = scaling.provider.proofs[launched.id.hex]
    assert _enrol(launched, None, proof=proof).status_code == 403


def test_a_machine_faster_than_its_launch_is_written_down_asks_again(launched: Machine) -> None:
    identity = signed(_document(launched))
    Machine.objects.update(provider_ref="")
    answer = _enrol(launched, identity)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    Machine.objects.update(provider_ref=launched.provider_ref)
    assert _enrol(launched, identity).status_code == 200
