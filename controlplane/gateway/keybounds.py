"""What a key's scopes mean to a request: the networks and routes they allow, and the models that exist for it.

Built once per cached key (keycontext.py), asked by the app after the key was found good. A key that is bound to
nothing has no `Bounds`, so the common request pays one comparison.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from controlplane.gateway.directory import ScopesRow
from controlplane.gateway.errors import ApiError
from controlplane.tenants.key_scopes import Network, Route, address_of, allows, network_of

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Bounds:
    """Routes and networks of one key; None = not bound in that respect."""

    routes: frozenset[str] | None
    networks: tuple[Network, ...] | None

    def check(self, route: Route, scope: Mapping[str, Any], trusted: tuple[Network, ...]) -> None:
        """Nothing, or ApiError 403. `scope` is the request's, `trusted` the proxies that are believed."""
        if self.networks is not None:
            address = client_of(scope, trusted)
            if address is None or not _is_in(address, self.networks):
                raise _refused(
                    "ip_ranges",
                    f"this API key may not be used from {address or 'an unknown address'}: call from a network in its "
                    "scope, or have that address added to the key's scopes.ip_ranges",
                )
        if self.routes is not None and route.value not in self.routes:
            allowed = ", ".join(sorted(self.routes)) or "nothing"
            raise _refused(
                "routes",
                f"this API key may not be used for {route.paths} (route {route.value!r}), only for: {allowed}; use "
                "another key, or have the route added to this key's scopes.routes",
            )


def bounds_of(row: ScopesRow) -> Bounds | None:
    """None where the key may be used from anywhere, for everything."""
    if row.routes is None and row.ip_ranges is None:
        return None
    networks = None if row.ip_ranges is None else tuple(network_of(text) for text in row.ip_ranges)
    return Bounds(None if row.routes is None else frozenset(row.routes), networks)


def callable_names(
    served: Iterable[str], models: tuple[str, ...] | None, aliases: Mapping[str, str]
) -> dict[str, str]:
    """{name a request may use: name of the deployment}. An alias is in scope where its deployment is, or itself; it
    never hides a deployment of that name."""
    served = set(served)
    found = {name: name for name in served if models is None or allows(models, name)}
    for alias, name in aliases.items():
        if name in served and alias not in served and (name in found or allows(models or (), alias)):
            found[alias] = name
    return found


def client_of(scope: Mapping[str, Any], trusted: tuple[Network, ...]) -> Address | None:
    """Who sent the request: the peer, or, where that is a proxy we trust, the last hop before it that is none.

    None where it cannot be told; an X-Forwarded-For from anybody else is not read.
    """
    peer = scope.get("client")
    address = None if peer is None else address_of(str(peer[0]))
    if address is None or not trusted or not _is_in(address, trusted):
        return address
    hops = [
        hop
        for name, value in scope["headers"]
        if name == b"x-forwarded-for"
        for hop in value.decode("latin-1").split(",")
    ]
    for hop in reversed(hops):
        address = address_of(hop)
        if address is None or not _is_in(address, trusted):
            return address
    return address


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def _refused(scope: str, message: str) -> ApiError:
    return ApiError(403, "key_scope", message, param=f"scopes.{scope}")
