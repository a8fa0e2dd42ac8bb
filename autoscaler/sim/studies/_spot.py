"""What the studies of spot machines share: buyers on a recorded market alone, and what each is compared with.

No requests here: a demand in machines, a market, a buyer; cost over the oracle's and the share of time with enough.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from autoscaler.policy.spot import SpotSpec
from autoscaler.sim import scenario
from autoscaler.sim.buyers import AnyZoneElseOnDemand, Corral, Heeding, OnDemandOnly, SpotHedge, SpotOnly
from autoscaler.sim.fleet import Buyer, Fleet, Terms
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.market import Steps, Zone
from autoscaler.sim.oracle import bound_of
from autoscaler.sim.policies import CORRAL
from autoscaler.sim.scenario import Result, Setting
from autoscaler.sim.statistics import Interval, interval
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies.base import Cell, Column, Goal

AVAILABILITY: Final = 0.999
RATIO_GOAL: Final = 1.15
MAIN: Final = "availability 1-node aws-02-15-2023, v100_1"
RIVALS: Final[dict[str, dict[str, Callable[[], Buyer]]]] = {
    "any-zone": {
        f"any-zone:n_extra={n}": lambda n=n: AnyZoneElseOnDemand(n)  # type: ignore[misc]
        for n in (0, 1, 2, 4)
    },
    "spothedge": {f"spothedge:n_extra={n}": lambda n=n: SpotHedge(n) for n in (1, 2, 4)},  # type: ignore[misc]
}
HEEDING: Final = "any-zone:heeds_notice=1"
WARM_S: Final = 1950.0  # not counted of a run with requests: whole ticks of the recording
# The oracle's tick where demand moves by the quarter minute: a fifth of the recording's.
_FINE_S: Final = 39.0
SPOT_ONLY: Final = "spot-only"


@dataclass(frozen=True, slots=True)
class Paid:
    """One window under one buyer: cost over the oracle's, and the share of time with enough machines."""

    ratio: float
    availability: float


def terms(notice_s: float, boot_s: float) -> Terms:
    """The market's assumptions of a study of machines alone."""
    return Terms(boot_s, notice_s, given.ON_DEMAND_USD_PER_H, tick_s=60)


def least_usd(
    zones: tuple[Zone, ...], terms: Terms, wanted: Steps, length_s: float, *, covered: bool = False
) -> float:
    """What the oracle pays; `covered`: one that at every tick holds enough without any one zone."""
    setting = Setting(given.engine(), given.SLOTS, 0, given.TTFT_S, zones, terms, until_s=length_s)
    return bound_of(setting, wanted, AVAILABILITY, covered=covered).usd


def bought(
    buyer: Buyer, zones: tuple[Zone, ...], terms: Terms, wanted: Steps, length_s: float, least: float
) -> Paid:
    """One window under one buyer."""
    kernel = Kernel()
    fleet = Fleet(kernel, zones, terms, buyer, wanted, length_s)
    kernel.run(until_s=length_s)
    fleet.close()
    return Paid(fleet.usd / least, fleet.availability)


@dataclass(frozen=True, slots=True)
class Demanded:
    """One window with requests: its setting, the run on on-demand machines with the production scaler, what that scaler
    wished for (all others must meet it), and what the oracle pays for the part that counts."""

    setting: Setting
    on_demand: Result
    wanted: Steps
    least_usd: float


def demanded(load: given.Load, market: given.Market, at: Terms, seed: int, length_s: float) -> Demanded:
    zones = market.window(seed, length_s)
    setting = Setting(
        given.engine(), given.SLOTS, 0, given.TTFT_S, zones, at, until_s=length_s, warm_s=WARM_S
    )
    on_demand = scenario.run(
        setting,
        replace(CORRAL, buyer=lambda s: OnDemandOnly()),
        load.jobs(seed, length_s),
        label=f"{load.name}, on-demand, seed {seed}",
    )
    assert on_demand.demand is not None
    wanted = on_demand.demand
    # Counted from the warm-up's end, as the runs are; the oracle has all it needs by then.
    counted = replace(
        setting,
        zones=tuple(zone.window(WARM_S, length_s - WARM_S) for zone in zones),
        until_s=length_s - WARM_S,
    )
    later = Steps(tuple(at_s - WARM_S for at_s in wanted.at_s), wanted.values)
    return Demanded(setting, on_demand, wanted, bound_of(counted, later, AVAILABILITY, _FINE_S).usd)


def machines_alone(zones: tuple[Zone, ...], terms: Terms, wanted: Steps, length_s: float) -> dict[str, Paid]:
    """Every buyer on one window and demand, by name."""
    least = least_usd(zones, terms, wanted, length_s)
    buyers: dict[str, Buyer] = {
        "corral": Corral(SpotSpec(terms.boot_s, terms.notice_s, AVAILABILITY)),
        "on-demand": OnDemandOnly(),
        HEEDING: Heeding(AnyZoneElseOnDemand()),
        SPOT_ONLY: SpotOnly(),
    }
    for rival in RIVALS.values():
        buyers |= {name: make() for name, make in rival.items()}
    return {name: bought(buyer, zones, terms, wanted, length_s, least) for name, buyer in buyers.items()}


def equal(found: Mapping[str, list[Paid]], rival: str) -> tuple[str, bool]:
    """(the rival's setting to compare with, whether it reaches): the cheapest that is as available as asked, or, if
    ours is less, as ours; where none is, the most available one."""
    asked = min(AVAILABILITY, mean(found["corral"], "availability"))
    names = [name for name in RIVALS[rival] if name in found]
    reaching = [name for name in names if mean(found[name], "availability") >= asked]
    if reaching:
        return min(reaching, key=lambda name: mean(found[name], "ratio")), True
    return max(names, key=lambda name: mean(found[name], "availability")), False


def mean(paid: Sequence[Paid], figure: str) -> float:
    return statistics.fmean(getattr(p, figure) for p in paid)


COLUMNS: Final = (
    Column("corral × oracle", "{:.3f}"),
    Column("available", "{:.3%}"),
    Column("any-zone × oracle", "{:.3f}"),
    Column("available", "{:.2%}"),
    Column("any-zone as available"),
    Column("SpotHedge × oracle", "{:.3f}"),
    Column("available", "{:.2%}"),
    Column("SpotHedge as available"),
    Column("any-zone that heeds notices"),
    Column("on-demand × oracle", "{:.2f}"),
)


def market_row(found: Mapping[str, list[Paid]]) -> list[Cell]:
    def of(name: str, figure: str) -> Interval:
        return interval([getattr(paid, figure) for paid in found[name]])

    cells: list[Cell] = [of("corral", "ratio"), of("corral", "availability")]
    for rival, plain in (("any-zone", "any-zone:n_extra=0"), ("spothedge", "spothedge:n_extra=1")):
        name, reaches = equal(found, rival)
        knob = name.rpartition("=")[2]
        ratio, available = of(name, "ratio").mean, of(name, "availability").mean
        cells += [of(plain, "ratio"), of(plain, "availability").mean]
        cells.append(
            f"{ratio:.2f} (+{knob})" if reaches else f"none ({available:.2%} at {ratio:.2f}, +{knob})"
        )
    heeding = of(HEEDING, "ratio").mean, of(HEEDING, "availability").mean
    cells.append(f"{heeding[0]:.3f} at {heeding[1]:.3%}")
    cells.append(of("on-demand", "ratio").mean)
    return cells


def cheaper(
    rival: str,
    everywhere: Mapping[str, Mapping[str, list[Paid]]],
    where: str = "",
    *,
    only_equal: bool = False,
) -> Goal:
    """Saved against the rival's setting that is as available, per window the mean over all markets; or over those where
    it has such a setting."""
    saved: dict[str, list[float]] = {}
    n_reaching = 0
    for market, found in everywhere.items():
        chosen, reaches = equal(found, rival)
        n_reaching += reaches
        if reaches or not only_equal:
            saved[market] = [
                r.ratio - own.ratio for r, own in zip(found[chosen], found["corral"], strict=True)
            ]
    claim = (
        f"{where}cheaper than {rival} at equal availability (paired, in the oracle's cost, mean over markets)"
    )
    told = f"as available on {n_reaching} of {len(everywhere)} markets"
    if not saved:
        return Goal(claim, f"no setting of it is {told}", is_met=True, why="nothing to compare with")
    overall = interval([statistics.fmean(window) for window in zip(*saved.values(), strict=True)])
    not_there = [
        f"{market} ({statistics.fmean(values):+.3f})"
        for market, values in saved.items()
        if statistics.fmean(values) <= 0
    ]
    return Goal(
        claim,
        f"{overall.mean:+.3f} ± {overall.half:.3f}; {told}"
        f"{', those' if only_equal else ', elsewhere against its most available setting'}",
        overall.low > 0,
        f"not on {', '.join(not_there)}: there the rival is less available or hardly anything is lost"
        if not_there
        else "",
    )
