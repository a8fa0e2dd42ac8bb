"""The tuned scalers window by window on another model's days: where attainment is lost, and by whom.

Says what means over windows hide: study scaling's settings, no tuning here.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.buyers import OnDemandOnly
from autoscaler.sim.policies import policy
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.studies.scaling import BOOT_S, TARGET, windows

HELP = "the tuned scalers window by window on ServeGen m-large: where attainment is lost"
_TUNED: Final = {
    "corral": "corral:usual_share=0.8:usual_deviations=1.6:spare_ratio=0.6",
    "hpa": "hpa:target_ratio=0.86:stabilisation_s=600",
    "kpa": "kpa:target_ratio=0.85:stable_window_s=30:panic_threshold=1.5:scale_down_delay_s=600",
}
_HELD_S: Final = 10.0
_DAYS: Final = (0.3, 8.8)
# Prompts longer than this take the replica over the promised first token by themselves.
_LONG: Final = 15_000


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="m-large", help="another recorded one (default m-large)")
    parser.add_argument("--keep", type=float, default=0.01, help="share of its requests (default 0.01)")
    parser.add_argument("--hours", type=float, default=3.0, help="hours per window (default 3)")


@dataclass(frozen=True, slots=True)
class _Window:
    day: float
    n_requests: int
    n_prompt: float
    long_ratio: float
    attained: dict[str, float]
    usd_per_h: dict[str, float]


def run(options: dict[str, Any], progress: Progress) -> Study:
    load = given.servegen(options["traces"], options["model"], options["keep"])
    found = []
    for window in windows(load, _DAYS, options["seeds"], options["hours"] * 3600, 2000, _HELD_S):
        setting = window.setting
        sizes = [job.n_prompt for job in load.jobs(window.seed, setting.until_s, setting.begins_at_s)]
        results = {
            name: scenario.run(
                setting,
                replace(policy(tuned), buyer=lambda s: OnDemandOnly()),
                load.jobs(window.seed, setting.until_s, setting.begins_at_s),
                label=f"{tuned}, window {window.seed}",
            )
            for name, tuned in _TUNED.items()
        }
        hours = (setting.until_s - setting.warm_s) / 3600
        found.append(
            _Window(
                setting.begins_at_s / 86400,
                len(sizes),
                statistics.fmean(sizes),
                sum(n > _LONG for n in sizes) / len(sizes),
                {name: result.slo_attainment for name, result in results.items()},
                {name: result.usd / hours for name, result in results.items()},
            )
        )
        progress(f"day {found[-1].day:.2f}: {found[-1].attained['corral']:.4f}")
    return _study(options, found)


def _study(options: dict[str, Any], found: list[_Window]) -> Study:
    rows: list[list[Cell]] = [
        [
            f"{w.day:.2f}",
            w.n_requests,
            w.n_prompt,
            w.long_ratio,
            *(cell for name in _TUNED for cell in (w.attained[name], w.usd_per_h[name])),
        ]
        for w in found
    ]
    able = [w for w in found if max(w.attained.values()) >= TARGET]
    return Study(
        f"Tuned scalers on {options['model']}, window by window",
        {
            "load": f"ServeGen {options['model']} thinned to {options['keep']:.1%}, {options['hours']:g} h a window, "
            "the first half hour not counted",
            "settings": "as study scaling tunes them on m-mid: " + ", ".join(_TUNED.values()),
            "replica": given.REPLICA,
            "machines": f"on-demand only, {given.ON_DEMAND_USD_PER_H:g} USD/h, ready after {BOOT_S:g} s",
            "runs": f"{len(found)} windows; ± is the 95 % interval over windows",
        },
        [
            Table(
                f"First token in {given.TTFT_S:g} s, and USD an hour",
                [
                    Column("day"),
                    Column("requests", "{:,}"),
                    Column("mean prompt", "{:,.0f}"),
                    Column(f"over {_LONG:,}", "{:.1%}"),
                    *(
                        Column(title, form)
                        for name in _TUNED
                        for title, form in ((name, "{:.2%}"), ("USD/h", "{:.2f}"))
                    ),
                ],
                rows,
            )
        ],
        [_goal(rival, found, able) for rival in ("hpa", "kpa")],
    )


def _goal(rival: str, found: list[_Window], able: list[_Window]) -> Goal:
    """On the windows that anybody serves at the target: what is attained there, and paid."""
    if not able:
        return Goal(
            f"attains at least {TARGET:.0%} for less than {rival}", "nobody does on any window", is_met=False
        )
    own = interval([w.attained["corral"] for w in able])
    saved = interval([1 - w.usd_per_h["corral"] / w.usd_per_h[rival] for w in able])
    less = interval([w.attained["corral"] - w.attained[rival] for w in able])
    return Goal(
        f"where somebody attains {TARGET:.0%} ({len(able)} of {len(found)} windows): attains it too, for less than "
        f"{rival}",
        f"{own.mean:.3%} ± {own.half:.3%} attained, {saved.mean:+.2%} ± {saved.half:.2%} saved; attained less "
        f"{rival}'s: {less.mean:+.3%} ± {less.half:.3%}",
        own.mean >= TARGET and saved.low > 0,
    )
