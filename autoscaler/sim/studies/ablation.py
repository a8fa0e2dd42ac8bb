"""Each ingredient of the production bundle off, one at a time, on one scenario with tenants, bursts and losses."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.ablations import ABLATIONS
from autoscaler.sim.fleet import Terms
from autoscaler.sim.scenario import Result, Setting
from autoscaler.sim.statistics import Interval, interval
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table

HELP = "what each ingredient of the production bundle is worth: cost, availability, attainment without it"
_NOTICE_S: Final = 120.0
_BOOT_S: Final = 180.0  # longer than the notice: spares, spread and learned hazard have something to do
_ZONE_MACHINES: Final = 4
_MARKET: Final = "availability 1-node aws-02-15-2023, v100_1"
_WARM_S: Final = 1800.0


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--keep", type=float, default=0.0005, help="share of m-mid's requests (default 0.0005)"
    )
    parser.add_argument("--hours", type=float, default=2.0, help="hours per window (default 2)")


def run(options: dict[str, Any], progress: Progress) -> Study:
    load = given.servegen(options["traces"], "m-mid", options["keep"])
    market = next(m for m in given.markets(options["traces"], _ZONE_MACHINES) if m.name == _MARKET)
    length_s = options["hours"] * 3600
    terms = Terms(_BOOT_S, _NOTICE_S, given.ON_DEMAND_USD_PER_H, tick_s=15)
    found: dict[str, list[Result]] = {name: [] for name in ABLATIONS}
    for seed in range(options["seeds"]):
        start_s = load.whole((0.3 + 8.2 * seed / options["seeds"]) * 86400, length_s)
        setting = Setting(
            given.engine(),
            given.SLOTS,
            0,
            given.TTFT_S,
            market.window(seed, length_s),
            terms,
            until_s=length_s,
            warm_s=_WARM_S,
            begins_at_s=start_s,
            past=given.past(load, seed, start_s, _BOOT_S, 43.0),
        )
        for name, policy in ABLATIONS.items():
            label = f"without {name}, seed {seed}"
            found[name].append(scenario.run(setting, policy, load.jobs(seed, length_s, start_s), label=label))
        progress(f"window {seed}")
    return _study(options, found)


def _study(options: dict[str, Any], found: dict[str, list[Result]]) -> Study:
    whole = next(iter(found.values()))
    hours = options["hours"] - _WARM_S / 3600

    def row(name: str, results: list[Result]) -> list[Cell]:
        def change(figure: str) -> Interval | None:
            if results is whole:
                return None
            both = zip(results, whole, strict=True)
            return interval([getattr(r, figure) - getattr(w, figure) for r, w in both])

        cost = [r.usd / w.usd - 1 for r, w in zip(results, whole, strict=True)]
        return [
            name,
            interval([r.usd / hours for r in results]),
            None if results is whole else interval(cost),
            interval([r.availability for r in results]),
            change("availability"),
            interval([r.slo_attainment for r in results]),
            change("slo_attainment"),
            change("ttft_p99_s"),
            change("worst_tenant_p99_s"),
        ]

    return Study(
        "Each ingredient of the production bundle off, one at a time",
        {
            "load": f"ServeGen m-mid and its tenants, thinned to {options['keep']:.2%}; {options['hours']:g} h per "
            "window, the first half hour not counted",
            "market": f"the six V100 zones of 2023-02, {_ZONE_MACHINES} machines each; notice {_NOTICE_S:g} s, boot "
            f"{_BOOT_S:g} s, so that a notice alone does not suffice",
            "prices": given.PRICES,
            "replica": given.REPLICA,
            "runs": f"{options['seeds']} windows of market and load, the same for all; changes are paired, ± is the "
            "95 % interval",
            "not here": "orders inside a flow (study ordering) and prefix affinity (study routing): m-mid's recording "
            "has one class of service and no prefixes",
        },
        [
            Table(
                "Without …",
                [
                    Column("off"),
                    Column("USD/h", "{:.2f}"),
                    Column("change", "{:+.1%}"),
                    Column("available", "{:.3%}"),
                    Column("change", "{:+.3%}"),
                    Column(f"first token in {given.TTFT_S:g} s", "{:.2%}"),
                    Column("change", "{:+.2%}"),
                    Column("P99, change", "{:+.2f} s"),
                    Column("worst tenant's P99, change", "{:+.2f} s"),
                ],
                [row(name, results) for name, results in found.items()],
            )
        ],
        [_goal(found)],
    )


def _goal(found: dict[str, list[Result]]) -> Goal:
    """No ingredient may be for nothing: without it something gets worse, for certain or at least on average."""
    names = list(found)
    whole = found[names[0]]
    idle = []
    for name in names[1:]:
        both = list(zip(found[name], whole, strict=True))
        costs_more = interval([r.usd / w.usd - 1 for r, w in both]).mean > 0
        serves_less = interval([r.slo_attainment - w.slo_attainment for r, w in both]).mean < 0
        is_there_less = interval([r.availability - w.availability for r, w in both]).mean < 0
        waits_more = interval([r.worst_tenant_p99_s - w.worst_tenant_p99_s for r, w in both]).mean > 0
        if not (costs_more or serves_less or is_there_less or waits_more):
            idle.append(name)
    return Goal(
        "without any ingredient something gets worse: cost, availability, attainment or the worst tenant's tail",
        f"{len(names) - 1 - len(idle)} of {len(names) - 1}",
        not idle,
        f"not for {', '.join(idle)}" if idle else "",
    )
