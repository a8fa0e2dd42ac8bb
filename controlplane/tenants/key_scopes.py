"""What an API key is bound to: which routes of /v1, which models, from which networks. None = not bound.

Written by services, read by gateways from the record they cache. Imports no Django: the gateway uses it. What a model
scope leaves out does not exist for the key; the other two refuse.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_MODELS: Final = 256
MAX_RANGES: Final = 64
MAX_ALIASES: Final = 256
MAX_TAGS: Final = 32
MAX_TAG: Final = 64
# A deployment's name, or `OWNER/NAME` of a shared one; `*` at the end stands for any rest.
_MODEL: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,127}\*?\Z|\*\Z")


class Route(StrEnum):
    """Parts of /v1 that a key can be bound to."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    MODELS = "models"
    REQUESTS = "requests"

    @property
    def paths(self) -> str:
        return _PATHS[self]


_PATHS: Final = {
    Route.CHAT: "POST /v1/chat/completions, /v1/messages (and its count_tokens) and /v1/responses",
    Route.COMPLETIONS: "POST /v1/completions",
    Route.MODELS: "GET /v1/models",
    Route.REQUESTS: "GET /v1/requests/…/events",
}


@dataclass(frozen=True, slots=True)
class KeyScopes:
    """The scopes of one key. An empty list allows nothing."""

    routes: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None  # names; `acme/*` means all that begin so
    ip_ranges: tuple[str, ...] | None = None  # CIDR, or one address

    def problems(self) -> Iterator[tuple[str, str]]:
        """(field, sentence) of each value that is none."""
        for n, route in enumerate(self.routes or ()):
            if route not in list(Route):
                known = ", ".join(Route)
                yield f"scopes.routes.{n}", f"{_shown(route)} is no route of /v1: use some of {known}"
        for n, model in enumerate(self.models or ()):
            if not _MODEL.match(model):
                yield (
                    f"scopes.models.{n}",
                    f"{_shown(model)} is no model's name: use a deployment's name, OWNER/NAME of a shared one, or the "
                    "beginning of names with * at its end",
                )
        for n, text in enumerate(self.ip_ranges or ()):
            try:
                network_of(text)
            except ValueError as error:
                yield f"scopes.ip_ranges.{n}", f"{error}: use an address or a CIDR such as 203.0.113.0/24"
        for name, values, most in (
            ("routes", self.routes, len(Route)),
            ("models", self.models, MAX_MODELS),
            ("ip_ranges", self.ip_ranges, MAX_RANGES),
        ):
            if values is not None and len(values) > most:
                yield f"scopes.{name}", f"{len(values)} entries: give {most} at most"

    def as_json(self) -> dict[str, list[str]] | None:
        """As it is stored: only what binds, ranges in their usual form; None where nothing does."""
        ranges = None if self.ip_ranges is None else [str(network_of(text)) for text in self.ip_ranges]
        found = {"routes": self.routes, "models": self.models, "ip_ranges": ranges}
        stored = {name: list(dict.fromkeys(values)) for name, values in found.items() if values is not None}
        return stored or None

    @classmethod
    def from_json(cls, stored: Any) -> KeyScopes:
        """The scopes of a row."""
        if not stored:
            return NO_SCOPES
        return cls(*(tuple(stored[name]) if name in stored else None for name in _FIELDS))


_FIELDS: Final = ("routes", "models", "ip_ranges")
NO_SCOPES: Final = KeyScopes()


def check_aliases(aliases: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(field, sentence) of each name that is none, and where there are too many."""
    if len(aliases) > MAX_ALIASES:
        yield "aliases", f"{len(aliases)} entries: give {MAX_ALIASES} at most"
    for name in (name for pair in aliases.items() for name in pair):
        if not _MODEL.match(name) or name.endswith("*"):
            yield "aliases", f"{_shown(name)} is no model's name: map one name to that of a deployment"


def check_tags(tags: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(field, sentence) of each tag that is none, and where there are too many."""
    if len(tags) > MAX_TAGS:
        yield "tags", f"{len(tags)} entries: give {MAX_TAGS} at most"
    for n, tag in enumerate(tags):
        if not 1 <= len(tag.strip()) <= len(tag) <= MAX_TAG or not tag.isprintable():
            yield f"tags.{n}", f"{_shown(tag)}: give 1 to {MAX_TAG} printable characters"


def network_of(text: str) -> Network:
    """An address or a range; an IPv4 one written as IPv6 counts as IPv4. ValueError names what is wrong."""
    try:
        network = ipaddress.ip_network(text.strip(), strict=True)
    except ValueError:
        try:
            wider = ipaddress.ip_network(text.strip(), strict=False)
        except ValueError:
            raise ValueError(f"{_shown(text)} is no IP range") from None
        raise ValueError(f"{_shown(text)} names an address inside the range {wider}") from None
    if network.version == 6 and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


@lru_cache(maxsize=4096)  # of clients, the same few
def address_of(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address in `203.0.113.7`, `203.0.113.7:4711`, `[2001:db8::1]:4711` or `2001:db8::1%eth0`; None for none."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = getattr(address, "ipv4_mapped", None)
    return address if mapped is None else mapped


def allows(patterns: Iterable[str], name: str) -> bool:
    """Whether a model of this name is in scope."""
    return any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns
    )


def _shown(text: str) -> str:
    return repr(text[:80])
