"""Secrets that we must be able to read again (TOTP seeds, client secrets of identity providers), sealed at rest.

AES-256-GCM under a key derived from CORRAL_SECRET_KEY and the purpose, so that a box of one purpose opens for no other.
Earlier keys (SECRET_KEY_FALLBACKS) still open what they sealed, and `manage.py reseal` (resealing.py, which knows every
place where a box lies) seals it anew. What needs only comparing is hashed instead, not here.
"""

from __future__ import annotations

import secrets
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from django.conf import settings

_NONCE_BYTES: Final = 12


class SealError(ValueError):
    """The box was sealed under a key that this process does not hold, for another purpose, or was changed."""


def seal(plain: str, *, purpose: str) -> bytes:
    """A fresh box each time: equal secrets look different."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + _cipher(settings.SECRET_KEY, purpose).encrypt(nonce, plain.encode(), None)


def unseal(box: bytes, *, purpose: str) -> str:
    """What was sealed. Raises SealError."""
    return _open(box, purpose)[0]


def resealed(box: bytes, *, purpose: str) -> bytes | None:
    """A box under the present key with the same secret; None where it is under that one already. Raises SealError."""
    plain, is_present = _open(box, purpose)
    return None if is_present else seal(plain, purpose=purpose)


def _open(box: bytes, purpose: str) -> tuple[str, bool]:
    """The secret, and whether the present key opened it."""
    for key in (settings.SECRET_KEY, *map(str, settings.SECRET_KEY_FALLBACKS)):
        try:
            plain = _cipher(key, purpose).decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], None).decode()
        except InvalidTag:
            continue
        return plain, key == settings.SECRET_KEY
    raise SealError(f"a sealed {purpose} cannot be opened: set the CORRAL_SECRET_KEY it was sealed under")


def _cipher(key: str, purpose: str) -> AESGCM:
    derived = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=f"corral {purpose}".encode())
    return AESGCM(derived.derive(key.encode()))
