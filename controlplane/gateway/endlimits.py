"""Limits on the end customers of a project as the admission script takes them: a level below the key, for requests
that name a customer. Called by the key cache (once per key and half minute) and by admission; a project without any has
None. While there are several cells a customer's money is leased to them: asked for where a request needs it, kept
beside the customer's counters, given back by endcustomers/leases.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from billing.money import Nano
from controlplane.gateway import directory, errors
from controlplane.gateway.directory import EndCustomerRow, KeyDirectory, Limits
from controlplane.policy.shares import scaled
from workers import scripts
from workers.keys import CellKeys
from workers.redis_client import Client

_NO_WEIGHT: Final = 0  # the fair queue knows no end customers
# After a lease that was less than a request needed, nobody of this cell asks for that customer again so soon.
_DRY_MS: Final = 2_000
# Others may take what was leased for a request before it does: so often it asks, then it takes what there is.
_MOST_ASKED: Final = 4
_TAKEN_MS: Final = 50
# id, rpm, input_tpm, output_tpm, max_concurrency, budget_nano, weight, 1 if it is leased
Scope = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class EndLimits:
    """Of one project. `each`: by pseudonym, `others`: of who is not in it, None for no limits. `leased`: there are
    several cells, and money is leased."""

    project: str
    others: Limits | None
    each: dict[str, Limits]
    budgeted: bool
    leased: bool = False

    @property
    def n_seeds(self) -> int:
        """How often at most a request asks what its customer has spent, or may spend here."""
        return _MOST_ASKED if self.leased else 1

    def scope(self, customer: str) -> Scope | None:
        """What is taken for this customer; None where nothing limits it, or none is named."""
        limits = self.each.get(customer, self.others)
        if limits is None or not customer:
            return None
        leased = (1,) if self.leased and limits[4] >= 0 else ()
        return (f"{self.project}.{customer}", *limits, _NO_WEIGHT, *leased)


def of(rows: Iterable[EndCustomerRow], project: str, share_ppm: int | None) -> EndLimits | None:
    """From a key's record. `share_ppm`: this cell's share of its tenant's limits, None where it is the only cell."""
    each = {row.customer: _part(row.limits.values(), share_ppm) for row in rows}
    if not each:
        return None
    others = each.pop("", None)
    budgeted = any(limits[4] >= 0 for limits in (*each.values(), *([others] if others else [])))
    return EndLimits(project, others, each, budgeted, share_ppm is not None)


def _part(limits: Limits, share_ppm: int | None) -> Limits:
    """This cell's part: of each rate in proportion, but at least one, or who has few would be served nowhere."""
    if share_ppm is None:
        return limits
    rates = (scaled(limit, share_ppm) or min(limit, 1) for limit in limits[:4])
    return (*rates, limits[4])  # type: ignore[return-value]


def argument(scope: Scope, windows: tuple[list[msgspec.Raw], ...]) -> tuple[dict[str, Any]]:
    """The script's last argument, with the window budgets in it."""
    return ({"e": scope, "w": windows[0]} if windows else {"e": scope},)


async def seed(
    redis: Client,
    keys: CellKeys,
    ledger: KeyDirectory,
    name: str,
    need: Nano,
    *,
    leased: bool,
    last: bool = False,
) -> None:
    """Tell this cell's Redis what a customer (by its scope's id) has spent, and, where money is leased, have what a
    request needs. `last`: it does not ask again. Raises DirectoryUnavailable and RedisError."""
    project, _, customer = name.partition(".")
    asked_ms = time.time_ns() // 1_000_000
    if not leased:
        spent = await ledger.spent_for_nano(project, customer)
        await redis.evalsha(scripts.SEED, (), (keys.prefix, "end", name, spent, asked_ms))
        return
    known = await redis.call("HMGET", keys.limits("end", name), "spent", "held")
    used, held = (int(value or 0) for value in known)
    lease = await ledger.lease_end(project, customer, used=Nano(used + held), idle=held == 0, need=need)
    if lease.left_ms <= 0:  # no share of the tenant's limits: the key is about to be read again
        raise directory.DirectoryUnavailable
    left = lease.granted - max(lease.spent, used) - held
    args = (
        keys.prefix,
        "end",
        name,
        lease.spent,
        asked_ms,
        lease.granted,
        asked_ms + lease.left_ms,
        asked_ms + _DRY_MS if left < need else time.time_ns() // 1_000_000 + _TAKEN_MS if last else 0,
        lease.elsewhere,
    )
    await redis.evalsha(scripts.SEED, (), args)


def refusal(limit: bytes, scope: bytes, retry_ms: int) -> errors.ApiError:
    """429 of a customer whose money is used up (-1), or for the moment with another cell."""
    own = ((b"x-corral-limit", limit), (b"x-corral-scope", scope))
    if retry_ms < 0:
        return errors.ApiError(
            429,
            "insufficient_quota",
            "the budget of this end customer is used up: an owner, admin or billing member can raise it",
            type_="insufficient_quota",
            headers=((b"x-should-retry", b"false"), *own),
        )
    return errors.ApiError(
        429,
        "insufficient_quota",
        "what is left of the budget of this end customer is with another cell for the moment: try again in "
        f"{retry_ms / 1000:.3g} s, or ask an owner, admin or billing member to raise it",
        type_="insufficient_quota",
        retry_after_s=retry_ms / 1000,
        headers=own,
    )
