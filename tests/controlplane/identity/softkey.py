"""A security key made of software: it answers WebAuthn's challenges as a browser with a key in it does.

Source of the formats: W3C Web Authentication Level 2, 6.1 (authenticator data) and 5.8.1 (client data).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from base64 import urlsafe_b64encode
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from fido2 import cbor
from fido2.cose import ES256

USER_PRESENT, HAS_CREDENTIAL = 0x01, 0x40


def b64(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


class SoftKey:
    """Has one credential. `origin`: the page that asks, as the browser sees it."""

    def __init__(self, origin: str = "https://testserver") -> None:
        self.origin = origin
        self.credential_id = os.urandom(32)
        self.n_signed = 0
        self._private = ec.generate_private_key(ec.SECP256R1())

    def create(self, options: dict[str, Any]) -> str:
        """What navigator.credentials.create() gives, as JSON."""
        asked = options["publicKey"]
        public = cbor.encode(dict(ES256.from_cryptography_key(self._private.public_key())))
        attested = bytes(16) + struct.pack(">H", len(self.credential_id)) + self.credential_id + public
        data = self._authenticator_data(asked["rp"]["id"], HAS_CREDENTIAL) + attested
        attestation = cbor.encode({"fmt": "none", "attStmt": {}, "authData": data})
        client = self._client_data("webauthn.create", asked["challenge"])
        return self._credential({"clientDataJSON": b64(client), "attestationObject": b64(attestation)})

    def get(self, options: dict[str, Any]) -> str:
        """What navigator.credentials.get() gives, as JSON."""
        asked = options["publicKey"]
        assert b64(self.credential_id) in [each["id"] for each in asked["allowCredentials"]]
        self.n_signed += 1
        data = self._authenticator_data(asked["rpId"])
        client = self._client_data("webauthn.get", asked["challenge"])
        signed = data + hashlib.sha256(client).digest()
        signature = self._private.sign(signed, ec.ECDSA(hashes.SHA256()))
        parts = {"clientDataJSON": client, "authenticatorData": data, "signature": signature}
        return self._credential({name: b64(part) for name, part in parts.items()})

    def _authenticator_data(self, rp: str, flags: int = 0) -> bytes:
        told = struct.pack(">BI", USER_PRESENT | flags, self.n_signed)
        return hashlib.sha256(rp.encode()).digest() + told

    def _client_data(self, kind: str, challenge: str) -> bytes:
        return json.dumps({"type": kind, "challenge": challenge, "origin": self.origin}).encode()

    def _credential(self, response: dict[str, str]) -> str:
        own = b64(self.credential_id)
        return json.dumps(
            {
                "id": own,
                "rawId": own,
                "type": "public-key",
                "response": response,
                "clientExtensionResults": {},
            }
        )
