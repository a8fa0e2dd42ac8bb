"""Whether several gateways that look at loads only now and then all follow the same replica.

Each gateway sees what runs on the replicas as it was up to 200 ms ago, at another moment than the others, and knows of
no placement but its own. Slots are never full but in one row, so that nothing but routing keeps a herd away.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.balance import Balance
from autoscaler.sim.policies import policy
from autoscaler.sim.replicas import engine_spec, told
from autoscaler.sim.scenario import Setting
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import jobs, read_requests, thin

HELP = "four gateways with loads 200 ms old: do they herd?"
_MODEL: Final = ("llama-3.1-8b", "h100_sxm", 1)
_REPLICAS: Final = 16
_SLOTS: Final = 256
_KEEP: Final = 0.9
_SPEED: Final = 30.0
_UNTIL_S: Final = 1200.0  # of the recording
_TIGHT: Final = 24  # slots of the row in which the admission script holds the herd back
_PEAK, _RATIO = 1.10, 1.15  # of the fresh view's, to count as no herd

_FRESH, _OURS = "affinity", "affinity:gateways=4:age_s=0.2"
_ROWS: Final = (
    "least-load",
    "least-load:gateways=4:age_s=0.2",
    "p2c",
    "p2c:gateways=4:age_s=0.2",
    "round-robin:gateways=4",
    _FRESH,
    _OURS,
    "affinity:gateways=4:age_s=1",
    "corral",
)


@dataclass(frozen=True, slots=True)
class _Run:
    peak: float
    running: float
    ttft_p50_s: float
    ttft_p99_s: float
    latency_s: float


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--speed", type=float, default=_SPEED, help=f"replay faster by this (default {_SPEED:g})"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    setting = Setting(engine_spec(*_MODEL), _SLOTS, _REPLICAS, ttft_target_s=1.0)
    tables, goals = [], []
    for name in ("conv", "code"):
        path = options["traces"] / "requests" / f"azure_llm_2023_{name}.csv"
        found = {row: _measure(setting, path, row, options, progress) for row in _ROWS}
        tight = replace(setting, slots=_TIGHT)
        late = f"{_ROWS[1]}, {_TIGHT} slots"
        found[late] = _measure(tight, path, _ROWS[1], options, progress)
        tables.append(Table(path.name, _COLUMNS, [_row(row, runs) for row, runs in found.items()]))
        goals += _goals(name, found)
    return Study(
        "Herds: gateways with stale loads",
        {
            "workload": f"Azure LLM inference 2023, conversation and code, first {_UNTIL_S / 60:.0f} min at "
            f"{options['speed']:g} x their speed; each "
            f"seed keeps another {_KEEP:.0%} of the requests; no shared prefixes",
            "house": f"{_REPLICAS} replicas of {told(*_MODEL)}; {_SLOTS} slots, never full, but for the last row: "
            f"there a request whose replica has no slot waits in the fair queue until any has one, as in production",
            "gateways": "requests come to them in turn; each looks at the loads every age_s, at another moment, and "
            "knows of its own placements at once (affinity) or not at all (least-load, p2c); corral: "
            "two, every second, as it runs",
            "peak": "most requests that ever ran on one replica; running max/mean over time, while there was one per "
            "replica",
            "runs": f"{options['seeds']} seeds, 95 % intervals",
        },
        tables,
        goals,
    )


_COLUMNS: Final = (
    Column("router"),
    Column("peak", "{:.1f}"),
    Column("running max/mean", "{:.3f}"),
    Column("TTFT p50", "{:.3f} s"),
    Column("TTFT p99", "{:.2f} s"),
    Column("mean time", "{:.2f} s"),
)


def _row(name: str, runs: Sequence[_Run]) -> list[Cell]:
    fields = ("peak", "running", "ttft_p50_s", "ttft_p99_s", "latency_s")
    return [name, *(interval([getattr(r, field) for r in runs]) for field in fields)]


def _measure(
    setting: Setting, path: Path, name: str, options: dict[str, Any], progress: Progress
) -> list[_Run]:
    found = []
    for seed in range(options["seeds"]):
        balance = Balance()
        result = scenario.run(
            setting,
            policy(name),
            jobs(thin(read_requests(path, until_s=_UNTIL_S), _KEEP, seed), speed=options["speed"]),
            label=f"{path.name}, {name}, seed {seed}",
            observers=(balance,),
        )
        found.append(
            _Run(
                balance.peak_running,
                balance.running,
                result.ttft_p50_s,
                result.ttft_p99_s,
                result.latency_mean_s,
            )
        )
    progress(f"{path.name}: {name}")
    return found


def _goals(trace: str, found: dict[str, list[_Run]]) -> list[Goal]:
    goals = []
    for what, field, most in (("peak", "peak", _PEAK), ("max/mean of requests running", "running", _RATIO)):
        ours = interval(
            [getattr(a, field) / getattr(b, field) for a, b in zip(found[_OURS], found[_FRESH], strict=True)]
        )
        naive = interval(
            [
                getattr(a, field) / getattr(b, field)
                for a, b in zip(found[_ROWS[1]], found[_ROWS[0]], strict=True)
            ]
        )
        goals.append(
            Goal(
                f"{trace}: {what} with four gateways and loads 200 ms old at most {most:g} x that of a fresh view",
                f"{ours.mean:.3f} ± {ours.half:.3f} (least load: {naive.mean:.2f} ± {naive.half:.2f})",
                ours.mean <= most,
            )
        )
    return goals
