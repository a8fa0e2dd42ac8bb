"""Seals under the present secret key what is sealed under a former one, so that the former one can end.

Every place where a box of secretbox.py lies is listed here; a test compares that with the code that seals. Called by
`manage.py reseal`, as operator; may run at any time, beside everything, and twice. What was changed meanwhile is left
as it is: whoever changed it sealed it under the present key, or the next run finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import structlog
from allauth.mfa.models import Authenticator
from django.db import models, transaction

from controlplane import secretbox
from controlplane.identity import adapters, providers
from controlplane.identity.models import IdentityProvider
from controlplane.tenants.actor import act_as
from controlplane.upstreams import services as upstreams
from controlplane.upstreams.models import UpstreamSecrets
from controlplane.webhooks import services as webhooks
from controlplane.webhooks.models import EndpointState

log = structlog.get_logger("corral.resealing")


@dataclass(frozen=True, slots=True)
class Place:
    """One column with boxes of one purpose. `renew` answers its value with new boxes, or None where it has none to
    renew; it raises SealError."""

    model: type[models.Model]
    column: str
    purpose: str
    renew: Callable[[Any, str], Any]


@dataclass(frozen=True, slots=True)
class Resealed:
    """`n_lost`: what no key that we hold opens; those secrets must be made anew."""

    n_renewed: int = 0
    n_lost: int = 0


def reseal() -> Resealed:
    """All of it. Rows that cannot be opened are counted and left."""
    n_renewed = n_lost = 0
    for place in PLACES:
        for key, value in _values(place):
            try:
                renewed = place.renew(value, place.purpose)
            except secretbox.SealError:
                log.warning("reseal.lost", table=place.model._meta.label, row=str(key))
                n_lost += 1
                continue
            if renewed is not None and _swap(place, key, value, renewed):
                n_renewed += 1
    log.info("reseal.done", n_renewed=n_renewed, n_lost=n_lost)
    return Resealed(n_renewed, n_lost)


def _values(place: Place) -> Iterator[tuple[Any, Any]]:
    rows = place.model._default_manager.exclude(**{f"{place.column}__isnull": True}).order_by("pk")
    yield from rows.values_list("pk", place.column).iterator(chunk_size=500)


def _swap(place: Place, key: Any, before: Any, after: Any) -> bool:
    """Compare and set."""
    with transaction.atomic():
        act_as("reseal")
        rows = place.model._default_manager.filter(pk=key, **{place.column: before})
        return bool(rows.update(**{place.column: after}))


def _box(value: Any, purpose: str) -> bytes | None:
    """A column that is a box, or empty."""
    return secretbox.resealed(bytes(value), purpose=purpose) if value else None


def _second_factor(data: dict[str, Any], purpose: str) -> dict[str, Any] | None:
    """allauth's data of an authenticator: the seed of an app or of recovery codes, or codes one by one; hex."""

    def renew(text: str) -> str | None:
        box = secretbox.resealed(bytes.fromhex(text), purpose=purpose)
        return None if box is None else box.hex()

    renewed: dict[str, Any] = {}
    for name in ("secret", "seed"):
        if name in data and (fresh := renew(data[name])) is not None:
            renewed[name] = fresh
    if codes := data.get("migrated_codes"):
        fresh_codes = [renew(each) for each in codes]
        if any(each is not None for each in fresh_codes):
            renewed["migrated_codes"] = [
                fresh or each for fresh, each in zip(fresh_codes, codes, strict=True)
            ]
    return {**data, **renewed} if renewed else None


PLACES: Final = (
    Place(IdentityProvider, "secret", providers.SECRET, _box),
    Place(EndpointState, "sealed_secret", webhooks.PURPOSE, _box),
    Place(EndpointState, "sealed_secret_before", webhooks.PURPOSE, _box),
    Place(UpstreamSecrets, "sealed_secret", upstreams.PURPOSE, _box),
    Place(Authenticator, "data", adapters.SECOND_FACTOR, _second_factor),
)
