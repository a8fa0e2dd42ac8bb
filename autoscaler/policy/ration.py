"""Who gets how many replicas when money or machines do not reach for all.

First every tenant is held to what its own money lasts for; inside a tenant the least valuable replicas go first. Then,
if the cell's caps do not reach, each tenant that has money is given its share before anybody gets more; what is over
goes by priority class, then by value for money. Called by fleet.py between what deployments want and what they may.
Pure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Demand:
    """A deployment's wish. `priority`: higher classes first. `value_usd_per_h`: what one replica earns or is worth.

    The first `n_least` replicas (what the owner asked to stand always) come before any other of its class.
    """

    deployment: str
    tenant: str
    n_wanted: int
    usd_per_replica_h: float
    priority: int = 0
    value_usd_per_h: float = 0.0
    n_least: int = 0

    def __post_init__(self) -> None:
        if self.n_wanted < 0 or self.n_least < 0 or self.usd_per_replica_h < 0:
            raise ValueError(f"demand of {self.deployment}: numbers and price must not be negative")


@dataclass(frozen=True, slots=True)
class Purse:
    """A tenant's means. usd_left None: no budget set. `share`: its weight among tenants, more than 0."""

    tenant: str
    usd_left: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        if self.share <= 0:
            raise ValueError(f"purse of {self.tenant}: share = {self.share}: set more than 0")


@dataclass(frozen=True, slots=True)
class Caps:
    """The cell's limits (None: none). horizon_h: a tenant may spend at most what lasts that long."""

    usd_per_h: float | None = None
    n_replicas: int | None = None
    horizon_h: float = 1.0


@dataclass(frozen=True, slots=True)
class Rationed:
    """Replicas by deployment; a sentence for each that gets fewer than it wants."""

    n: Mapping[str, int]
    reasons: tuple[str, ...] = ()


@dataclass(slots=True)
class _Unit:
    """One replica of a demand."""

    demand: Demand
    index: int

    @property
    def rank(self) -> tuple[int, bool, float, str, int]:
        """Sorts: first is granted first. Free replicas (price 0) are the best value there is."""
        d = self.demand
        per_usd = d.value_usd_per_h / d.usd_per_replica_h if d.usd_per_replica_h else float("inf")
        return (-d.priority, self.index >= d.n_least, -per_usd, d.deployment, self.index)


def ration(demands: Iterable[Demand], purses: Iterable[Purse], caps: Caps) -> Rationed:
    """Grants that keep every limit. Tenants without a purse have no budget and a share of 1."""
    wanted = sorted(demands, key=lambda d: d.deployment)
    known = {p.tenant: p for p in purses}
    of_tenant: dict[str, list[_Unit]] = defaultdict(list)
    why: dict[str, str] = {}
    for demand in wanted:
        of_tenant[demand.tenant] += [_Unit(demand, i) for i in range(demand.n_wanted)]
    for tenant, units in of_tenant.items():
        units.sort(key=lambda u: u.rank)
        purse = known.get(tenant, Purse(tenant))
        if purse.usd_left is not None:
            rate = max(purse.usd_left, 0.0) / caps.horizon_h if purse.usd_left > 0 else -1.0
            words = f"{tenant} has {max(purse.usd_left, 0.0):.2f} USD left for {caps.horizon_h:g} h"
            of_tenant[tenant] = _within(units, rate, None, why, words)
    granted = _within_caps(of_tenant, known, caps, why)
    n: dict[str, int] = {d.deployment: 0 for d in wanted}
    for unit in granted:
        n[unit.demand.deployment] += 1
    reasons = [
        f"{d.deployment}: {n[d.deployment]} of {d.n_wanted} replicas, {why.get(d.deployment, 'limits')}"
        for d in wanted
        if n[d.deployment] < d.n_wanted
    ]
    return Rationed(n, tuple(reasons))


def _within(
    units: list[_Unit], usd_per_h: float | None, n_most: float | None, why: dict[str, str], words: str
) -> list[_Unit]:
    """Best first, as many as fit; a replica that does not fit ends its deployment, not the others."""
    kept: list[_Unit] = []
    spent = 0.0
    over: set[str] = set()  # deployments
    for unit in units:
        d = unit.demand
        fits_money = usd_per_h is None or (usd_per_h >= 0 and spent + d.usd_per_replica_h <= usd_per_h + 1e-9)
        fits_number = n_most is None or len(kept) + 1 <= n_most + 1e-9
        if d.deployment in over or not fits_money or not fits_number:
            over.add(d.deployment)
            why[d.deployment] = words
            continue
        kept.append(unit)
        spent += d.usd_per_replica_h
    return kept


def _within_caps(
    of_tenant: Mapping[str, list[_Unit]], known: Mapping[str, Purse], caps: Caps, why: dict[str, str]
) -> list[_Unit]:
    if caps.usd_per_h is None and caps.n_replicas is None:
        return [u for units in of_tenant.values() for u in units]
    asking = {t: known.get(t, Purse(t)).share for t, units in sorted(of_tenant.items()) if units}
    all_shares = sum(asking.values())
    granted: list[_Unit] = []
    rest: list[_Unit] = []
    for tenant, share in asking.items():
        part = share / all_shares
        mine = _within(
            of_tenant[tenant],
            None if caps.usd_per_h is None else caps.usd_per_h * part,
            None if caps.n_replicas is None else caps.n_replicas * part,
            {},
            "",
        )
        granted += mine
        have = {id(u) for u in mine}
        rest += [u for u in of_tenant[tenant] if id(u) not in have]
    spent = sum(u.demand.usd_per_replica_h for u in granted)
    rest.sort(key=lambda u: u.rank)
    words = "the cell's limits: its tenant's share is granted, the rest goes by class and value"
    granted += _within(
        rest,
        None if caps.usd_per_h is None else max(caps.usd_per_h - spent, 0.0),
        None if caps.n_replicas is None else max(caps.n_replicas - len(granted), 0),
        why,
        words,
    )
    return granted
