"""Leave to fetch one version from one machine for a while. Pure.

The serving machine makes up its key at its start and tells it to the trusted side alone (ModelShelf in its part of
Redis); the control plane signs with it, so a machine can neither forge leave for another nor use its own twice as long.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

LIFE_S: Final = 900
SKEW_S: Final = 60.0  # by which the machine's clock may be wrong
KEY_BYTES: Final = 32


def query(key: bytes, digest: str, ends_at_s: int) -> str:
    """What a URL of this version ends in."""
    return f"ends={ends_at_s}&ticket={_sign(key, digest, ends_at_s)}"


def is_good(key: bytes, digest: str, ends: str, ticket: str, now_s: float) -> bool:
    """Whether it opens this version now."""
    if not (ends.isascii() and ends.isdigit() and len(ends) <= 12 and ticket.isascii()):
        return False
    is_ours = hmac.compare_digest(_sign(key, digest, int(ends)), ticket)
    return is_ours and now_s <= int(ends) + SKEW_S and int(ends) <= now_s + LIFE_S + SKEW_S


def _sign(key: bytes, digest: str, ends_at_s: int) -> str:
    return hmac.new(key, f"{digest}\n{ends_at_s}".encode(), hashlib.sha256).hexdigest()
