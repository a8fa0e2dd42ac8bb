"""What a fleet of several kinds of GPU costs against the best fleet of one kind, at the same promises kept.

Plans are made from one half of each length file and judged, by simulation, on the other.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autoscaler.gpumix import cheapest
from autoscaler.policy.gpumix import Fleet, Kind, Promise, single
from autoscaler.sim.pools import Kept, judge, poisson, sized
from autoscaler.sim.replicas import kinds
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import read_sizes
from controlplane.policy.gpus import PRICES

HELP = "cost of a mix of GPU types against the best single type, on three length mixes, promises kept"
_GPUS = ("l4", "a10g", "l40s", "a100_sxm", "h100_sxm")
_PROMISES = {"interactive": Promise(0.05, 2.0), "relaxed": Promise(0.12, 4.0)}
_KEPT = 0.99
_PLANNED = 0.995  # on the planning half: other requests of the same kind do a little worse
_WARM_S = 30.0
_N_JUDGED = 5000  # requests of a run, about
Sizes = Sequence[tuple[int, int]]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--rates", default="4,16,64", help="requests per second (default 4,16,64)")


def run(options: dict[str, Any], progress: Progress) -> Study:
    offered = kinds(options["model"], _GPUS)
    rates = [float(rate) for rate in options["rates"].split(",")]
    mixes = _mixes(options["traces"] / "lengths")
    rows: list[list[Cell]] = []
    savings: list[tuple[str, float]] = []
    worst = 1.0
    for name, promise in _PROMISES.items():
        for mix, (given, held) in mixes.items():
            for rate in rates:
                label = f"{name}, {mix}, {rate:g}/s"
                plans = {}
                for which, choose in (("mix", cheapest), ("single", single)):
                    plan = sized(
                        choose, offered, given, rate, promise, kept_share=_PLANNED, seconds=_seconds(rate)
                    )
                    if plan is not None:
                        fleet, _, wanted = plan
                        kept = _judged(fleet, offered, wanted, held, rate, promise, options["seeds"])
                        plans[which] = fleet, interval([k.both for k in kept])
                progress(
                    f"{label}: {', '.join(f'{w} {_told(p[0])}' for w, p in plans.items()) or 'nothing can'}"
                )
                if len(plans) < 2:
                    rows.append([name, mix, rate, None, None, None, None, None, None, None])
                    continue
                (mixed, share), (alone, alone_share) = plans["mix"], plans["single"]
                saving = 1 - mixed.usd_per_h / alone.usd_per_h
                savings.append((mix, saving))
                worst = min(worst, share.mean)
                cells: list[Cell] = [_told(mixed), mixed.usd_per_h, share, _told(alone), alone.usd_per_h]
                rows.append([name, mix, rate, *cells, alone_share, saving])
    return _study(options, offered, rows, savings, worst)


def _mixes(folder: Path) -> dict[str, tuple[Sizes, Sizes]]:
    """By name: sizes to plan with, and those to judge by (every other row of each file)."""
    chat = read_sizes(folder / "sharegpt_lengths.csv.gz")
    documents = read_sizes(folder / "arxiv_summarization_lengths.csv")
    dice = random.Random(1)
    halves = {}
    for start, name in enumerate(("given", "held")):
        c, d = chat[start::2], documents[start::2]
        halves[name] = c, d, dice.sample(c, 8000) + dice.sample(d, 2000)
    names = ("chat", "documents", "mixed")
    return {name: (halves["given"][i], halves["held"][i]) for i, name in enumerate(names)}


def _seconds(rate: float) -> float:
    return _WARM_S + _N_JUDGED / rate


def _judged(
    fleet: Fleet,
    offered: Sequence[Kind],
    wanted: Any,
    sizes: Sizes,
    rate: float,
    promise: Promise,
    seeds: int,
) -> list[Kept]:
    return [
        judge(
            fleet, offered, wanted, poisson(sizes, rate, _seconds(rate), seed), promise, seed, warm_s=_WARM_S
        )
        for seed in range(seeds)
    ]


def _told(fleet: Fleet) -> str:
    return " + ".join(f"{n} {name}" for name, n in sorted(fleet.replicas.items()))


def _study(
    options: dict[str, Any],
    offered: Sequence[Kind],
    rows: list[list[Cell]],
    savings: list[tuple[str, float]],
    worst: float,
) -> Study:
    best = {mix: max(s for m, s in savings if m == mix) for mix in dict(savings)}
    columns = [
        Column("promise"), Column("lengths"), Column("requests/s", "{:g}"), Column("mix"), Column("USD/h", "{:.2f}"),
        Column("kept", "{:.2%}"), Column("best single type"), Column("its USD/h", "{:.2f}"),
        Column("its kept", "{:.2%}"), Column("saving", "{:.1%}"),
    ]  # fmt: skip
    prices = ", ".join(f"{name} {PRICES[name].usd_per_h:g}" for name in _GPUS)
    return Study(
        "GPU mix by request size",
        {
            "model": f"{options['model']}, 16-bit weights, one GPU per replica, fitted step times (manage.py perf_fit)",
            "prices": f"USD an hour and GPU, AWS us-east-1 on demand, list of 2026-07-20: {prices}; a100_sxm is an "
            "eighth of the only instance that has it",
            "promises": "; ".join(
                f"{name}: mean gap within {p.itl_s * 1e3:g} ms and first token within {p.ttft_s:g} s, both for "
                f"{_KEPT:.0%} of the requests" for name, p in _PROMISES.items()
            ),
            "lengths": "chat: ShareGPT; documents: arXiv summarisation; mixed: four of chat to one document; planned "
            "with every other row, judged on the rest",
            "plan": "buckets by prompt and answer length, shares by mixed-integer programme (autoscaler/gpumix.py); "
            f"replicas filled as far as a simulation of the planning half keeps {_PLANNED:.1%} (50 to 95 %), the "
            "single type's too",
            "judged": f"Poisson arrivals, about {_N_JUDGED:,} requests a run after {_WARM_S:g} s, {options['seeds']} "
            "seeds, 95 % intervals; no machine is lost, none is booted",
        },
        [Table("Cost at the same promises", columns, rows)],
        [
            Goal(
                "the mix is nowhere dearer than the best single type",
                f"saves {min(s for _, s in savings):.1%} to {max(s for _, s in savings):.1%}",
                all(s >= -1e-9 for _, s in savings),
            ),
            Goal(
                "on each of the three length mixes it is cheaper at some rate",
                ", ".join(f"{mix} at best {s:.1%}" for mix, s in best.items()),
                all(s > 0 for s in best.values()),
                "" if all(s > 0 for s in best.values()) else "one kind serves these sizes best at every rate tried",
            ),
            Goal(
                f"the mix keeps its promises to {_KEPT:.0%} of the requests on lengths it was not planned with",
                f"worst row {worst:.2%}",
                worst >= _KEPT,
            ),
        ],
    )  # fmt: skip
