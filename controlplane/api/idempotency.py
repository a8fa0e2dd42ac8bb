"""Writes that may be sent twice: the answer to an Idempotency-Key is kept for a day and given again.

The answer is stored in the transaction of the write itself, so either both are there or neither. Only answers of
success are kept: a refused write changed nothing and may be tried again. Stored answers are sealed under the caller's
own token, which is stored nowhere: whoever reads the table cannot read the secrets that some of them hold.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from django.db import OperationalError, connection
from django.http import HttpRequest, HttpResponse

from controlplane.api.problems import problem
from controlplane.tenants.models import IdempotentWrite
from controlplane.tenants.service_accounts import Caller

HEADER: Final = "Idempotency-Key"
WRITES: Final = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_SHAPE: Final = re.compile(r"[\x21-\x7e]{1,255}\Z")
_KEPT_HEADERS: Final = ("ETag", "Location", "Operation-Location", "Content-Type")
_NONCE_BYTES: Final = 12


def once(
    request: HttpRequest, caller: Caller, token: str, answer: Callable[[Any], HttpResponse]
) -> HttpResponse:
    """`answer(request)`, or what it answered when this key came first. Runs inside the tenant's transaction."""
    key = request.headers.get(HEADER)
    if key is None or request.method not in WRITES:
        return answer(request)
    if not _SHAPE.match(key):
        detail = f"{HEADER}: send 1 to 255 printable ASCII characters without spaces"
        return problem(request, 400, "invalid_input", detail, errors=[{"field": HEADER, "message": detail}])
    key_digest = hashlib.sha256(key.encode()).digest()
    if not _lock(caller, key_digest):
        return problem(
            request,
            409,
            "idempotency_key_in_use",
            "a call with this key is still running: send it again in a moment",
            headers={"Retry-After": "2"},
        )
    fingerprint = hashlib.sha256(
        b"\n".join([(request.method or "").encode(), request.get_full_path().encode(), request.body])
    ).digest()
    kept = IdempotentWrite.objects.filter(
        organization_id=caller.organization_id, caller=caller.token_id, key_digest=key_digest
    ).first()
    if kept is not None:
        if bytes(kept.fingerprint) != fingerprint:
            detail = f"{HEADER}: this key came with another call before; use a new key for a new call"
            return problem(
                request, 409, "idempotency_key_reused", detail, errors=[{"field": HEADER, "message": detail}]
            )
        return _unseal(kept, token)
    response = answer(request)
    if response.status_code < 300:
        IdempotentWrite.objects.create(
            organization_id=caller.organization_id,
            caller=caller.token_id,
            key_digest=key_digest,
            fingerprint=fingerprint,
            status=response.status_code,
            body=_seal(response, token),
        )
    return response


def _lock(caller: Caller, key_digest: bytes) -> bool:
    """One call with this key at a time, until the transaction ends; False when the other takes too long."""
    digest = hashlib.sha256(caller.token_id.bytes + key_digest).digest()
    number = int.from_bytes(digest[:8], "big", signed=True)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_xact_lock(%s)", [number])
    except OperationalError as error:
        if getattr(error.__cause__, "sqlstate", None) != "55P03":  # lock_not_available
            raise
        return False
    return True


def _cipher(token: str) -> AESGCM:
    key = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"corral idempotent write")
    return AESGCM(key.derive(token.encode()))


def _seal(response: HttpResponse, token: str) -> bytes:
    headers = {name: response[name] for name in _KEPT_HEADERS if name in response}
    plain = json.dumps({"headers": headers, "body": response.content.decode()}).encode()
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + _cipher(token).encrypt(nonce, plain, None)


def _unseal(kept: IdempotentWrite, token: str) -> HttpResponse:
    sealed = bytes(kept.body)
    plain = json.loads(_cipher(token).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None))
    headers = {"Cache-Control": "no-store", "Idempotency-Replayed": "true", **plain["headers"]}
    return HttpResponse(plain["body"], status=kept.status, headers=headers)
