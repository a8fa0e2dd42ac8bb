"""Whom a tenant's program asks for: its own customer's id, told in `safety_identifier`, `user` or a header.

Only a pseudonym of it is kept, different for each organization, under a secret that only trusted processes hold: it
sums usage and names nobody. Whoever knows an id finds its usage by it. Imports no Django: the gateway uses it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Final

MAX_ID: Final = 512  # characters of the tenant's own id
LENGTH: Final = 24
SHAPE: Final = re.compile(rf"(?:[0-9a-f]{{{LENGTH}}})?\Z")


def pseudonym(secret: bytes, organization: str, end_customer: str) -> str:
    """24 hex digits (96 bits); `organization` is bare hex."""
    text = f"end customer\0{organization}\0{end_customer}".encode("utf-8", "surrogatepass")
    return hmac.digest(secret, text, hashlib.sha256).hex()[:LENGTH]
