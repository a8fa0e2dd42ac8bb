"""Signatures as Standard Webhooks describes them: HMAC-SHA256 over id, timestamp and body, one per secret in force.

The receiver recomputes any one of them, compares in constant time, and refuses timestamps that are minutes away.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Iterable


def headers(message_id: str, timestamp_s: int, body: bytes, secrets: Iterable[str]) -> dict[str, str]:
    """`secrets`: `whsec_` and base64 each."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(timestamp_s),
        "webhook-signature": " ".join(signature(message_id, timestamp_s, body, each) for each in secrets),
    }


def signature(message_id: str, timestamp_s: int, body: bytes, secret: str) -> str:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signed = hmac.new(key, f"{message_id}.{timestamp_s}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()
