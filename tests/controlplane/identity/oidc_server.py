"""A real OpenID provider over HTTP: discovery, keys, authorize with PKCE, token endpoint with signed ID tokens.

Small, strict where a provider is strict (client, redirect URI, PKCE, codes that work once), and able to lie on demand:
`claims` changes what the next ID token says, `key` what signs it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa

CLIENT_ID, CLIENT_SECRET = "corral", "client-secret-of-the-test"


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


class OidcServer:
    """Who signs in is set by `person`; everything that was asked for is kept."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self.key = self.published = key
        self.algorithm = "RS256"
        self.person: dict[str, Any] = {}
        self.claims: dict[str, Any] = {}
        self.codes: dict[str, dict[str, str]] = {}
        self.asked: list[str] = []
        self.issuer = ""

    def answer(self, method: str, url: str, headers: Any, body: str) -> tuple[int, Any]:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query))
        self.asked.append(parts.path)
        if parts.path == "/.well-known/openid-configuration":
            return 200, {
                "issuer": self.issuer,
                "authorization_endpoint": f"{self.issuer}/authorize",
                "token_endpoint": f"{self.issuer}/token",
                "jwks_uri": f"{self.issuer}/keys",
                "token_endpoint_auth_methods_supported": ["client_secret_basic"],
                "code_challenge_methods_supported": ["S256"],
            }
        if parts.path == "/keys":
            public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.published.public_key()))
            return 200, {"keys": [{**public, "kid": "one", "use": "sig", "alg": "RS256"}]}
        if parts.path == "/authorize":
            return self._authorize(query)
        if parts.path == "/token" and method == "POST":
            return self._token({name: values[0] for name, values in parse_qs(body).items()}, headers)
        return 404, {}

    def _authorize(self, query: dict[str, str]) -> tuple[int, Any]:
        if query.get("client_id") != CLIENT_ID or query.get("code_challenge_method") != "S256":
            return 400, {"error": "invalid_request"}
        code = secrets.token_urlsafe(16)
        self.codes[code] = query
        return 302, f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def _token(self, form: dict[str, str], headers: Any) -> tuple[int, Any]:
        expected = base64.b64encode(f"{CLIENT_ID}:{CLIENT_SECRET}".encode()).decode()
        asked = self.codes.pop(form.get("code", ""), None)  # a code works once
        challenge = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest())
        if (
            headers.get("Authorization") != f"Basic {expected}"
            or asked is None
            or asked["redirect_uri"] != form.get("redirect_uri")
            or asked["code_challenge"] != challenge.decode().rstrip("=")
        ):
            return 400, {"error": "invalid_grant"}
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "aud": CLIENT_ID,
            "iat": now,
            "exp": now + 300,
            "nonce": asked.get("nonce"),
            "email_verified": True,
            **self.person,
            **self.claims,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        id_token = jwt.encode(claims, self.key, algorithm=self.algorithm, headers={"kid": "one"})
        return 200, {"access_token": "unused", "token_type": "Bearer", "id_token": id_token}


@contextmanager
def serving(key: rsa.RSAPrivateKey) -> Iterator[OidcServer]:
    """The provider on a free port of loopback."""
    provider = OidcServer(key)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply("GET", "")

        def do_POST(self) -> None:
            self._reply("POST", self.rfile.read(int(self.headers["Content-Length"])).decode())

        def _reply(self, method: str, body: str) -> None:
            status, answer = provider.answer(method, self.path, self.headers, body)
            self.send_response(status)
            content = b"" if status == 302 else json.dumps(answer).encode()
            if status == 302:
                self.send_header("Location", answer)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.issuer = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
