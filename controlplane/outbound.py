"""Single calls to addresses that tenants name: webhooks, identity providers.

What may be called is judged in workers/addresses.py, when the connection is made. Redirects are not followed: an answer
3xx is an answer. Imports no Django: gateways use it too.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from workers.addresses import (
    MAX_URL,
    Address,
    CallFailedError,
    Network,
    RefusedAddressError,
    Target,
    allowed_networks,
    aresolve,
    judged,
    resolve,
    target,
    why_not,
)

__all__ = [
    "MAX_URL",
    "Address",
    "Answer",
    "CallFailedError",
    "Network",
    "RefusedAddressError",
    "Target",
    "allowed_networks",
    "aresolve",
    "judged",
    "post",
    "resolve",
    "target",
    "why_not",
]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back. `body` is cut off at the bound that was given."""

    status: int
    headers: Mapping[str, str]
    body: bytes


def post(
    url: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    allowed: Sequence[Network] = (),
    timeout_s: float = 10.0,
    max_answer: int = 4_096,
) -> Answer:
    """POST once, all of it within `timeout_s`. Raises RefusedAddressError and CallFailedError."""
    to = target(url)
    deadline = time.monotonic() + timeout_s
    addresses = resolve(to.host, to.port, allowed)
    sockets = [_connect(addresses, to.port, deadline)]
    # One watch over the whole exchange: a peer that sends a byte now and then never trips a socket's own timeout.
    watch = threading.Timer(max(deadline - time.monotonic(), 0.001), _cut, [sockets])
    watch.daemon = True
    watch.start()
    try:
        if to.scheme == "https":
            secured = _tls().wrap_socket(sockets[0], server_hostname=to.host, do_handshake_on_connect=False)
            sockets.append(secured)  # it has taken the first one's place
            secured.do_handshake()
        connection = http.client.HTTPConnection(to.host, to.port)
        connection.sock = sockets[-1]
        connection.request(
            "POST", to.path, body, {**headers, "Host": _host_header(to), "Connection": "close"}
        )
        response = connection.getresponse()
        return Answer(response.status, dict(response.getheaders()), response.read(max_answer))
    except (OSError, http.client.HTTPException, ValueError) as error:
        late = time.monotonic() >= deadline
        reason = (
            f"no whole answer within {timeout_s:g} s"
            if late
            else f"{type(error).__name__} while talking to it"
        )
        raise CallFailedError(reason) from error
    finally:
        watch.cancel()
        with contextlib.suppress(OSError):
            sockets[-1].close()


def _connect(addresses: Sequence[str], port: int, deadline: float) -> socket.socket:
    last: OSError | None = None
    for n, address in enumerate(addresses):
        left_s = (deadline - time.monotonic()) / (len(addresses) - n)
        try:
            return socket.create_connection((address, port), timeout=max(left_s, 0.001))
        except OSError as error:
            last = error
    raise CallFailedError(f"nobody answers at {addresses[0]} port {port}") from last


def _cut(sockets: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sockets[-1], socket.SHUT_RDWR)


def _host_header(to: Target) -> str:
    host = f"[{to.host}]" if ":" in to.host else to.host
    return host if to.port == (443 if to.scheme == "https" else 80) else f"{host}:{to.port}"


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()
