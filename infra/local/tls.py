"""A new certificate for gateways that serve TLS themselves: checked, put in the old one's place, and seen being served.

Called by `manage.py rotate tls`. Gateways look at the files every second (controlplane/gateway/tls.py).
"""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from infra.local.process import wait_until

_SERVED_WITHIN_S = 10.0


def replace_pair(cert: Path, key: Path, *, over_cert: Path, over_key: Path, url: str) -> str:
    """SHA-256 of the certificate that gateways at `url` serve now. Raises ValueError for a pair that does not fit."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(
            f"--cert {cert}, --key {key}: they are no certificate with its key ({error})"
        ) from error
    wanted = fingerprint(cert.read_text(encoding="ascii"))
    # Between the two a gateway finds a pair that does not fit, keeps the old one, and looks again.
    _replace(over_key, key.read_bytes())
    _replace(over_cert, cert.read_bytes())
    if not wait_until(lambda: served(url) == wanted, _SERVED_WITHIN_S):
        raise RuntimeError(
            f"{url} does not serve the new certificate after {_SERVED_WITHIN_S:g} s: see its log"
        )
    return wanted


def fingerprint(pem: str) -> str:
    """SHA-256 of the first certificate in it."""
    end = "-----END CERTIFICATE-----"
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem[: pem.index(end) + len(end)])).hexdigest()


def served(url: str) -> str:
    """Fingerprint of what a new connection is shown; empty where nobody answers. Trusts nobody: it only looks."""
    parts = urlsplit(url)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((parts.hostname or "", parts.port or 443), timeout=2.0) as plain,
            context.wrap_socket(plain, server_hostname=parts.hostname) as secured,
        ):
            return hashlib.sha256(secured.getpeercert(binary_form=True) or b"").hexdigest()
    except OSError:
        return ""


def _replace(path: Path, content: bytes) -> None:
    """Whole or not at all, only for its owner."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)
