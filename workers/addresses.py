"""Which addresses may be called on behalf of a tenant: webhooks, and endpoints they bring. No way into our own network.

An address is judged when the connection is made, after the name was resolved, and the connection goes to exactly the
address that was judged: a name that resolves to something else a moment later gains nothing. Refused are all addresses
that are not public (private, loopback, link-local and with it the clouds' metadata, carrier-grade NAT, multicast,
unspecified, reserved), also behind IPv4-mapped, 6to4, Teredo and NAT64 forms, unless the operator's list names them.
Used by both sides: controlplane/outbound.py makes single calls by it, workers/engine/upstream its connections.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_NAT64_LOCAL: Final = ipaddress.ip_network("64:ff9b:1::/48")
_MAX_ADDRESSES: Final = 8  # of one name: those after are not tried
MAX_URL: Final = 2_000


class RefusedAddressError(ValueError):
    """The address must not be called, or the URL is none that may be; the message says what would be right."""


class CallFailedError(Exception):
    """No answer: the name does not resolve, nobody listens, TLS failed, or it took too long."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads, as far as the text says."""

    scheme: str
    host: str
    port: int
    path: str


def allowed_networks(text: str) -> tuple[Network, ...]:
    """The operator's list: networks or addresses, separated by commas. Raises ValueError naming the one at fault."""
    found: list[Network] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(ipaddress.ip_network(part, strict=False))
        except ValueError:
            raise ValueError(f"{part!r} is no network: write for example 10.0.0.0/8") from None
    return tuple(found)


def target(url: str) -> Target:
    """The parts of an http(s) URL. Raises RefusedAddressError: other schemes, user names, no host, bad port."""
    if len(url) > MAX_URL or any(ord(c) <= 32 or ord(c) == 127 for c in url):
        raise RefusedAddressError(f"send a URL of at most {MAX_URL} characters without spaces")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RefusedAddressError("that is no URL: write for example https://example.org/hook") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RefusedAddressError("that is no http or https URL: write for example https://example.org/hook")
    if parts.username is not None or parts.password is not None:
        raise RefusedAddressError("leave out user name and password: they would be shown and logged")
    try:
        host = parts.hostname.encode("idna").decode()
    except UnicodeError:
        raise RefusedAddressError("the host name is none") from None
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path)


def why_not(address: str | Address, allowed: Sequence[Network] = ()) -> str | None:
    """What speaks against this address; None: it may be called."""
    found = ipaddress.ip_address(address.split("%", 1)[0]) if isinstance(address, str) else address
    inner = _inner(found)
    for each in (found, inner):
        if any(each.version == network.version and each in network for network in allowed):
            return None
    for each in (found, inner):
        if not each.is_global or each.is_multicast:
            return f"{found} is not a public address"
    return None


def resolve(host: str, port: int, allowed: Sequence[Network] = ()) -> list[str]:
    """Addresses behind a name that may be called. Raises CallFailedError, RefusedAddressError where none may."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        raise CallFailedError(f"the name {host[:100]} does not resolve") from error
    return judged((str(entry[4][0]) for entry in found), host, allowed)


async def aresolve(
    host: str, port: int, allowed: Sequence[Network] = (), timeout_s: float = 5.0
) -> list[str]:
    """The same on an event loop."""
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(timeout_s):
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    except (OSError, UnicodeError, TimeoutError) as error:
        raise CallFailedError(f"the name {host[:100]} does not resolve") from error
    return judged((str(entry[4][0]) for entry in found), host, allowed)


def judged(addresses: Iterable[str], host: str, allowed: Sequence[Network] = ()) -> list[str]:
    """Those that may be called, in the order given. Raises RefusedAddressError where none may."""
    unique = list(dict.fromkeys(addresses))[:_MAX_ADDRESSES]
    reasons = {address: why_not(address, allowed) for address in unique}
    good = [address for address, reason in reasons.items() if reason is None]
    if not good:
        reason = next(iter(reasons.values()), None) or "no address"
        raise RefusedAddressError(
            f"{host[:100]}: {reason}; an operator can allow it with CORRAL_OUTBOUND_ALLOW"
        )
    return good


def _inner(address: Address) -> Address:
    """The IPv4 address that an IPv6 one leads to, or the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in _NAT64 or address in _NAT64_LOCAL or int(address) < 1 << 32:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address
