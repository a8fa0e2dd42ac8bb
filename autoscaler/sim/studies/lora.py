"""LoRA adapters on replicas that hold only a few: who misses, and what it costs until the first token.

The requests of a production service that serves fine-tuned models (Alibaba's GenAI trace), once with each model version
as an adapter that all tenants share, once with one adapter per tenant and version. The trace names no LoRA ids.
"""

from __future__ import annotations

import csv
import random
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from autoscaler.sim import scenario
from autoscaler.sim.adapters import AdapterSpec
from autoscaler.sim.balance import Balance
from autoscaler.sim.job import Job
from autoscaler.sim.policies import policy
from autoscaler.sim.replicas import engine_spec, told
from autoscaler.sim.scenario import Setting
from autoscaler.sim.statistics import interval
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import WorkloadError, open_text

HELP = "adapter misses and TTFT on Alibaba's LoRA trace, against LRU and load-only routing"
_MODEL: Final = ("llama-3.1-8b", "l4", 1)
_REPLICAS: Final = 8
_SLOTS: Final = 64
_KEEP: Final = 0.9
_SPEED: Final = 600.0
_BASE_TOKENS, _CHARS, _TOKENS_PER_S = 50, 4, 4
_SHARED, _PRIVATE = 8, 32  # adapters per replica

_OURS: Final = "affinity"
_ROWS: Final = (
    "random",
    "least-load",
    "resident-first",
    "random:by_worth=1",
    "least-load:by_worth=1",
    "affinity:by_worth=0",
    _OURS,
)


@dataclass(frozen=True, slots=True)
class _Request:
    at_s: float
    n_prompt: int
    n_output: int
    version: str
    tenant: str


@dataclass(frozen=True, slots=True)
class _Run:
    misses: float
    ttft_mean_s: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    running: float
    work: float


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--speed", type=float, default=_SPEED, help=f"replay faster by this (default {_SPEED:g})"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    folder = options["traces"] / "serverless"
    requests = list(_read(folder / "alibaba_genai_lora_requests.csv.gz"))
    loads = sorted(_load_times(folder / "alibaba_genai_lora_update_latency.csv.gz"))
    typical_s = loads[len(loads) // 2]

    engine = engine_spec(*_MODEL)
    tables, goals = [], []
    for title, limit, is_private in (
        ("model versions, shared by all tenants", _SHARED, False),
        ("one adapter per tenant and version", _PRIVATE, True),
    ):
        setting = Setting(
            engine,
            _SLOTS,
            _REPLICAS,
            ttft_target_s=2.0,
            adapters=AdapterSpec(limit, load_times(loads), typical_s),
        )
        found = {}
        for name in _ROWS:
            found[name] = [
                _measure(setting, name, requests, is_private, seed, options["speed"])
                for seed in range(options["seeds"])
            ]
            progress(f"{title}: {name}")
        n_adapters = len({_adapter(r, is_private) for r in requests})
        tables.append(
            Table(
                f"{title}: {n_adapters:,} adapters, {limit} per replica",
                _COLUMNS,
                [_row(name, runs) for name, runs in found.items()],
            )
        )
        goals += _goals(title.split(",")[0], found)
    return Study(
        "LoRA: adapter misses and time to the first token",
        {
            "workload": f"Alibaba GenAI requests of 16 days at {options['speed']:g} x their speed (instants spread "
            f"over the second they were rounded to); each seed keeps another {_KEEP:.0%}. An image service's, so "
            f"lengths are a mapping: prompt characters / {_CHARS} + {_BASE_TOKENS} tokens, {_TOKENS_PER_S} output "
            "tokens per second of execution",
            "adapters": "the trace has no LoRA ids: its model versions stand for shared adapters, pairs of tenant and "
            "version for private ones",
            "loads": f"each adapter takes one of the trace's own measured LoRA update times (median {typical_s:.2f} s, "
            f"p99 {loads[int(0.99 * len(loads))]:.1f} s), beside the running batch; one in use is never evicted",
            "house": f"{_REPLICAS} replicas of {told(*_MODEL)}, {_SLOTS} slots; fresh loads",
            "in the house": "the boards of the gateways have the same rule, and hear of adapters from what replicas "
            "say they hold; here they see it at once",
            "rules": "least recently used is evicted; `by_worth` (affinity's own): the least popularity x load time; "
            "resident-first: a replica that has it, else one with room, else the least loaded",
            "runs": f"{options['seeds']} seeds, 95 % intervals",
        },
        tables,
        goals,
    )


def load_times(loads: list[float]) -> Callable[[str], float]:
    """Seconds that an adapter takes to load: one of those measured, always the same for one adapter."""
    return lambda adapter: loads[int(random.Random(f"load:{adapter}").random() * len(loads))]


_COLUMNS: Final = (
    Column("router"),
    Column("misses", "{:.1%}"),
    Column("TTFT mean", "{:.2f} s"),
    Column("p50", "{:.2f} s"),
    Column("p90", "{:.2f} s"),
    Column("p99", "{:.2f} s"),
    Column("running max/mean", "{:.2f}"),
    Column("work max/mean", "{:.2f}"),
)


def _row(name: str, runs: Sequence[_Run]) -> list[Cell]:
    fields = ("misses", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "running", "work")
    return [name, *(interval([getattr(r, field) for r in runs]) for field in fields)]


class _Mean:
    """Mean time to the first token: an observer."""

    def __init__(self) -> None:
        self.sum_s = 0.0

    def on_event(self, world: object) -> None:
        pass

    def on_end(self, world: object, job: Job) -> None:
        self.sum_s += job.ttft_s


def _measure(
    setting: Setting, name: str, requests: list[_Request], is_private: bool, seed: int, speed: float
) -> _Run:
    balance, mean = Balance(), _Mean()
    result = scenario.run(
        setting,
        policy(name if not name.startswith("random") else f"{name}:seed={seed}"),
        _jobs(requests, is_private, seed, speed),
        label=f"{name}, seed {seed}",
        observers=(balance, mean),
    )
    n = result.n_requests
    return _Run(
        result.n_adapter_misses / n,
        mean.sum_s / n,
        result.ttft_p50_s,
        result.ttft_p90_s,
        result.ttft_p99_s,
        balance.running,
        balance.work,
    )


def _jobs(requests: list[_Request], is_private: bool, seed: int, speed: float) -> Iterator[Job]:
    chance = random.Random(seed)
    kept = [replace(r, at_s=r.at_s + chance.random()) for r in requests if chance.random() < _KEEP]
    kept.sort(key=lambda r: r.at_s)
    for number, r in enumerate(kept):
        yield Job(number, r.at_s / speed, r.n_prompt, r.n_output, adapter=_adapter(r, is_private))


def _adapter(request: _Request, is_private: bool) -> str:
    return f"{request.tenant}/{request.version}" if is_private else request.version


def _read(path: Path) -> Iterator[_Request]:
    first_s: float | None = None
    with open_text(path) as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            try:
                at_s = datetime.fromisoformat(row["gmt_create"] + "+00:00").timestamp()
                n_prompt = int(float(row["prompt_length"] or 0)) // _CHARS + _BASE_TOKENS
                n_output = int(float(row["exec_time_seconds"] or 10) * _TOKENS_PER_S)
                version, tenant = row["checkpoint_model_version_id"], row["groupId"]
            except (KeyError, TypeError, ValueError) as error:
                raise WorkloadError(f"{path.name}, line {number}: {type(error).__name__}: {error}") from None
            first_s = at_s if first_s is None else first_s
            yield _Request(at_s - first_s, n_prompt, max(n_output, 1), version, tenant)


def _load_times(path: Path) -> Iterator[float]:
    """Seconds."""
    with open_text(path) as lines:
        for number, row in enumerate(csv.DictReader(lines), start=2):
            try:
                yield float(row["value"]) / 1000
            except (KeyError, TypeError, ValueError) as error:
                raise WorkloadError(f"{path.name}, line {number}: {type(error).__name__}: {error}") from None


def _goals(title: str, found: dict[str, list[_Run]]) -> list[Goal]:
    goals = []
    for what, field in (("misses", "misses"), ("mean TTFT", "ttft_mean_s")):
        for rival in ("random", "least-load"):
            ratio = interval(
                [
                    getattr(a, field) / getattr(b, field)
                    for a, b in zip(found[_OURS], found[rival], strict=True)
                ]
            )
            goals.append(
                Goal(
                    f"{title}: {what} below LRU with {rival} routing",
                    f"{ratio.mean:.3f} ± {ratio.half:.3f} of it",
                    ratio.high < 1,
                )
            )
    return goals
