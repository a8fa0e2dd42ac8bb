"""The metadata service of one simulated instance: IMDSv2 as AWS documents it, with a signed identity."""

from __future__ import annotations

import base64
import json
import secrets
import threading
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID


@cache
def signing_key() -> rsa.RSAPrivateKey:
    """Stands for AWS's."""
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


@cache
def certificate() -> bytes:
    """What an operator would take from AWS's documentation, PEM."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated identity documents")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(signing_key().public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(signing_key(), hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.PEM)


def signed(document: dict[str, Any], key: rsa.RSAPrivateKey | None = None) -> dict[str, str]:
    """{"document", "signature"} as the metadata service gives them."""
    text = json.dumps(document, indent=2)
    signature = (key or signing_key()).sign(text.encode(), padding.PKCS1v15(), hashes.SHA256())
    return {"document": text, "signature": base64.b64encode(signature).decode()}


class Imds:
    """`paths`: what is served under /latest; missing ones are 404. Tokens live `token_life_s` at most."""

    def __init__(self, paths: dict[str, str]) -> None:
        self.paths = paths
        self.tokens: dict[str, float] = {}
        self.n_unauthorized = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                ttl = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
                if self.path != "/latest/api/token" or self.headers.get("X-Forwarded-For"):
                    return self._say(403, "")
                if not ttl.isdigit() or not 1 <= int(ttl) <= 21_600:
                    return self._say(400, "")
                token = secrets.token_urlsafe(16)
                outer.tokens[token] = time.monotonic() + int(ttl)
                return self._say(200, token)

            def do_GET(self) -> None:
                token = self.headers.get("X-aws-ec2-metadata-token", "")
                if outer.tokens.get(token, 0.0) < time.monotonic():
                    outer.n_unauthorized += 1
                    return self._say(401, "")
                found = outer.paths.get(self.path.removeprefix("/latest"))
                return self._say(404, "") if found is None else self._say(200, found)

            def _say(self, status: int, text: str) -> None:
                body = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def interrupt(self, in_s: float, action: str = "terminate") -> None:
        self.paths["/meta-data/spot/instance-action"] = json.dumps({"action": action, "time": stamp(in_s)})

    def recommend_rebalance(self) -> None:
        self.paths["/meta-data/events/recommendations/rebalance"] = json.dumps({"noticeTime": stamp(0)})

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def stamp(in_s: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=in_s)).strftime("%Y-%m-%dT%H:%M:%SZ")
