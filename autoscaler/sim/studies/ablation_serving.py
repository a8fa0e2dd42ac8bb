"""Ingredients of queue, router and adapters off, one at a time, each where it has something to do.

The other half of study ablation, whose workload has one class of service, no prefixes and no adapters. Uses the houses
and workloads of the studies of order, routing and LoRA.
"""

from __future__ import annotations

import statistics
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import Any, Final

from autoscaler.sim.adapters import AdapterSpec
from autoscaler.sim.job import Job
from autoscaler.sim.queues import Fair, Queue, fcfs
from autoscaler.sim.replicas import engine_spec
from autoscaler.sim.scenario import Setting
from autoscaler.sim.statistics import Interval, interval
from autoscaler.sim.studies import lora, ordering, routing
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from controlplane.policy.fairness import AGE_MOST
from controlplane.policy.flows import TOKEN
from controlplane.policy.ordering import QueueOrder

HELP = "what each ingredient of queue, router and adapters is worth, on the workloads of their own studies"
_LOAD: Final = 1.1
_GAMMA, _SHARE = 0.01, 0.95  # as study ordering tunes them
_WINDOW: Final = 100_000
_NEVER_S: Final = 1e9
_ROUTES: Final = {
    "nothing (two gateways, as it runs)": "corral",
    "prefixes (fewest running)": "least-load:gateways=2:age_s=1",
    "gateways telling each other": "affinity:gateways=2:age_s=1:shares=0",
    "load (the longest prefix, whoever is busy)": "sglang:balance_abs_threshold=1000000",
}
_ADAPTERS: Final = {
    "nothing": "affinity",
    "residency (fewest running)": "least-load:by_worth=1",
    "worth (least recently used is evicted)": "affinity:by_worth=0",
}


def add_arguments(parser: ArgumentParser) -> None:
    """None of its own; `lengths` and `requests` are study ordering's."""
    ordering.add_arguments(parser)


def run(options: dict[str, Any], progress: Progress) -> Study:
    queue = _queue(options, progress)
    routes = _routes(options, progress)
    adapters = _adapters(options, progress)
    return Study(
        "Ingredients of queue, router and adapters off, one at a time",
        {
            "queue": f"study ordering's house and requests at load {_LOAD:g}; gamma {_GAMMA:g}, promotion bounded by "
            f"{_SHARE:g} of the P99 wait of first come, first served in its tuning half",
            "routing": "study routing's house, Mooncake conversation, second half",
            "adapters": "study lora's house, one adapter per tenant and version",
            "runs": f"{options['seeds']} seeds, the same for all; changes are paired, ± is the 95 % interval",
        },
        [queue, routes, adapters],
        [_goal(queue, routes, adapters)],
    )


def _queue(options: dict[str, Any], progress: Progress) -> Table:
    data = ordering._read(options)
    seeds = range(options["seeds"])
    fit = [ordering._jobs(data, _LOAD, seed, fit=True) for seed in ordering._FIT_SEEDS]
    most_s = _SHARE * statistics.fmean(ordering._simulate(fcfs(), jobs, data).p99_wait_s for jobs in fit)

    def fair(
        order: QueueOrder = QueueOrder.SJF,
        gamma: float = _GAMMA,
        window: int = _WINDOW,
        age_s: float = most_s / AGE_MOST,
    ) -> Callable[[], Queue]:
        return lambda: Fair(order=order, gamma=gamma, window=window * TOKEN, age_s=age_s)

    def blind(jobs: list[Job]) -> list[Job]:
        mean = round(statistics.fmean(n for n, _ in data.fit))
        for job in jobs:
            job.n_predicted = mean
        return jobs

    variants: dict[str, tuple[Callable[[], Queue], Callable[[list[Job]], list[Job]]]] = {
        "nothing (shortest predicted within the window)": (fair(), list),
        "order (first come inside the window)": (fair(QueueOrder.EDF), list),
        "prediction (all alike)": (fair(), blind),
        "window (tenants exactly equal)": (fair(window=0), list),
        "promotion of who waits long": (fair(age_s=_NEVER_S), list),
        "ageing within the order (gamma)": (fair(gamma=0.0), list),
        "fairness between tenants (one line for all)": (fcfs, list),
    }
    found: dict[str, list[ordering._Run]] = {}
    for name, (make, changed) in variants.items():
        found[name] = [
            ordering._simulate(make(), changed(ordering._jobs(data, _LOAD, seed)), data) for seed in seeds
        ]
        progress(f"queue without {name}")
    whole = next(iter(found.values()))
    rows: list[list[Cell]] = []
    for name, runs in found.items():
        worst = interval([run.worst(base) for run, base in zip(runs, whole, strict=True)])
        rows.append(
            [
                name,
                interval([run.mean_s for run in runs]),
                None if runs is whole else _change(runs, whole, "mean_s"),
                None if runs is whole else _change(runs, whole, "p99_s"),
                None if runs is whole else worst,
            ]
        )
    return Table(
        "Queue without …",
        [
            Column("off"),
            Column("mean completion", "{:.1f} s"),
            Column("change", "{:+.1%}"),
            Column("P99, change", "{:+.1%}"),
            Column("worst tenant's P99, change", "{:+.1%}"),
        ],
        rows,
    )


def _routes(options: dict[str, Any], progress: Progress) -> Table:
    setting = Setting(engine_spec(*routing._MODEL), routing._SLOTS, routing._REPLICAS, ttft_target_s=2.0)
    found = routing._measure(
        options["traces"] / "requests",
        routing._HELD_OUT,
        tuple(_ROUTES.values()),
        options["seeds"],
        setting,
        progress,
    )
    whole = found[next(iter(_ROUTES.values()))]
    rows: list[list[Cell]] = []
    for name, policy in _ROUTES.items():
        runs = found[policy]
        rows.append(
            [
                name,
                interval([run.hits for run in runs]),
                interval([run.latency_s for run in runs]),
                *(
                    None if runs is whole else _change(runs, whole, figure)
                    for figure in ("latency_s", "ttft_p99_s", "running")
                ),
            ]
        )
    return Table(
        "Routing without …",
        [
            Column("off"),
            Column("prefix hits", "{:.1%}"),
            Column("mean time", "{:.2f} s"),
            Column("change", "{:+.1%}"),
            Column("TTFT p99, change", "{:+.1%}"),
            Column("running max/mean, change", "{:+.1%}"),
        ],
        rows,
    )


def _adapters(options: dict[str, Any], progress: Progress) -> Table:
    folder = options["traces"] / "serverless"
    requests = list(lora._read(folder / "alibaba_genai_lora_requests.csv.gz"))
    loads = sorted(lora._load_times(folder / "alibaba_genai_lora_update_latency.csv.gz"))
    setting = Setting(
        engine_spec(*lora._MODEL),
        lora._SLOTS,
        lora._REPLICAS,
        ttft_target_s=2.0,
        adapters=AdapterSpec(lora._PRIVATE, lora.load_times(loads), loads[len(loads) // 2]),
    )
    found: dict[str, list[lora._Run]] = {}
    for name, policy in _ADAPTERS.items():
        found[name] = [
            lora._measure(setting, policy, requests, True, seed, lora._SPEED)
            for seed in range(options["seeds"])
        ]
        progress(f"adapters without {name}")
    whole = next(iter(found.values()))
    rows: list[list[Cell]] = [
        [
            name,
            interval([run.misses for run in runs]),
            interval([run.ttft_mean_s for run in runs]),
            *(
                None if runs is whole else _change(runs, whole, figure)
                for figure in ("misses", "ttft_mean_s", "ttft_p99_s")
            ),
        ]
        for name, runs in found.items()
    ]
    return Table(
        "Adapters without …",
        [
            Column("off"),
            Column("misses", "{:.1%}"),
            Column("mean TTFT", "{:.2f} s"),
            Column("misses, change", "{:+.1%}"),
            Column("mean TTFT, change", "{:+.1%}"),
            Column("p99, change", "{:+.1%}"),
        ],
        rows,
    )


def _change(runs: Sequence[Any], whole: Sequence[Any], figure: str) -> Interval:
    return interval([getattr(r, figure) / getattr(w, figure) - 1 for r, w in zip(runs, whole, strict=True)])


def _goal(*tables: Table) -> Goal:
    """Something must get worse, on average, without each of them."""
    n, idle = 0, []
    for table in tables:
        for row in table.rows[1:]:
            n += 1
            if not any(
                isinstance(cell, Interval) and cell.mean > 0 for cell in row[2 if table is tables[0] else 3 :]
            ):
                idle.append(str(row[0]))
    return Goal(
        "without any ingredient something gets worse, on average",
        f"{n - len(idle)} of {n}",
        not idle,
        f"not for {', '.join(idle)}" if idle else "",
    )
