"""`POST /internal/enrol`: the one address a new machine talks to before it has credentials.

{"machine_id", "proof", "nonce", "capabilities"} -> {"machine_id", "cell", "redis_url"}; what it means is in
autoscaler/services.py. No session, no tenant, no cookie; bounded in size and rate, since anybody may call it.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict

import structlog
from django.db import DatabaseError, InterfaceError
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.debug import sensitive_variables

from autoscaler.house import build_cell, expected_identity
from autoscaler.services import enrol as enrol_machine
from controlplane.errors import CorralError, InvalidInputError

log = structlog.get_logger("corral.api")

MAX_BODY_BYTES = 16_384
# A fleet boots in bursts; a 256-bit proof does not fall to guessing at any rate. This bounds the work.
RATE_PER_S = 10.0
BURST = 50.0


class RateLimit:
    """A token bucket of this process."""

    def __init__(self, rate_per_s: float, burst: float) -> None:
        self.rate_per_s = rate_per_s
        self.burst = burst
        self._level = burst
        self._at_s = time.monotonic()
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            now_s = time.monotonic()
            self._level = min(self.burst, self._level + (now_s - self._at_s) * self.rate_per_s)
            self._at_s = now_s
            if self._level < 1:
                return False
            self._level -= 1
            return True


limit = RateLimit(RATE_PER_S, BURST)


@csrf_exempt
@sensitive_variables()
def enrol(request: HttpRequest) -> JsonResponse:
    """200, or an error {"error": {"code", "message", "field"}} with 400, 403, 405, 409, 413, 429 or 503."""
    if request.method != "POST":
        return _refuse(405, "method_not_allowed", "POST a JSON object", headers={"Allow": "POST"})
    if not limit.take():
        return _refuse(429, "too_many_requests", "try again in a second", headers={"Retry-After": "1"})
    try:
        length = int(request.headers.get("Content-Length") or 0)
    except ValueError:
        length = 0
    if length > MAX_BODY_BYTES:
        return _refuse(413, "body_too_large", f"send at most {MAX_BODY_BYTES} bytes")
    try:
        machine_id, proof, identity, nonce, capabilities = _parse(request.body)
        enrolled = enrol_machine(
            machine_id=machine_id,
            proof=proof,
            identity=identity,
            expected=expected_identity(),
            nonce=nonce,
            capabilities=capabilities,
            cell=build_cell(),
        )
    except CorralError as error:
        headers = {"Retry-After": "2"} if error.status == 503 else {}
        return _refuse(error.status, error.code, error.message, error.field, headers)
    except (DatabaseError, InterfaceError) as error:
        log.warning("enrol.database_away", error=type(error).__name__)
        return _refuse(
            503, "database_unavailable", "try again in a few seconds", headers={"Retry-After": "2"}
        )
    return JsonResponse(asdict(enrolled), headers={"Cache-Control": "no-store"})


def _parse(body: bytes) -> tuple[str, str, dict[str, object] | None, str, dict[str, object]]:
    """(machine id, proof, identity, nonce, capabilities); one of proof and identity."""
    if len(body) > MAX_BODY_BYTES:
        raise InvalidInputError(f"send at most {MAX_BODY_BYTES} bytes")
    try:
        value = json.loads(body)
    except ValueError:
        raise InvalidInputError("the body must be a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidInputError("the body must be a JSON object")
    machine_id, proof, identity = value.get("machine_id"), value.get("proof", ""), value.get("identity")
    nonce, capabilities = value.get("nonce", ""), value.get("capabilities", {})
    if not isinstance(machine_id, str):
        raise InvalidInputError("machine_id: expected 32 hex digits", field="machine_id")
    if not isinstance(proof, str) or (not proof and identity is None):
        raise InvalidInputError("proof: expected text", field="proof")
    if identity is not None and not isinstance(identity, dict):
        raise InvalidInputError("identity: expected an object", field="identity")
    if not isinstance(nonce, str):
        raise InvalidInputError("nonce: expected text", field="nonce")
    if not isinstance(capabilities, dict):
        raise InvalidInputError("capabilities: expected an object", field="capabilities")
    return machine_id, proof, identity, nonce, capabilities


def _refuse(
    status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None
) -> JsonResponse:
    body = {"error": {"code": code, "message": message, "field": field}}
    return JsonResponse(body, status=status, headers=headers or {})
