"""HTTP for sign-in to addresses that a tenant wrote down (discovery, keys, token endpoint), as a requests session.

allauth speaks requests; what may be called is judged by outbound.py where the connection is made. TLS only, unless the
operator's list names the address; no redirects, bounded in time and size.
"""

from __future__ import annotations

import socket
from typing import Any, Final

import requests
from django.conf import settings
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from controlplane import outbound

TIMEOUT_S: Final = (3.0, 5.0)  # to connect, and between two bytes
MAX_BODY_BYTES: Final = 1 << 20


class RefusedFetchError(requests.RequestException):
    """The address may not be called, or its answer is too large."""


def check_url(url: str) -> str | None:
    """What is wrong with a URL that a tenant writes down, or None. The host is resolved only when it is used."""
    try:
        to = outbound.target(url)
    except outbound.RefusedAddressError as error:
        return str(error)
    if to.scheme == "http" and not settings.ENV.outbound_allow:
        return "write an https URL (the operator can allow a network by CORRAL_OUTBOUND_ALLOW)"
    return None


def session() -> requests.Session:
    """Follows no redirects, uses no proxy or credentials of ours, and raises requests.RequestException."""
    made = _Session()
    made.trust_env = False
    for scheme in ("https://", "http://"):
        made.mount(scheme, _Adapter())
    return made


class _Session(requests.Session):
    def request(self, method: str, url: str | bytes, *args: Any, **kwargs: Any) -> requests.Response:
        kwargs.update(allow_redirects=False, timeout=TIMEOUT_S)
        return super().request(method, url, *args, **kwargs)


class _Adapter(HTTPAdapter):
    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        self.poolmanager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        if problem := check_url(request.url or ""):
            raise RefusedFetchError(problem)
        kwargs["stream"] = True
        response = super().send(request, *args, **kwargs)
        body = response.raw.read(MAX_BODY_BYTES + 1, decode_content=True)
        response.close()
        if len(body) > MAX_BODY_BYTES:
            raise RefusedFetchError(f"the answer is larger than {MAX_BODY_BYTES} bytes")
        response._content = body
        return response


def _address(host: str, port: int, *, is_plain: bool) -> str:
    """The first address that may be called; without TLS only one that the operator named."""
    allowed = settings.ENV.outbound_allow
    try:
        found = outbound.resolve(host, port, allowed)
    except (outbound.RefusedAddressError, outbound.CallFailedError) as error:
        raise RefusedFetchError(str(error)) from error
    if is_plain and outbound.why_not(found[0]) is None:
        raise RefusedFetchError(f"{host}: plain http goes to networks that the operator named only")
    return found[0]


class _HttpConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        self._dns_host = _address(self._dns_host, self.port, is_plain=True)
        return super()._new_conn()


class _HttpsConnection(HTTPSConnection):
    def _new_conn(self) -> socket.socket:
        self.server_hostname = self.server_hostname or self._dns_host.rstrip(".")
        self._dns_host = _address(self._dns_host, self.port, is_plain=False)
        return super()._new_conn()


class _HttpPool(HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection
