"""Enrolment: a machine proves that it is the one we launched, once, and is given a Redis user of its own.

Called by controlplane/api/internal.py in the web process. The user reaches the machine's own keys only
(workers/keys.py); its password is made here and stored as a digest. Whoever spent the proof may ask again for a short
while, by the nonce that they made it with, since answers get lost. Neither proof, nonce nor password is ever logged.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final
from urllib.parse import quote, urlsplit, urlunsplit
from uuid import UUID

import redis
import structlog
from django.conf import settings
from django.utils import timezone
from django.utils.crypto import salted_hmac

from autoscaler.cell import Cell
from autoscaler.identity import Expected, verify
from autoscaler.launch import proof_digest
from autoscaler.models import Machine, MachineState
from controlplane.errors import ConflictError, CorralError, InvalidInputError, NotPermittedError

log = structlog.get_logger("corral.autoscaler")

MAX_CAPABILITIES_BYTES = 8192
MAX_PROOF_CHARS = 256
NONCE_CHARS = (32, 128)  # a machine makes 43, of 256 bits
# A lost answer is asked for again after 30 s (workers/agent/enrol.py), or by an agent that was started again.
AGAIN_FOR: Final = timedelta(minutes=5)


class CellUnavailableError(CorralError):
    """Redis is away: ask again, with the same proof."""

    status = 503
    code = "cell_unavailable"


@dataclass(frozen=True, slots=True)
class Enrolled:
    """What a machine is told. `redis_url` holds its password."""

    machine_id: str
    cell: str
    redis_url: str


def enrol(
    *,
    machine_id: str,
    proof: str,
    capabilities: Mapping[str, object],
    cell: Cell,
    identity: Mapping[str, object] | None = None,
    expected: Expected | None = None,
    nonce: str = "",
) -> Enrolled:
    """Spend the proof, make the machine's user.

    The same machine with the same nonce (and the same key for sealed boxes) is answered the same again for
    `AGAIN_FOR`; with the proof alone nobody is.

    Where the provider signs who its machines are, `identity` stands for the proof and is held against `expected`.
    Raises InvalidInputError, NotPermittedError (unknown machine or wrong proof, told alike), ConflictError (the
    proof was used, or the machine is gone) and CellUnavailableError (nothing was spent; also while the launch of this
    machine is still being written down).
    """
    mid = _machine_id(machine_id)
    document = None
    if identity is not None:
        if expected is None:
            raise NotPermittedError("this pool's machines do not enrol by identity", field="identity")
        document = verify(identity, expected)
    elif not 1 <= len(proof) <= MAX_PROOF_CHARS:
        raise InvalidInputError("proof: give the proof of the launch command", field="proof")
    if len(json.dumps(capabilities)) > MAX_CAPABILITIES_BYTES:
        raise InvalidInputError(
            f"capabilities: at most {MAX_CAPABILITIES_BYTES} bytes of JSON", field="capabilities"
        )
    if nonce and not NONCE_CHARS[0] <= len(nonce) <= NONCE_CHARS[1]:
        raise InvalidInputError(
            f"nonce: give {NONCE_CHARS[0]} to {NONCE_CHARS[1]} random characters, or none", field="nonce"
        )
    machines = Machine.objects.using(database()).filter(id=mid, cell=cell.keys.cell)
    machine = machines.first()
    # The same work and the same answer for a machine that never was.
    stored = bytes(machine.enroll_proof_digest) if machine is not None else bytes(32)
    if document is not None:
        if machine is not None and machine.state == MachineState.PENDING and not machine.provider_ref:
            raise CellUnavailableError(
                "this machine's launch is not written down yet: try again in a few seconds"
            )
        is_it = machine is not None and hmac.compare_digest(machine.provider_ref, document.instance_id)
    else:
        is_it = hmac.compare_digest(stored, proof_digest(proof)) and (expected is None)
    if not is_it or machine is None:
        raise NotPermittedError("the proof is not this machine's: launch the machine again", field="proof")

    password = _password(mid, nonce)
    digest = hashlib.sha256(password.encode()).hexdigest()
    spent = machines.filter(
        state=MachineState.PENDING, enroll_used_at=None, enroll_proof_digest=stored
    ).update(
        state=MachineState.ENROLLED,
        enroll_used_at=timezone.now(),
        capabilities=dict(capabilities),
        redis_user=cell.keys.machine(mid.hex).redis_user,
        redis_password_digest=digest,
    )
    if not spent and not _is_again(machines.first(), nonce, digest, capabilities):
        raise ConflictError(
            "the proof was used before, or the machine is gone: launch the machine again", field="proof"
        )
    try:
        cell.set_user(mid.hex, digest)
    except redis.RedisError as error:
        if spent:
            machines.filter(state=MachineState.ENROLLED, redis_password_digest=digest).update(
                state=MachineState.PENDING, enroll_used_at=None, redis_user="", redis_password_digest=""
            )
        log.warning("machine.enrol_failed", machine=mid.hex, error=type(error).__name__)
        raise CellUnavailableError("the cell's Redis is away: try again in a few seconds") from None
    log.info("machine.enrolled", machine=mid.hex, again=not spent)
    return Enrolled(mid.hex, cell.keys.cell, _machine_url(cell, mid.hex, password))


def _password(machine_id: UUID, nonce: str) -> str:
    """Of 256 bits: at random, or the one that this nonce gives with our secret, so that it need not be kept."""
    if not nonce:
        return secrets.token_urlsafe(32)
    made = salted_hmac("corral.machine-password", f"{machine_id.hex} {nonce}", algorithm="sha256").digest()
    return base64.urlsafe_b64encode(made).decode().rstrip("=")


def _is_again(machine: Machine | None, nonce: str, digest: str, capabilities: Mapping[str, object]) -> bool:
    """Whether this very enrolment succeeded a moment ago: its first password is what the nonce gives."""
    return (
        machine is not None
        and bool(nonce)
        and machine.state == MachineState.ENROLLED
        and machine.enroll_used_at is not None
        and timezone.now() - machine.enroll_used_at < AGAIN_FOR
        and hmac.compare_digest(machine.redis_password_digest, digest)
        and machine.capabilities.get("box_public") == capabilities.get("box_public")
    )


def database() -> str:
    """The connection of the operator role, which alone may see machines."""
    return "default" if settings.ENV.db_role == "operator" else "operator"


def _machine_id(text: str) -> UUID:
    try:
        if len(text) != 32:
            raise ValueError
        return UUID(hex=text)
    except ValueError:
        raise InvalidInputError("machine_id: expected 32 hex digits", field="machine_id") from None


def _machine_url(cell: Cell, machine_id: str, password: str) -> str:
    """The cell's URL with the machine's user in place of ours."""
    parts = urlsplit(settings.ENV.redis_url)
    host = parts.netloc.rpartition("@")[2]
    user = cell.keys.machine(machine_id).redis_user
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))
