"""Idle policies on the arrivals of a serverless model service: cold starts against what idling costs."""

from __future__ import annotations

import csv
import gzip
import random
from argparse import ArgumentParser
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from autoscaler.policy.ladder import Stakes
from autoscaler.sim.idle import Books, Call, Idle, Ladder, replay
from autoscaler.sim.idle_policies import RUNGS, kept_alive, policies
from autoscaler.sim.statistics import Interval, interval
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import WorkloadError

HELP = "warm ladder against fixed keep-alive, always on, zero and the hybrid histogram: late share, idle cost"
_DAY_S = 86400.0
_FIT_S, _END_S = 8 * _DAY_S, 17 * _DAY_S
_KEPT = 0.8  # of the tenants, by seed
_WORTH = (0.25, 4.0, 16.0, 64.0)  # times the stakes, for the frontier
_KEEP_ALIVE_S = (60.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0)

_COLUMNS = (
    Column("policy"),
    Column("late", "{:.1f} %"),
    Column("wait p99", "{:.0f} s"),
    Column("idle cost", "{:.0f} USD"),
    Column("in all", "{:.0f} USD"),
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--late-usd", type=float, default=0.02, help="worth of a late request (default 0.02)")
    parser.add_argument(
        "--late-usd-per-s", type=float, default=0.002, help="and of each second of it (default 0.002)"
    )
    parser.add_argument(
        "--ttft-s", type=float, default=2.0, help="target time to the first token (default 2)"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    everything = read_calls(options["traces"] / "serverless" / "alibaba_genai_lora_requests.csv.gz")
    stakes = Stakes(options["ttft_s"], options["late_usd"], options["late_usd_per_s"], RUNGS[0].usd_per_h)
    found: dict[str, list[Books]] = defaultdict(list)
    frontier: dict[str, list[Books]] = defaultdict(list)
    tuned: list[float] = []
    for seed in range(options["seeds"]):
        calls = _kept(everything, seed)
        best_s = min(
            _KEEP_ALIVE_S,
            key=lambda s: _books(calls, kept_alive(s), stakes, 0.0, _FIT_S).total_usd,
        )
        tuned.append(best_s)
        for name, make in policies(stakes, best_s).items():
            found[name].append(_books(calls, make, stakes, _FIT_S, _END_S))
        for factor in _WORTH:
            more = replace(
                stakes, late_usd=stakes.late_usd * factor, late_usd_per_s=stakes.late_usd_per_s * factor
            )
            frontier[f"ladder, stakes x {factor:g}"].append(
                _books(calls, lambda m=more: Ladder(RUNGS, m), stakes, _FIT_S, _END_S)  # type: ignore[misc]
            )
        for seconds in _KEEP_ALIVE_S:
            name = f"keep-alive {seconds:g} s"
            frontier[name].append(_books(calls, kept_alive(seconds), stakes, _FIT_S, _END_S))
        progress(
            f"seed {seed}: {found['ladder'][-1].n_requests:,} requests, keep-alive tuned to {best_s:g} s"
        )
    return _study(found, frontier, tuned, stakes)


def read_calls(path: Path) -> dict[tuple[str, str], list[Call]]:
    """Calls by (model, tenant), in order of time; seconds from midnight of the first day."""
    found: dict[tuple[str, str], list[Call]] = defaultdict(list)
    try:
        with gzip.open(path, "rt", newline="") as file:
            rows = [
                (datetime.fromisoformat(r["gmt_create"]), r["checkpoint_model_version_id"], r)
                for r in csv.DictReader(file)
            ]
        start = min(at for at, _, _ in rows).replace(hour=0, minute=0, second=0)
        for at, model, row in rows:
            runs_s = float(row["exec_time_seconds"] or 0.0)
            found[model, row["groupId"]].append(Call((at - start).total_seconds(), runs_s))
    except (KeyError, TypeError, ValueError) as error:
        raise WorkloadError(
            f"{path.name}: needs gmt_create, checkpoint_model_version_id, groupId, exec_time_seconds: {error}"
        ) from None
    return {key: sorted(calls, key=lambda c: c.at_s) for key, calls in sorted(found.items())}


def _kept(everything: dict[tuple[str, str], list[Call]], seed: int) -> list[list[Call]]:
    """Calls by model of a share of the tenants: another service of the same kind."""
    rng = random.Random(seed)
    tenants = sorted({tenant for _, tenant in everything})
    stay = set(rng.sample(tenants, round(len(tenants) * _KEPT)))
    by_model: dict[str, list[Call]] = defaultdict(list)
    for (model, tenant), calls in everything.items():
        if tenant in stay:
            by_model[model] += calls
    return [sorted(calls, key=lambda c: (c.at_s, c.runs_s)) for _, calls in sorted(by_model.items())]


def _books(
    calls: list[list[Call]], make: Callable[[], Idle], stakes: Stakes, from_s: float, until_s: float
) -> Books:
    return replay(calls, make, stakes, count_from_s=from_s, until_s=until_s)


def _p99_s(books: Books) -> float:
    waits = sorted(books.waits_s)
    return waits[min(int(0.99 * len(waits)), len(waits) - 1)] if waits else 0.0


def _ratio(ours: list[Books], theirs: list[Books]) -> Interval:
    return interval([a.total_usd / b.total_usd for a, b in zip(ours, theirs, strict=True)])


def _row(name: str, books: list[Books]) -> list[Cell]:
    return [
        name,
        interval([100 * b.n_late / max(b.n_requests, 1) for b in books]),
        interval([_p99_s(b) for b in books]),
        interval([b.idle_usd for b in books]),
        interval([b.total_usd for b in books]),
    ]


def _study(
    found: dict[str, list[Books]], frontier: dict[str, list[Books]], tuned: list[float], stakes: Stakes
) -> Study:
    rows: list[list[Cell]] = [
        [*_row(name, books), _ratio(books, found["ladder"])] for name, books in found.items()
    ]
    shares: list[list[Cell]] = [
        [rung, interval([b.usd_by_rung.get(rung, 0.0) for b in found["ladder"]])]
        for rung in (*(r.name for r in RUNGS), "waking")
    ]
    goals = [
        Goal(
            f"ladder costs less in all than {name}",
            f"{_ratio(found['ladder'], found[name]).mean:.2f} ± "
            f"{_ratio(found['ladder'], found[name]).half:.2f} of it",
            _ratio(found["ladder"], found[name]).high < 1,
        )
        for name in found
        if name != "ladder"
    ]
    rungs = "; ".join(f"{r.name} {r.usd_per_h:g} USD/h, {r.wake_s:g} s" for r in RUNGS)
    return Study(
        "Where an idle deployment's spare rests",
        {
            "workload": "alibaba_genai_lora_requests.csv.gz: 78 base models of an image service, 17 days, 15,630 "
            "requests in all; each model is a deployment with one spare",
            "runs": f"{len(tuned)} seeds, each with {_KEPT:.0%} of the tenants; counted from day 8 on, the days before "
            "are history, and what the tuned keep-alive was chosen on",
            "rungs (price, time to wake)": rungs
            + ". Prices relative to a serving GPU of 1 USD/h and times of the "
            "order measured (facts of vLLM's start, ServerlessLLM's loads, a cloud machine's boot): assumptions",
            "stakes": f"first token within {stakes.ttft_target_s:g} s; a late request costs {stakes.late_usd:g} USD "
            f"and {stakes.late_usd_per_s:g} USD for each second of it, a waking machine "
            f"{stakes.waking_usd_per_h:g} USD/h",
            "keep-alive tuned to": ", ".join(f"{s:g}" for s in sorted(set(tuned))) + " s",
            "cost": "resting, climbing and waking; running is the same for all. In all: with the late requests",
        },
        [
            Table("Policies", [*_COLUMNS, Column("of the ladder's", "{:.2f}")], rows),
            Table(
                "Fewer late requests for more money",
                _COLUMNS,
                [_row(name, books) for name, books in frontier.items()],
            ),
            Table(
                "Where the ladder's idle cost goes", [Column("rung"), Column("cost", "{:.1f} USD")], shares
            ),
        ],
        goals,
    )
