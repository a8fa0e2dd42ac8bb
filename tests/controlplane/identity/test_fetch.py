"""Where a tenant's configuration may make us send requests: public hosts, over TLS, and no large answers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import requests

from controlplane.identity import fetch
from controlplane.outbound import allowed_networks

ASKED: list[str] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        ASKED.append(self.path)
        body = b"x" * (fetch.MAX_BODY_BYTES + 1 if self.path == "/large" else 2)
        self.send_response(302 if self.path == "/away" else 200)
        if self.path == "/away":
            self.send_header("Location", "/secret")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    ASKED.clear()
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield found.server_address[1]
    found.shutdown()
    found.server_close()
    thread.join(5)


def allow(settings: Any, *hosts: str) -> None:
    environment = settings.ENV
    settings.ENV = type(environment)(
        **{**vars(environment), "outbound_allow": allowed_networks(",".join(hosts))}
    )


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:{port}/",
        "https://localhost:{port}/",
        "https://[::ffff:127.0.0.1]:{port}/",
        "https://2130706433:{port}/",
        "http://127.0.0.1:{port}/",
        "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/",
        "file:///etc/passwd",
    ],
)
def test_private_addresses_are_refused_before_a_byte_is_sent(server: int, url: str) -> None:
    with fetch.session() as session, pytest.raises(requests.RequestException):
        session.get(url.format(port=server))
    assert ASKED == []


def test_a_name_that_turns_private_is_refused_where_it_connects(
    server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = [(2, 1, 6, "", ("127.0.0.1", server))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    with fetch.session() as session, pytest.raises(requests.RequestException, match="not a public"):
        session.get(f"https://rebound.example:{server}/")
    assert ASKED == []


def test_what_the_operator_allows_is_asked_without_following_and_without_end(
    server: int, settings: Any
) -> None:
    allow(settings, "127.0.0.1")
    with fetch.session() as session:
        assert session.get(f"http://127.0.0.1:{server}/").content == b"xx"
        assert session.get(f"http://127.0.0.1:{server}/away").status_code == 302
        with pytest.raises(fetch.RefusedFetchError, match="larger"):
            session.get(f"http://127.0.0.1:{server}/large")
    assert "/secret" not in ASKED


@pytest.mark.parametrize(
    "url",
    ["", "example.org", "ftp://example.org", "http://example.org", "https://u:p@example.org", "https://x:y/"],
)
def test_what_is_no_https_url_is_named(url: str) -> None:
    assert fetch.check_url(url)


def test_https_urls_pass() -> None:
    assert fetch.check_url("https://login.example.org/realms/acme") is None
