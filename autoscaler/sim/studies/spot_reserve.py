"""Spot machines where a notice is shorter than a start, with on-demand machines that lie stopped to stand in: what that
costs against the oracle, and against the same buyer without them (study spot-cover tells what it does then)."""

from __future__ import annotations

import math
import statistics
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.buyers import Corral
from autoscaler.sim.fleet import Terms
from autoscaler.sim.market import Steps, Zone
from autoscaler.sim.policies import CORRAL
from autoscaler.sim.scalers import Replay
from autoscaler.sim.scenario import Result
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies._spot import (
    AVAILABILITY,
    MAIN,
    RATIO_GOAL,
    Paid,
    bought,
    demanded,
    least_usd,
    terms,
)
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table

HELP = "spot markets whose notice is shorter than a start: what a reserve of stopped machines saves"
_NOTICE_S: Final = 120.0
_BOOT_S: Final = 180.0
_RESUME_S: Final = 120.0
# Notice, boot, machines a zone, and how long a stopped machine takes to serve.
_SIX_ZONES: Final = (
    (_NOTICE_S, _BOOT_S, 16, _RESUME_S),
    (_NOTICE_S, _BOOT_S, 16, 150.0),
    (_NOTICE_S, _BOOT_S, 4, _RESUME_S),
    (0.0, _BOOT_S, 4, 60.0),
)
_STOPPED_USD_PER_H: Final = 0.011  # 100 GB of gp3, as the house has it (CORRAL_STOPPED_NANO_PER_H)
_MARGIN_S: Final = 1.0  # of P99 to the first token: what may count as no worse
_WITHOUT: Final = "without a reserve"
_WITH: Final = "with a reserve"
_ON_DEMAND: Final = "on-demand"

Pair = tuple[list[Paid], list[Paid]]  # by window: with a reserve, and without
# By buyer and window: the result, and its cost over the oracle's.
Served = dict[str, list[tuple[Result, float]]]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--days", type=float, default=0.5, help="machines alone: days per window (default 0.5)"
    )
    parser.add_argument("--machines", type=float, default=4.0, help="mean number wanted (default 4)")
    parser.add_argument(
        "--hours", type=float, default=2.0, help="with requests: hours per window (default 2)"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    total = given.total_rates(given.servegen(options["traces"], "m-mid", 1.0).rates)
    length_s = options["days"] * 86400
    markets = {n: {m.name: m for m in given.markets(options["traces"], n)} for n in (16, 4)}
    n_reserve = math.ceil(2 * options["machines"])

    def alone(market: given.Market, notice_s: float, boot_s: float, resume_s: float) -> Pair:
        spans = [
            (market.window(seed, length_s), given.demand(total, seed, length_s, options["machines"]))
            for seed in range(options["seeds"])
        ]
        progress(f"{market.name}: notice {notice_s:g} s, boot {boot_s:g} s, resumed in {resume_s:g} s")
        return _alone(spans, _reserving(terms(notice_s, boot_s), n_reserve, resume_s), length_s)

    found = {
        f"six V100 zones: {notice_s:g} s, {boot_s:g} s, {n}, {resume_s:g} s": alone(
            markets[n][MAIN], notice_s, boot_s, resume_s
        )
        for notice_s, boot_s, n, resume_s in _SIX_ZONES
    }
    for name, market in markets[16].items():
        if name != MAIN:
            found[name] = alone(market, _NOTICE_S, _BOOT_S, _RESUME_S)
    loads = given.servegen(options["traces"], "m-mid", 0.0005), given.azure(options["traces"], 0.25)
    served = {
        load.name: _served(load, markets[16][MAIN], options["hours"] * 3600, options["seeds"], progress)
        for load in loads
    }
    return _study(options, n_reserve, found, served)


def _reserving(at: Terms, n_reserve: int, resume_s: float) -> Terms:
    return replace(at, n_reserve=n_reserve, resume_s=resume_s, stopped_usd_per_h=_STOPPED_USD_PER_H)


def _alone(spans: Sequence[tuple[tuple[Zone, ...], Steps]], at: Terms, length_s: float) -> Pair:
    """Our buyer on each window, with the reserve and without."""
    kept: list[Paid] = []
    without: list[Paid] = []
    for zones, wanted in spans:
        least = least_usd(zones, at, wanted, length_s)
        for paid, each in ((kept, at), (without, replace(at, n_reserve=0))):
            paid.append(bought(Corral(each.spot_spec(AVAILABILITY)), zones, each, wanted, length_s, least))
    return kept, without


def _served(
    load: given.Load, market: given.Market, length_s: float, n_seeds: int, progress: Progress
) -> Served:
    """The full simulator. On-demand with the production scaler comes first; its demand is what the others must meet."""
    at = Terms(_BOOT_S, _NOTICE_S, given.ON_DEMAND_USD_PER_H, tick_s=15)
    found: Served = {_ON_DEMAND: [], _WITHOUT: [], _WITH: []}
    for seed in range(n_seeds):
        window = demanded(load, market, at, seed, length_s)
        wanted, least = window.wanted, window.least_usd
        found[_ON_DEMAND].append((window.on_demand, window.on_demand.usd / least))
        n_reserve = 2 * max(round(statistics.fmean(wanted.values)), 1)
        for name, each in ((_WITHOUT, at), (_WITH, _reserving(at, n_reserve, _RESUME_S))):
            result = scenario.run(
                replace(window.setting, terms=each),
                replace(CORRAL, scaler=lambda s, wanted=wanted: Replay(wanted)),  # type: ignore[misc]
                load.jobs(seed, length_s),
                label=f"{load.name}, {name}, seed {seed}",
            )
            found[name].append((result, result.usd / least))
        progress(f"{load.name}: window {seed}")
    return found


def _study(
    options: dict[str, Any], n_reserve: int, found: dict[str, Pair], served: dict[str, Served]
) -> Study:
    return Study(
        "Spot machines with a reserve of stopped ones",
        {
            "market": f"all SkyPilot recordings; 16 machines where one was probed; notice {_NOTICE_S:g} s, boot "
            f"{_BOOT_S:g} s, a stopped machine serves {_RESUME_S:g} s after an order, unless said otherwise",
            "prices": given.PRICES,
            "reserve": f"on-demand machines that lie stopped from the beginning on, {_STOPPED_USD_PER_H:g} USD/h each "
            "(100 GB of gp3), on-demand's price from the order on; the weights are on their disks. On-demand has room "
            "for them whenever they are ordered, as for all on-demand machines here. Twice the mean demand: "
            f"{n_reserve} where machines are alone",
            "ours": "autoscaler/policy/spot.py: what a zone takes is ordered again and stood in for by stopped "
            "machines, which lie down when spot is ready; cover is bought where they are fewer than what is wanted",
            "machines alone": f"{options['days']:g} days per window; ServeGen m-mid's rate as demand, "
            f"{options['machines']:g} machines on average, in steps of ten minutes",
            "with requests": f"{options['hours']:g} h per window, the first 32 minutes not counted; m-mid thinned to "
            "0.05 %, Azure's conversation hour repeated and thinned to 25 %; the production scaler's wishes of the "
            "on-demand run are the demand of all",
            "replica": given.REPLICA,
            "oracle": "linear programme that knows market and demand; availability 99.9 %, fractions of machines",
            "runs": f"{options['seeds']} windows of market and load, the same for all; ± is the 95 % interval, paired "
            "where two are compared",
        },
        [
            Table(
                "Machines alone",
                [
                    Column("market (notice, boot, machines per zone, resumed in)"),
                    Column("with, × oracle", "{:.3f}"),
                    Column("available", "{:.3%}"),
                    Column("without, × oracle", "{:.3f}"),
                    Column("available", "{:.3%}"),
                    Column("saved, × oracle", "{:+.3f}"),
                ],
                [[name, *_row(kept, without)] for name, (kept, without) in found.items()],
            ),
            Table(
                "With requests, queue and engines: the six V100 zones",
                [
                    Column("load and buyer"),
                    Column("× oracle", "{:.3f}"),
                    Column("available", "{:.3%}"),
                    Column("TTFT p99", "{:.2f} s"),
                    Column("p99 less on-demand's", "{:+.2f} s"),
                    Column(f"in {given.TTFT_S:g} s", "{:.2%}"),
                    Column("machines lost", "{:.1f}"),
                ],
                [
                    [f"{load}: {name}", *_served_row(runs, name)]
                    for load, runs in served.items()
                    for name in runs
                ],
            ),
        ],
        _goals(found, served),
    )


def _row(kept: list[Paid], without: list[Paid]) -> list[Cell]:
    ratios = [[p.ratio for p in paid] for paid in (kept, without)]
    return [
        interval(ratios[0]),
        interval([p.availability for p in kept]),
        interval(ratios[1]),
        interval([p.availability for p in without]),
        interval([b - a for a, b in zip(*ratios, strict=True)]),
    ]


def _served_row(runs: Served, name: str) -> list[Cell]:
    results = [result for result, _ in runs[name]]
    return [
        interval([ratio for _, ratio in runs[name]]),
        interval([r.availability for r in results]),
        interval([r.ttft_p99_s for r in results]),
        None if name == _ON_DEMAND else interval(_later_s(runs, name)),
        interval([r.slo_attainment for r in results]),
        interval([float(r.n_lost_machines) for r in results]),
    ]


def _later_s(runs: Served, name: str) -> list[float]:
    """P99 to the first token less on-demand's, by window."""
    both = zip(runs[name], runs[_ON_DEMAND], strict=True)
    return [own.ttft_p99_s - other.ttft_p99_s for (own, _), (other, _) in both]


def _goals(found: dict[str, Pair], served: dict[str, Served]) -> list[Goal]:
    goals = []
    rows = {name: (kept, [p.ratio for p in kept]) for name, (kept, _) in found.items()}
    for name, (kept, ratios) in rows.items():
        available, ratio = interval([p.availability for p in kept]), interval(ratios)
        is_met = available.mean >= AVAILABILITY and ratio.high <= RATIO_GOAL
        goals.append(
            Goal(
                f"{name}: 99.9 % at no more than {RATIO_GOAL:g} times the oracle's cost",
                f"{available.mean:.3%} at {ratio.mean:.3f} ± {ratio.half:.3f}",
                is_met,
                "" if is_met else "what is woken serves later than the notice lasts",
            )
        )
    for name, runs in served.items():
        available = interval([r.availability for r, _ in runs[_WITH]])
        ratio, later = interval([ratio for _, ratio in runs[_WITH]]), interval(_later_s(runs, _WITH))
        goals += [
            Goal(
                f"{name}: 99.9 % at no more than {RATIO_GOAL:g} times the oracle's cost",
                f"{available.mean:.3%} at {ratio.mean:.3f} ± {ratio.half:.3f}",
                available.mean >= AVAILABILITY and ratio.high <= RATIO_GOAL,
                "the interval reaches over it" if ratio.mean <= RATIO_GOAL < ratio.high else "",
            ),
            Goal(
                f"{name}: P99 to the first token no worse than on-demand's (paired, by the upper end)",
                f"{later.mean:+.3f} ± {later.half:.3f} s; margin {_MARGIN_S:g} s",
                later.high <= _MARGIN_S,
            ),
        ]
    return goals
