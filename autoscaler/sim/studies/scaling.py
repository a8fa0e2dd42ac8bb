"""Replica counts: the production scaler, Kubernetes', Knative's and a fixed number, tuned on one span, judged on
another."""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.buyers import OnDemandOnly
from autoscaler.sim.fleet import Terms
from autoscaler.sim.market import Zone
from autoscaler.sim.policies import policy
from autoscaler.sim.scenario import Result, Setting
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table

HELP = "ServeGen m-mid: attainment and cost of the production scaler, HPA, KPA and static, tuned on a span of its own"
BOOT_S: Final = 120.0
TARGET: Final = 0.99  # a tuned setting is the cheapest that attains this on the fit span
_FIT: Final = (0.3, 4.3)  # days
_JUDGED: Final = (4.4, 8.8)
_WARM_S: Final = 1800.0
_HELD_S: Final = 43.0  # a request stays about so long: what the forecast's past is made with
_SPARED: Final = 0.02  # of the cheaper tuned rival's cost, to be saved by ours while it attains more
# What a coarser sweep of the fit span's requests, with slots for engines, had on its frontier of cost and attainment.
_KNOBS: Final[dict[str, tuple[str, ...]]] = {
    "corral": tuple(
        f"corral:usual_share={share}:usual_deviations={n}:spare_ratio={spare}"
        for share, n, spare in (
            (0.75, 1.4, 0.3),
            (0.75, 1.8, 0.3),
            (0.75, 1.8, 0.5),
            (0.8, 1.6, 0.6),
            (0.85, 1.4, 0.8),
        )
    ),
    "hpa": tuple(
        f"hpa:target_ratio={r}:stabilisation_s={s}"
        for r, s in ((0.9, 600), (0.88, 600), (0.86, 600), (0.86, 750), (0.85, 900), (0.82, 600))
    ),
    "kpa": tuple(
        f"kpa:target_ratio={r}:stable_window_s={w}:panic_threshold=1.5:scale_down_delay_s={d}"
        for r, w, d in (
            (0.9, 30, 600),
            (0.85, 30, 600),
            (0.9, 15, 600),
            (0.85, 15, 600),
            (0.85, 30, 900),
            (0.8, 30, 600),
        )
    ),
    # Its only knob; attainment grows with it, so the least that reaches the target is between two of these.
    "static": tuple(f"static:n={n}" for n in (8, 9, 10, 12)),
}
_RIVALS: Final = ("hpa", "kpa")  # who must be beaten; a fixed number is shown beside them
_DEFAULTS: Final = ("hpa", "kpa")
_CEILING: Final = "static:n=40"
_OTHER: Final = ("m-large", 0.01, 10.0)  # another kind of model: its share kept, and how long a request stays


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--keep", type=float, default=0.001, help="share of m-mid's requests (default 0.001)")
    parser.add_argument("--hours", type=float, default=6.0, help="hours per window (default 6)")
    parser.add_argument("--fit-windows", type=int, default=8, help="windows of the fit span (default 8)")


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of the recording, and what the forecast had learned by then."""

    seed: int
    setting: Setting


def run(options: dict[str, Any], progress: Progress) -> Study:
    load = given.servegen(options["traces"], "m-mid", options["keep"])
    length_s = options["hours"] * 3600
    fit = windows(load, _FIT, options["fit_windows"], length_s, 1000)
    judged = windows(load, _JUDGED, options["seeds"], length_s, 0)

    n_settings = sum(len(names) for names in _KNOBS.values())

    def simulate(name: str, spans: Sequence[Window], stage: str, load: given.Load = load) -> list[Result]:
        bundle = replace(policy(name), buyer=lambda s: OnDemandOnly())
        found = [
            scenario.run(
                w.setting,
                bundle,
                load.jobs(w.seed, w.setting.until_s, w.setting.begins_at_s),
                label=f"{name}, window {w.seed}",
            )
            for w in spans
        ]
        progress(f"{stage}: {name}: {statistics.fmean(r.slo_attainment for r in found):.4f}")
        return found

    fitted = {
        name: simulate(name, fit, f"fit, {n} of {n_settings}")
        for n, name in enumerate((name for names in _KNOBS.values() for name in names), 1)
    }
    tuned = {kind: choose({name: fitted[name] for name in names}) for kind, names in _KNOBS.items()}
    most_usd = (1 - _SPARED) * min(_cost(fitted[tuned[kind]]) for kind in _RIVALS)
    tuned["corral"] = choose({name: fitted[name] for name in _KNOBS["corral"]}, most_usd)
    shown = dict.fromkeys([*tuned.values(), *_DEFAULTS, _CEILING])
    found = {name: simulate(name, judged, f"judged, {n} of {len(shown)}") for n, name in enumerate(shown, 1)}
    model, keep, held_s = _OTHER
    other = given.servegen(options["traces"], model, keep * options["keep"] / 0.001)
    spans = windows(other, (0.3, 8.8), options["seeds"], length_s / 2, 2000, held_s)
    elsewhere = {
        name: simulate(name, spans, f"{model}, {n} of {len(tuned)}", other)
        for n, name in enumerate(tuned.values(), 1)
    }
    return _study(options, fitted, tuned, found, elsewhere)


def windows(
    load: given.Load,
    days: tuple[float, float],
    n: int,
    length_s: float,
    first: int,
    held_s: float = _HELD_S,
) -> list[Window]:
    """`n` stretches evenly over the days, not overlapping where there is room."""
    found = []
    terms = Terms(BOOT_S, 0.0, given.ON_DEMAND_USD_PER_H, tick_s=15)
    nothing = (Zone("none", length_s, (0,), given.SPOT_USD_PER_H),)
    for at in range(n):
        start_s = load.whole((days[0] + (days[1] - days[0]) * at / n) * 86400, length_s)
        setting = Setting(
            given.engine(),
            given.SLOTS,
            0,
            given.TTFT_S,
            nothing,
            terms,
            max_machines=128,
            until_s=length_s,
            warm_s=_WARM_S,
            begins_at_s=start_s,
            past=given.past(load, first + at, start_s, BOOT_S, held_s),
        )
        found.append(Window(first + at, setting))
    return found


def _cost(results: Sequence[Result]) -> float:
    return statistics.fmean(r.usd for r in results)


def choose(fitted: dict[str, list[Result]], most_usd: float = 0.0) -> str:
    """The cheapest setting that attains the target on the fit span; if none does, the one that attains most. With
    `most_usd`: of those that cost no more, the one that attains most, where one does."""

    def attained(name: str) -> float:
        return statistics.fmean(r.slo_attainment for r in fitted[name])

    affordable = [name for name in fitted if _cost(fitted[name]) <= most_usd]
    if affordable:
        return max(affordable, key=attained)
    reaching = [name for name in fitted if attained(name) >= TARGET]
    if not reaching:
        return max(fitted, key=attained)
    return min(reaching, key=lambda name: (_cost(fitted[name]), name))


def _study(
    options: dict[str, Any],
    fitted: dict[str, list[Result]],
    tuned: dict[str, str],
    found: dict[str, list[Result]],
    elsewhere: dict[str, list[Result]],
) -> Study:
    columns = [
        Column(f"first token in {given.TTFT_S:g} s", "{:.3%}"),
        Column("USD/h", "{:.2f}"),
        Column("TTFT p99", "{:.2f} s"),
        Column("attainment less corral's", "{:+.3%}"),
        Column("USD over corral's", "{:.3f}"),
    ]
    hours = options["hours"] - _WARM_S / 3600

    def row(name: str, results: list[Result], ours: list[Result], hours: float) -> list[Cell]:
        pairs = list(zip(results, ours, strict=True))
        is_ours = name == tuned["corral"]
        title = f"{name} (tuned)" if name in tuned.values() else f"{name} (default)"
        if name == _CEILING:
            title = "always forty: what no replica is missing for"
        return [
            title,
            interval([r.slo_attainment for r in results]),
            interval([r.usd / hours for r in results]),
            interval([r.ttft_p99_s for r in results]),
            None if is_ours else interval([r.slo_attainment - o.slo_attainment for r, o in pairs]),
            None if is_ours else interval([r.usd / o.usd for r, o in pairs]),
        ]

    goals = []
    for place, runs in (("m-mid, held-out days", found), (f"{_OTHER[0]}, tuned on m-mid", elsewhere)):
        for kind in _RIVALS:
            pairs = list(zip(runs[tuned[kind]], runs[tuned["corral"]], strict=True))
            more = interval([o.slo_attainment - r.slo_attainment for r, o in pairs])
            less = interval([1 - o.usd / r.usd for r, o in pairs])
            goals.append(
                Goal(
                    f"{place}: higher attainment than tuned {kind.upper()} at lower cost (paired)",
                    f"{more.mean:+.3%} ± {more.half:.3%} attained, {less.mean:+.2%} ± {less.half:.2%} saved",
                    more.mean > 0 and less.mean > 0,
                    ""
                    if more.low > 0 and less.low > 0
                    else "an interval reaches over zero: not certain at this number of runs",
                )
            )
    return Study(
        "Replica counts for ServeGen",
        {
            "load": f"ServeGen m-mid thinned to {options['keep']:.2%}, {options['hours']:g} h per window, the first "
            "half hour not counted",
            "spans": f"tuned on {options['fit_windows']} windows of days {_FIT[0]:g} to {_FIT[1]:g}, judged on "
            f"{options['seeds']} windows of days {_JUDGED[0]:g} to {_JUDGED[1]:g}",
            "tuned": f"rivals: of the settings below the cheapest that attains {TARGET:.1%} on the fit span; ours: the "
            f"one that attains most there and costs at least {_SPARED:.0%} less than the cheaper of HPA and KPA",
            "elsewhere": f"{_OTHER[0]} thinned to {_OTHER[1]:.0%}, {options['seeds']} windows of "
            f"{options['hours'] / 2:g} h over all days, with the settings tuned on m-mid",
            "draining": "a replica given back finishes what it runs, at most 120 s, and is paid for it",
            "replica": given.REPLICA,
            "machines": f"on-demand only, {given.ON_DEMAND_USD_PER_H} USD/h by the second from the order on, ready "
            f"after {BOOT_S:g} s, looked at every 15 s",
            "forecast": "knows the days before from the recorded rates, and its errors from the six hours before",
            "late whatever is bought": "prompts of more than about 15,000 tokens take this replica over 5 s by "
            "themselves; the row of forty replicas shows what they leave",
        },
        [
            Table(
                "Judged",
                [Column("scaler"), *columns],
                [row(name, results, found[tuned["corral"]], hours) for name, results in found.items()],
            ),
            Table(
                f"Judged on {_OTHER[0]}",
                [Column("scaler"), *columns],
                [
                    row(name, results, elsewhere[tuned["corral"]], hours - options["hours"] / 2)
                    for name, results in elsewhere.items()
                ],
            ),
            Table(
                "Fit span, all settings",
                [Column("setting"), columns[0], columns[1]],
                [
                    [
                        name,
                        statistics.fmean(r.slo_attainment for r in results),
                        _cost(results) / hours,
                    ]
                    for name, results in fitted.items()
                ],
            ),
        ],
        goals,
    )
