"""Secrets for one machine: sealed by the control plane so that only that machine's agent can read them.

A sealed box (X25519 with a fresh key each, HKDF, AES-256-GCM) may lie in Redis, in rows and in logs of commands: who
has no private key of the machine learns its length. Used for what an external endpoint is called with
(workers/engine/upstream); the private key lies with the machine's credentials.
"""

from __future__ import annotations

import base64
import binascii
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

_KEY_BYTES: Final = 32
_NONCE: Final = bytes(12)  # every box has a key of its own


class BoxError(ValueError):
    """No key, or no box that was sealed for this machine."""


def new_key() -> str:
    """A private key, as hex."""
    return X25519PrivateKey.generate().private_bytes_raw().hex()


def public_of(private_hex: str) -> str:
    """What others seal with, as hex. Raises BoxError."""
    return _private(private_hex).public_key().public_bytes_raw().hex()


def seal_for(public_hex: str, plain: bytes) -> str:
    """A box for the holder of the private key. Raises BoxError for what is no public key."""
    try:
        theirs = X25519PublicKey.from_public_bytes(bytes.fromhex(public_hex))
        ours = X25519PrivateKey.generate()
        shared = ours.exchange(theirs)
    except ValueError as error:
        raise BoxError("that is no X25519 public key") from error
    head = ours.public_key().public_bytes_raw()
    return base64.b64encode(head + _cipher(shared, head).encrypt(_NONCE, plain, head)).decode()


def open_box(private_hex: str, box: str) -> bytes:
    """What was sealed. Raises BoxError."""
    private = _private(private_hex)
    try:
        raw = base64.b64decode(box, validate=True)
        head, sealed = raw[:_KEY_BYTES], raw[_KEY_BYTES:]
        shared = private.exchange(X25519PublicKey.from_public_bytes(head))
        return _cipher(shared, head).decrypt(_NONCE, sealed, head)
    except (binascii.Error, ValueError, InvalidTag) as error:
        raise BoxError("the box was not sealed for this machine") from error


def _private(private_hex: str) -> X25519PrivateKey:
    try:
        return X25519PrivateKey.from_private_bytes(bytes.fromhex(private_hex))
    except ValueError as error:
        raise BoxError("that is no X25519 private key") from error


def _cipher(shared: bytes, head: bytes) -> AESGCM:
    derived = HKDF(algorithm=hashes.SHA256(), length=32, salt=head, info=b"corral machine box")
    return AESGCM(derived.derive(shared))
