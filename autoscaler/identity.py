"""Which EC2 instance is asking: its identity document as AWS signed it, against the machine it claims to be.

Called by services.enrol in the web process, which asks AWS nothing: the certificate is a file, the instance's id is in
the machine's row. Fails closed. The document is no secret and does not expire, so it is worth one enrolment of the one
machine it names, while that machine is pending.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from controlplane.errors import InvalidInputError, NotPermittedError

MAX_DOCUMENT_CHARS: Final = 8192
MAX_SIGNATURE_CHARS: Final = 1024


class Document(msgspec.Struct, frozen=True, rename="camel"):
    """What is read of AWS's identity document."""

    instance_id: str
    region: str
    account_id: str
    image_id: str = ""
    availability_zone: str = ""
    instance_type: str = ""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a machine of this pool must show. An empty `image_id` or `account_id` is not compared."""

    certificate: Path
    region: str
    image_id: str = ""
    account_id: str = ""


def verify(identity: Mapping[str, object], expected: Expected) -> Document:
    """The document, once its signature holds.

    Raises InvalidInputError for what has not the form of one, NotPermittedError for a wrong signature, region, image
    or account.
    """
    document, signature = identity.get("document"), identity.get("signature")
    if not isinstance(document, str) or not 1 <= len(document) <= MAX_DOCUMENT_CHARS:
        raise InvalidInputError("identity.document: expected the document's text", field="identity")
    if not isinstance(signature, str) or not 1 <= len(signature) <= MAX_SIGNATURE_CHARS:
        raise InvalidInputError("identity.signature: expected base64", field="identity")
    try:
        _public_key(expected.certificate).verify(
            base64.b64decode(signature, validate=True), document.encode(), padding.PKCS1v15(), hashes.SHA256()
        )
        found = msgspec.json.decode(document, type=Document)
    except (InvalidSignature, binascii.Error, msgspec.MsgspecError):
        raise NotPermittedError("the identity document is not signed by AWS", field="identity") from None
    for name, wanted, shown in (
        ("region", expected.region, found.region),
        ("imageId", expected.image_id, found.image_id),
        ("accountId", expected.account_id, found.account_id),
    ):
        if wanted and wanted != shown:
            raise NotPermittedError(f"the identity document's {name} is not this pool's", field="identity")
    return found


@lru_cache(maxsize=4)
def _public_key(certificate: Path) -> rsa.RSAPublicKey:
    key = x509.load_pem_x509_certificate(certificate.read_bytes()).public_key()
    if not isinstance(key, rsa.RSAPublicKey):
        raise ValueError(
            f"{certificate.name}: expected AWS's RSA certificate for instance identity documents"
        )
    return key
