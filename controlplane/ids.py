"""Identifiers: UUIDv7 inside, `<prefix>_<32 hex>` on the API, bare 32 hex in Redis and on the wire.

Everything that names or reads an id calls this module. It imports no Django, so the gateway and scripts use
it too. A UUIDv7 starts with its creation time in milliseconds, which is what partitions usage by day.
"""

import re
from datetime import UTC, date, datetime
from enum import StrEnum
from uuid import UUID

from uuid_utils.compat import uuid7

_HEX = re.compile(r"[0-9a-f]{32}\Z")


class Prefix(StrEnum):
    """What an id names; the part before the underscore on the API."""

    ORGANIZATION = "org"
    PROJECT = "prj"
    MEMBER = "mem"
    USER = "usr"
    INVITATION = "inv"
    DOMAIN = "dom"
    IDENTITY_PROVIDER = "idp"
    SCIM_TOKEN = "sct"  # noqa: S105 - names ids, is none
    SCIM_USER = "scu"
    SCIM_GROUP = "scg"
    API_KEY = "key"
    SERVICE_ACCOUNT = "svc"
    MANAGEMENT_TOKEN = "tok"  # noqa: S105 - names ids, is none
    MODEL_VERSION = "mdl"
    ADAPTER = "ada"
    DEPLOYMENT = "dep"
    REPLICA = "rep"
    MACHINE = "mch"
    DECISION = "dec"
    REQUEST = "req"
    PRICE_VERSION = "prc"
    EXPORT = "exp"
    ERASURE = "era"
    SLO_RULE = "slo"
    SLO_ALERT = "alr"
    OPERATION = "opn"
    GRANT = "grt"
    BUDGET = "bud"
    WEBHOOK = "whk"
    EVENT = "evt"
    DELIVERY = "dlv"
    QUOTA = "quo"
    ENGINE_PROFILE = "epr"
    ROLLOUT = "rlo"
    UPSTREAM = "ups"
    END_CUSTOMER_LIMITS = "ecl"


class InvalidIdError(ValueError):
    """The text is no id of the kind that was asked for; the message says what it should look like."""


def new_id() -> UUID:
    """A fresh UUIDv7: unique, and sorted by creation time to the millisecond."""
    return uuid7()


def to_text(prefix: Prefix, value: UUID) -> str:
    """The API form, for example `dep_0193f2…`."""
    return f"{prefix.value}_{value.hex}"


def from_text(prefix: Prefix, text: str) -> UUID:
    """The id behind an API form. Raises InvalidIdError, whose message names the expected shape."""
    head, _, tail = text.partition("_")
    if head != prefix.value or not _HEX.match(tail):
        raise InvalidIdError(f"expected an id of the form {prefix.value}_<32 hex digits>, got {text[:48]!r}")
    return UUID(hex=tail)


def from_wire(text: str) -> UUID:
    """The id behind the bare 32-hex form used in Redis and on the wire. Raises InvalidIdError."""
    if not _HEX.match(text):
        raise InvalidIdError(f"expected 32 lower-case hex digits, got {text[:48]!r}")
    return UUID(hex=text)


def created_ms(value: UUID) -> int:
    """Milliseconds since the epoch at which a UUIDv7 was made (its first 48 bits). Raises InvalidIdError."""
    if value.version != 7:
        raise InvalidIdError(f"expected a UUIDv7, got version {value.version}: {value}")
    return value.int >> 80


def day_of(value: UUID) -> date:
    """The UTC day a UUIDv7 was made: the partition of its usage event."""
    return datetime.fromtimestamp(created_ms(value) / 1000, tz=UTC).date()
