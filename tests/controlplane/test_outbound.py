"""Calls to addresses that tenants name: none of ours, judged where the connection is made, bounded in time."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from controlplane import outbound
from controlplane.outbound import (
    CallFailedError,
    RefusedAddressError,
    allowed_networks,
    post,
    target,
    why_not,
)

OURS = (
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1",
    "fd00:ec2::254", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::",
    "64:ff9b::7f00:1", "64:ff9b:1::a01:203", "::127.0.0.1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "fe80::1%eth0",
)  # fmt: skip


@pytest.mark.parametrize("address", OURS)
def test_our_own_addresses_in_every_guise_are_refused(address: str) -> None:
    assert why_not(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_may_be_called(address: str) -> None:
    assert why_not(address) is None


def test_the_operator_may_allow_networks() -> None:
    allowed = allowed_networks("10.0.0.0/8, fd00::/8,127.0.0.1")
    assert why_not("10.1.2.3", allowed) is None and why_not("::ffff:10.1.2.3", allowed) is None
    assert why_not("fd00::1", allowed) is None and why_not("127.0.0.1", allowed) is None
    assert why_not("192.168.1.1", allowed) and why_not("127.0.0.2", allowed)
    with pytest.raises(ValueError, match="'ten' is no network"):
        allowed_networks("ten")


@pytest.mark.parametrize(
    "url",
    ["ftp://example.org/", "file:///etc/passwd", "https://", "http://a:b@example.org/", "example.org", "http://a b/",
     "http://example.org:99999/", "http://exa\nmple.org/", "gopher://x", "https://" + "a" * 2_100],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(RefusedAddressError):
        target(url)


def test_a_url_is_taken_apart() -> None:
    assert target("https://exämple.org/a?b=c#d") == outbound.Target(
        "https", "xn--exmple-cua.org", 443, "/a?b=c"
    )
    assert target("http://[2606:4700::1111]:8080") == outbound.Target("http", "2606:4700::1111", 8080, "/")


class Server:
    """Listens on loopback; `behave(connection)` is what it does with each connection."""

    def __init__(self, behave: Any) -> None:
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        self.n_seen = 0
        self.behave = behave
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.sock.accept()
            except OSError:
                return
            self.n_seen += 1
            with connection:
                self.behave(connection)


@pytest.fixture
def server() -> Iterator[Any]:
    made: list[Server] = []

    def make(behave: Any) -> Server:
        made.append(Server(behave))
        return made[-1]

    yield make
    for each in made:
        each.sock.close()


LOOPBACK = allowed_networks("127.0.0.1")


def test_a_name_that_turns_out_to_be_ours_is_not_connected_to(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rebinding: the name is public when first asked, and ours when the call is made."""
    it = server(lambda connection: None)
    answers = iter(["93.184.216.34", "127.0.0.1"])

    def resolves(host: str, port: int, **_: Any) -> Any:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolves)
    url = f"http://rebound.example:{it.port}/"
    assert outbound.resolve("rebound.example", it.port) == ["93.184.216.34"]
    with pytest.raises(RefusedAddressError, match="CORRAL_OUTBOUND_ALLOW"):
        post(url, b"", {})
    assert it.n_seen == 0


def test_it_connects_to_the_address_that_was_judged(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is resolved once for a call: a second answer is never asked for."""
    seen: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        seen.append(connection.recv(65_536))
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    it = server(answer)
    n_asked = 0

    def resolves(host: str, port: int, *_: Any, **__: Any) -> Any:
        nonlocal n_asked
        if host == "hook.example":
            n_asked += 1
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolves)
    assert post(f"http://hook.example:{it.port}/x", b"hi", {}, allowed=LOOPBACK).status == 204
    assert n_asked == 1
    assert seen[0].startswith(b"POST /x HTTP/1.1\r\n") and f"Host: hook.example:{it.port}".encode() in seen[0]


def test_redirects_are_answers(server: Any) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(
            b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\nContent-Length: 0\r\n\r\n"
        )

    it = server(answer)
    assert post(f"http://127.0.0.1:{it.port}/", b"", {}, allowed=LOOPBACK).status == 302
    assert it.n_seen == 1


@pytest.mark.parametrize("tls", [False, True])
def test_a_peer_that_drips_or_says_nothing_is_cut_off(server: Any, tls: bool) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        try:
            while not over.wait(0.02):
                connection.sendall(b"H")
        except OSError:
            pass

    it = server(drip if not tls else lambda connection: over.wait(10))
    began = time.monotonic()
    with pytest.raises(CallFailedError, match="within"):
        post(f"http{'s' if tls else ''}://127.0.0.1:{it.port}/", b"", {}, allowed=LOOPBACK, timeout_s=0.3)
    over.set()
    assert time.monotonic() - began < 10


def test_an_answer_is_read_up_to_the_bound(server: Any) -> None:
    def answer(connection: socket.socket) -> None:
        connection.recv(65_536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100_000)

    it = server(answer)
    assert len(post(f"http://127.0.0.1:{it.port}/", b"", {}, allowed=LOOPBACK, max_answer=10).body) == 10


async def test_the_same_on_a_loop() -> None:
    assert await outbound.aresolve("127.0.0.1", 80, LOOPBACK) == ["127.0.0.1"]
    with pytest.raises(RefusedAddressError):
        await outbound.aresolve("127.0.0.1", 80)
