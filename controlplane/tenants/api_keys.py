"""The text of a key, `sk-crl-<12 lookup characters>-<43 secret characters>`, and its digest.

Keys of inference begin with `sk-crl`, tokens of the management API with `mt-crl`, so that neither is taken for the
other, by people or by scanners of leaked secrets.

The lookup part finds the row by a unique index; the whole key is then compared through HMAC-SHA256 under a
pepper that only trusted processes hold. The secret has 256 random bits, so a fast keyed hash is the right
one: a slow password hash would buy nothing and cost the hot path milliseconds. Imports no Django: the gateway
uses it.
"""

import hashlib
import hmac
import re
import secrets
import string
from dataclasses import dataclass, field
from typing import Final

LOOKUP_LENGTH = 12
SECRET_LENGTH = 43  # 32 random bytes in URL-safe base64
_ALPHABET = string.ascii_letters + string.digits
INFERENCE: Final = "sk-crl"
MANAGEMENT: Final = "mt-crl"
_SHAPES: Final = {
    kind: re.compile(rf"{kind}-([0-9A-Za-z]{{{LOOKUP_LENGTH}}})-[0-9A-Za-z_-]{{{SECRET_LENGTH}}}\Z")
    for kind in (INFERENCE, MANAGEMENT)
}


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the moment of its making; `plaintext` is shown once and stored nowhere."""

    plaintext: str = field(repr=False)
    lookup: str
    digest: bytes = field(repr=False)

    @property
    def last4(self) -> str:
        return self.plaintext[-4:]


def generate(pepper: bytes, kind: str = INFERENCE) -> NewKey:
    """A new random key (71 bits of lookup, 256 bits of secret) and its digest under `pepper`."""
    lookup = "".join(secrets.choice(_ALPHABET) for _ in range(LOOKUP_LENGTH))
    plaintext = f"{kind}-{lookup}-{secrets.token_urlsafe(32)}"
    return NewKey(plaintext=plaintext, lookup=lookup, digest=digest(pepper, plaintext))


def lookup_of(text: str, kind: str = INFERENCE) -> str | None:
    """The lookup part, or None where the text does not have the shape of a key (so no query is worth it)."""
    match = _SHAPES[kind].match(text)
    return match.group(1) if match else None


def digest(pepper: bytes, text: str) -> bytes:
    """HMAC-SHA256 of the whole key. Raises ValueError if the pepper is too short to protect anything."""
    if len(pepper) < 16:
        raise ValueError(
            "the key pepper must have at least 16 bytes: set CORRAL_KEY_PEPPER to 32 or more hex digits"
        )
    return hmac.digest(pepper, text.encode(), hashlib.sha256)


def matches(pepper: bytes, text: str, stored: bytes) -> bool:
    """Whether `text` is the key behind `stored`, in time that does not depend on where they differ."""
    return hmac.compare_digest(digest(pepper, text), stored)
