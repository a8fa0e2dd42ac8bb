"""Spot machines at on-demand's availability: cost against a clairvoyant buyer, SpotHedge and the three-line rule."""

from __future__ import annotations

from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.buyers import AnyZoneElseOnDemand, SpotHedge
from autoscaler.sim.fleet import Buyer, Terms
from autoscaler.sim.policies import CORRAL
from autoscaler.sim.scalers import Replay
from autoscaler.sim.scenario import Policy, Result, Setting
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies._spot import (
    AVAILABILITY,
    COLUMNS,
    MAIN,
    RATIO_GOAL,
    RIVALS,
    SPOT_ONLY,
    Paid,
    cheaper,
    demanded,
    equal,
    machines_alone,
    market_row,
    mean,
    terms,
)
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table

HELP = "spot markets: cost and availability against the oracle, SpotHedge and any-zone-else-on-demand"
_BASE: Final = (120.0, 120.0, 16)  # notice_s, boot_s, machines per zone
_MARGIN_S: Final = 1.0  # a fifth of the promised first token: what may count as no worse


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--days", type=float, default=0.5, help="machines alone: days per window (default 0.5)"
    )
    parser.add_argument("--machines", type=float, default=4.0, help="mean number wanted (default 4)")
    parser.add_argument(
        "--hours", type=float, default=2.0, help="with requests: hours per window (default 2)"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    seeds = range(options["seeds"])
    total = given.total_rates(given.servegen(options["traces"], "m-mid", 1.0).rates)
    length_s = options["days"] * 86400

    def windows(market: given.Market, notice_s: float, boot_s: float) -> dict[str, list[Paid]]:
        found: dict[str, list[Paid]] = defaultdict(list)
        for seed in seeds:
            wanted = given.demand(total, seed, length_s, options["machines"])
            at = market.window(seed, length_s), terms(notice_s, boot_s), wanted, length_s
            for name, paid in machines_alone(*at).items():
                found[name].append(paid)
        progress(f"{market.name}: notice {notice_s:g} s, boot {boot_s:g} s")
        return found

    notice_s, boot_s, zone_machines = _BASE
    everywhere = {
        m.name: windows(m, notice_s, boot_s) for m in given.markets(options["traces"], zone_machines)
    }
    main = {
        n: next(m for m in given.markets(options["traces"], n) if m.name == MAIN) for n in (zone_machines, 4)
    }
    assumed = {
        _BASE: everywhere[MAIN],
        (notice_s, boot_s, 4): windows(main[4], notice_s, boot_s),
        (120.0, 180.0, zone_machines): windows(main[zone_machines], 120.0, 180.0),
    }
    served = {
        load.name: _served(
            load, main[zone_machines], everywhere[MAIN], options["hours"] * 3600, seeds, progress
        )
        for load in (given.servegen(options["traces"], "m-mid", 0.0005), given.azure(options["traces"], 0.25))
    }
    return _study(options, everywhere, assumed, served)


def _served(
    load: given.Load,
    market: given.Market,
    alone: dict[str, list[Paid]],
    length_s: float,
    seeds: range,
    progress: Progress,
) -> dict[str, list[tuple[Result, float]]]:
    """The full simulator: (result, cost over the oracle's) by policy. On-demand with the production scaler comes first;
    its demand is what all others must meet."""
    notice_s, boot_s, _ = _BASE
    terms = Terms(boot_s, notice_s, given.ON_DEMAND_USD_PER_H, tick_s=15)
    buyers: dict[str, Callable[[Setting], Buyer]] = {
        "corral": CORRAL.buyer,
        "any-zone:n_extra=0": lambda s: AnyZoneElseOnDemand(),
        "spothedge:n_extra=1": lambda s: SpotHedge(1),
    }
    for rival, makers in RIVALS.items():
        chosen, _ = equal(alone, rival)
        buyers[chosen] = lambda s, make=makers[chosen]: make()  # type: ignore[misc]
    found: dict[str, list[tuple[Result, float]]] = defaultdict(list)
    for seed in seeds:
        window = demanded(load, market, terms, seed, length_s)
        setting, wanted, least_usd = window.setting, window.wanted, window.least_usd
        found["on-demand"].append((window.on_demand, window.on_demand.usd / least_usd))
        for name, buyer in buyers.items():
            policy = Policy(CORRAL.queue, CORRAL.router, lambda s, wanted=wanted: Replay(wanted), buyer)  # type: ignore[misc]
            result = scenario.run(
                setting, policy, load.jobs(seed, length_s), label=f"{load.name}, {name}, seed {seed}"
            )
            found[name].append((result, result.usd / least_usd))
        closed = scenario.run(
            setting, CORRAL, load.jobs(seed, length_s), label=f"{load.name}, own scaler, seed {seed}"
        )
        found["corral, own scaler"].append((closed, closed.usd / least_usd))
        progress(f"{load.name}: window {seed}")
    return found


def _study(
    options: dict[str, Any],
    everywhere: dict[str, dict[str, list[Paid]]],
    assumed: dict[tuple[float, float, int], dict[str, list[Paid]]],
    served: dict[str, dict[str, list[tuple[Result, float]]]],
) -> Study:
    in_service = Table(
        "With requests, queue and engines: the recorded six V100 zones",
        [
            Column("load and policy"),
            Column("× oracle", "{:.3f}"),
            Column("available", "{:.3%}"),
            Column("TTFT p50", "{:.3f} s"),
            Column("TTFT p99", "{:.2f} s"),
            Column("p99 less on-demand's", "{:+.2f} s"),
            Column(f"in {given.TTFT_S:g} s", "{:.2%}"),
            Column("machines lost", "{:.1f}"),
        ],
        [_service_row(load, name, runs) for load, runs in served.items() for name in runs],
    )
    return Study(
        "Spot machines at on-demand's availability",
        {
            "markets": f"all SkyPilot recordings; {_BASE[2]} machines where one was probed; notice "
            f"{_BASE[0]:g} s, boot {_BASE[1]:g} s unless said otherwise",
            "prices": given.PRICES,
            "machines alone": f"{options['days']:g} days per window; ServeGen m-mid's rate as demand, "
            f"{options['machines']:g} machines on average, in steps of ten minutes",
            "with requests": f"{options['hours']:g} h per window, the first 32 minutes not counted; m-mid thinned to "
            "0.05 %, Azure's conversation hour repeated and thinned to 25 %; the production scaler's wishes of the "
            "on-demand run are the demand of all",
            "replica": given.REPLICA,
            "oracle": "linear programme that knows market and demand; availability 99.9 %, fractions of machines",
            "available": "share of time with as many machines ready as have been wanted for a start's duration",
            "as available": "the cheapest setting of n_extra (any-zone 0, 1, 2, 4; SpotHedge 1, 2, 4) that is as "
            "available as asked; none: the most available one, with what it reaches",
            "where notice is shorter than a start": "a zone that goes leaves a gap of boot less notice; what that "
            "costs, and why, is study spot-cover. The goals here are for the first assumption, the others are told",
            "any-zone that heeds notices": "not in its three lines; it shows that with a notice in time, heeding it "
            "makes spot as available as on-demand, and that what is learned counts where it comes too late",
            "runs": f"{options['seeds']} windows of market and load, the same for all; ± is the 95 % interval",
        },
        [
            Table(
                "Every recorded market, machines alone",
                [Column("market"), *COLUMNS],
                [[name, *market_row(found)] for name, found in everywhere.items()],
            ),
            Table(
                "Other assumptions, the six V100 zones",
                [Column("notice, boot, machines per zone"), *COLUMNS],
                [[f"{n:g} s, {b:g} s, {m}", *market_row(found)] for (n, b, m), found in assumed.items()],
            ),
            Table(
                "Without on-demand: the cheapest zone that gives, and nothing else",
                [Column("market"), Column("× oracle", "{:.3f}"), Column("available", "{:.2%}")],
                [
                    [
                        name,
                        interval([paid.ratio for paid in found[SPOT_ONLY]]),
                        interval([paid.availability for paid in found[SPOT_ONLY]]),
                    ]
                    for name, found in everywhere.items()
                ],
            ),
            in_service,
        ],
        _goals(everywhere, served),
    )


def _service_row(load: str, name: str, runs: dict[str, list[tuple[Result, float]]]) -> list[Cell]:
    results = [result for result, _ in runs[name]]
    less = [r.ttft_p99_s - d.ttft_p99_s for r, (d, _) in zip(results, runs["on-demand"], strict=True)]
    return [
        f"{load}: {name}",
        interval([ratio for _, ratio in runs[name]]),
        interval([r.availability for r in results]),
        interval([r.ttft_p50_s for r in results]),
        interval([r.ttft_p99_s for r in results]),
        interval(less) if name != "on-demand" else None,
        interval([r.slo_attainment for r in results]),
        interval([float(r.n_lost_machines) for r in results]),
    ]


def _goals(
    everywhere: dict[str, dict[str, list[Paid]]], served: dict[str, dict[str, list[tuple[Result, float]]]]
) -> list[Goal]:
    goals = []
    lowest = {name: mean(found["corral"], "availability") for name, found in everywhere.items()}
    least = min(lowest, key=lambda name: lowest[name])
    goals.append(
        Goal(
            "availability at least 99.9 % on every market",
            f"{lowest[least]:.3%} on {least}",
            lowest[least] >= AVAILABILITY,
        )
    )
    highest = {name: interval([p.ratio for p in found["corral"]]).high for name, found in everywhere.items()}
    most = max(highest, key=lambda name: highest[name])
    goals.append(
        Goal(
            f"cost at most {RATIO_GOAL:g} times the oracle's on every market, upper end",
            f"{highest[most]:.3f} on {most}",
            highest[most] <= RATIO_GOAL,
        )
    )
    for rival in RIVALS:
        goals.append(cheaper(rival, everywhere))
    for load, runs in served.items():
        available = interval([r.availability for r, _ in runs["corral"]])
        ratio = interval([ratio for _, ratio in runs["corral"]])
        both = zip(runs["corral"], runs["on-demand"], strict=True)
        tail = interval([own.ttft_p99_s - other.ttft_p99_s for (own, _), (other, _) in both])
        goals += [
            Goal(
                f"{load}: availability at least 99.9 %",
                f"{available.mean:.3%}",
                available.mean >= AVAILABILITY,
            ),
            Goal(
                f"{load}: cost at most {RATIO_GOAL:g} times the oracle's",
                f"{ratio.mean:.3f} ± {ratio.half:.3f}",
                ratio.high <= RATIO_GOAL,
            ),
            Goal(
                f"{load}: P99 to the first token no worse than on-demand's (paired, non-inferior by the upper end of "
                "the interval)",
                f"{tail.mean:+.3f} ± {tail.half:.3f} s; margin {_MARGIN_S:g} s, upper end {tail.high:+.3f} s",
                tail.high <= _MARGIN_S,
                f"on average {tail.mean:+.3f} s; {len(runs['corral'])} windows do not show that it is within the margin"
                if tail.high > _MARGIN_S
                else "",
            ),
        ]
    return goals
