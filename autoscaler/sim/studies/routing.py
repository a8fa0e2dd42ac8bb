"""Which share of the prompts routing finds in the replicas' caches, and how evenly it loads them.

Recorded conversations with the hashes of their prompts' blocks, over replicas that are simply there. Every rival sees
fresh loads here (the herd study takes that away); ours is judged as it runs, two gateways with loads up to a second
old. Nobody's slots are ever full, so none is overruled.
"""

from __future__ import annotations

import random
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from autoscaler.sim import cachebound, scenario
from autoscaler.sim.balance import Balance
from autoscaler.sim.policies import policy
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.replicas import engine_spec, told
from autoscaler.sim.scenario import Setting
from autoscaler.sim.statistics import Interval, interval
from autoscaler.sim.studies.base import Cell, Column, Goal, Progress, Study, Table
from autoscaler.sim.workload import Arrival, jobs, read_requests, thin
from controlplane.policy.routing import Ask, Board, ReplicaLoad

HELP = "prefix hits and balance of routers on Mooncake's conversations, against bounds at the same memory"
_MODEL: Final = ("llama-3.1-70b", "h200_sxm", 4)
_REPLICAS: Final = 8
_SLOTS: Final = 256
_KEEP: Final = 0.9  # of the conversations, another choice by seed
_SHARE: Final = 0.9  # of the bound, to be reached


@dataclass(frozen=True, slots=True)
class _Load:
    """A trace: `speed` times as fast as recorded; instants are spread over `grain_s`, to which they were rounded."""

    title: str
    file: str
    speed: float
    grain_s: float
    from_s: float = 0.0


_CONVERSATION = _Load("conversation", "mooncake_conversation.jsonl.gz", 1.5, 3.0)
# What the weights of controlplane/policy/routing.py were fitted on is its first half.
_HELD_OUT = replace(_CONVERSATION, title="conversation, second half", from_s=1080.0)
_SYNTHETIC = _Load("synthetic", "mooncake_synthetic.jsonl", 1.0, 0.001)

_OURS, _FRESH, _PRECISE = "corral", "affinity", "affinity:every_block=1"
_GATEWAYS: Final = ("affinity:gateways=4:age_s=1", "affinity:gateways=4:age_s=1:shares=0")
_PLAIN: Final = ("round-robin", "p2c", "least-load", "llumnix")
_SGLANG: Final = tuple(
    f"sglang:cache_threshold={share}:balance_abs_threshold={most}:miss_by_load={by_load}"
    for share in (0.1, 0.3, 0.5)
    for most in (4, 16, 64)
    for by_load in (0, 1)
)
_DYNAMO: Final = tuple(f"dynamo:overlap_weight={weight}" for weight in (0.5, 1.0, 2.0, 4.0, 8.0, 32.0))


@dataclass(frozen=True, slots=True)
class _Run:
    hits: float
    of_bound: float
    of_best: float
    work: float
    windows: float
    running: float
    ttft_p50_s: float
    ttft_p99_s: float
    latency_s: float


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--speed", type=float, default=1.0, help="replay faster by this factor (default 1)")
    parser.add_argument(
        "--memory", type=float, default=1.0, help="KV per replica, times the GPU's (default 1)"
    )


def run(options: dict[str, Any], progress: Progress) -> Study:
    engine = engine_spec(*_MODEL)
    engine = replace(engine, kv_tokens=int(engine.kv_tokens * options["memory"]))
    setting = Setting(engine, _SLOTS, _REPLICAS, ttft_target_s=2.0)
    folder, seeds = options["traces"] / "requests", options["seeds"]

    def measure(
        load: _Load, names: Sequence[str], n_seeds: int, house: Setting = setting
    ) -> dict[str, list[_Run]]:
        load = replace(load, speed=load.speed * options["speed"])
        return _measure(folder, load, names, n_seeds, house, progress)

    swept = measure(_CONVERSATION, (*_SGLANG, *_DYNAMO), min(seeds, 2))
    best_sglang, best_dynamo = _best(swept, "sglang"), _best(swept, "dynamo")
    rivals = tuple(dict.fromkeys(("sglang", best_sglang, "dynamo", best_dynamo)))
    names = (*_PLAIN, *rivals, _OURS, _FRESH, _PRECISE)
    main = measure(_CONVERSATION, (*names, *_GATEWAYS), seeds)
    held_out = measure(_HELD_OUT, ("sglang", _OURS, _FRESH), seeds)
    other = measure(_SYNTHETIC, names, seeds)
    memory: list[list[Cell]] = []
    for factor in (0.25, 0.5, 2.0):
        house = replace(setting, engine=replace(engine, kv_tokens=int(engine.kv_tokens * factor)))
        found = measure(_CONVERSATION, ("sglang", _OURS), min(seeds, 4), house)
        memory += [[f"x {factor:g}", *row[:7]] for row in _rows(found)]
    return Study(
        "Routing: prefix hits and balance",
        {
            "workload": f"Mooncake request traces, conversation at {_CONVERSATION.speed * options['speed']:g} x its "
            f"speed (instants spread over the 3 s they were rounded to), synthetic at {options['speed']:g} x; each "
            f"seed keeps another {_KEEP:.0%} of the conversations",
            "house": f"{_REPLICAS} replicas of {told(*_MODEL)}, {engine.kv_tokens:,} tokens of KV each; {_SLOTS} "
            "slots, never full; a prompt's whole blocks of 512 tokens are shared",
            "hits": "prompt tokens found cached over all prompt tokens",
            "bound": "hits of one cache with the memory of all replicas, reached by every request, least recently used "
            "forgotten first as the engines do; `with foresight`: the same memory, forgetting what is needed last "
            "(Belady), which no engine can; neither pays for running requests",
            "load": "busiest replica over the mean: tokens computed in the run; in windows of 60 s; requests running "
            "(mean over time)",
            "corral": "as it runs: two gateways, each with a board of its own that knows a prompt's beginnings at the "
            "lengths a gateway hashes (up to 32,768 tokens), reads the loads once a second, and hears a tenth of a "
            "second later what the other placed. Its weights were fitted on the first half of the conversation trace",
            "affinity": "the same board in one gateway that sees every change at once; `every_block`: prefixes known "
            "at each block; `gateways=4`: of four; `shares=0`: gateways that do not tell each other",
            "rivals": "sglang and dynamo with their defaults, and with the knobs of the sweep that gave the lowest "
            "mean time of a request; Dynamo is told exactly what each cache holds",
            "runs": f"{seeds} seeds, 95 % intervals; sweep {min(seeds, 2)}, memory {min(seeds, 4)}",
        },
        [
            _table("Conversation", _rows(main)),
            _table("Conversation, second half (held out)", _rows(held_out)),
            _table("Synthetic (held out)", _rows(other)),
            Table(
                "Conversation with other memory per replica",
                [Column("memory"), *_COLUMNS[:7]],
                memory,
            ),
            _table("Sweep of the rivals' knobs, conversation", _rows(swept)),
            _bounds(folder, (_CONVERSATION, _SYNTHETIC), engine.kv_tokens),
            _decision_table(),
        ],
        [
            *_goals(_CONVERSATION.title, main),
            *_goals(_HELD_OUT.title, held_out),
            *_goals(_SYNTHETIC.title, other),
        ],
    )


_COLUMNS: Final = (
    Column("router"),
    Column("hits", "{:.1%}"),
    Column("of the bound", "{:.3f}"),
    Column("of foresight", "{:.3f}"),
    Column("work max/mean", "{:.3f}"),
    Column("in 60 s", "{:.3f}"),
    Column("running max/mean", "{:.3f}"),
    Column("TTFT p50", "{:.2f} s"),
    Column("TTFT p99", "{:.1f} s"),
    Column("mean time", "{:.2f} s"),
)


def _table(title: str, rows: Sequence[Sequence[Cell]]) -> Table:
    return Table(title, _COLUMNS, rows)


def _rows(found: dict[str, list[_Run]]) -> list[list[Cell]]:
    names = (
        "hits",
        "of_bound",
        "of_best",
        "work",
        "windows",
        "running",
        "ttft_p50_s",
        "ttft_p99_s",
        "latency_s",
    )
    return [[name, *(_interval(runs, n) for n in names)] for name, runs in found.items()]


def _interval(runs: list[_Run], name: str) -> Interval:
    return interval([getattr(r, name) for r in runs])


def _measure(
    folder: Path, load: _Load, names: Sequence[str], seeds: int, setting: Setting, progress: Progress
) -> dict[str, list[_Run]]:
    found: dict[str, list[_Run]] = {name: [] for name in names}
    for seed in range(seeds):
        arrivals = _arrivals(folder, load, seed)
        n_blocks = setting.replicas * setting.engine.kv_tokens // BLOCK
        bound = cachebound.least_recent(arrivals, n_blocks)
        best = cachebound.clairvoyant(arrivals, n_blocks)
        for name in names:
            balance = Balance()
            label = f"{load.title}, {name}, seed {seed}"
            result = scenario.run(
                setting,
                policy(name),
                jobs(iter(arrivals), speed=load.speed),
                label=label,
                observers=(balance,),
            )
            hits = result.hit_ratio
            found[name].append(
                _Run(
                    hits,
                    hits / bound,
                    hits / best,
                    balance.work,
                    balance.windows,
                    balance.running,
                    result.ttft_p50_s,
                    result.ttft_p99_s,
                    result.latency_mean_s,
                )
            )
        progress(f"{load.title}, seed {seed}: {len(names)} routers")
    return found


def _arrivals(folder: Path, load: _Load, seed: int) -> list[Arrival]:
    """Another sample of whole conversations, and another place of each within the grain of its instant."""
    chance = random.Random(f"{load.file}:{seed}")
    kept = thin(read_requests(folder / load.file, start_s=load.from_s), _KEEP, seed)
    spread = [
        replace(arrival, at_s=arrival.at_s - load.from_s + chance.random() * load.grain_s) for arrival in kept
    ]
    return sorted(spread, key=lambda a: a.at_s)


def _best(swept: dict[str, list[_Run]], kind: str) -> str:
    return min(
        (name for name in swept if name.startswith(kind)),
        key=lambda name: statistics.fmean(r.latency_s for r in swept[name]),
    )


def _goals(title: str, found: dict[str, list[_Run]]) -> list[Goal]:
    ours, theirs = found[_OURS], found["sglang"]
    share = _interval(ours, "of_bound")
    goals = [
        Goal(
            f"{title}: hits at least {_SHARE:g} of the bound at the same memory",
            f"{share.mean:.3f} ± {share.half:.3f}",
            share.low >= _SHARE,
        )
    ]
    loads: tuple[tuple[str, Callable[[_Run], float]], ...] = (
        ("requests running", lambda r: r.running),
        ("work", lambda r: r.work),
    )
    for name, value in loads:
        more = interval([value(a) - value(b) for a, b in zip(ours, theirs, strict=True)])
        mean = statistics.fmean(map(value, ours)), statistics.fmean(map(value, theirs))
        goals.append(
            Goal(
                f"{title}: max/mean of {name} at most SGLang's",
                f"{mean[0]:.3f} against {mean[1]:.3f} (difference {more.mean:+.3f} ± {more.half:.3f})",
                more.mean <= 0,
            )
        )
    return goals


def _bounds(folder: Path, loads: Sequence[_Load], kv_tokens: int) -> Table:
    rows: list[list[Cell]] = []
    for load in loads:
        arrivals = list(read_requests(folder / load.file))
        endless = cachebound.infinite(arrivals)
        for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
            n = int(_REPLICAS * kv_tokens * factor) // BLOCK
            least, best = cachebound.least_recent(arrivals, n), cachebound.clairvoyant(arrivals, n)
            rows.append([load.title, f"x {factor:g}", n * BLOCK, least, best, endless])
    columns = [
        Column("trace"),
        Column("memory"),
        Column("tokens in all", "{:,}"),
        Column("bound", "{:.1%}"),
        Column("with foresight", "{:.1%}"),
        Column("infinite", "{:.1%}"),
    ]
    return Table("Bounds of the whole traces", columns, rows)


def _decision_table() -> Table:
    """CPU time of `Board.rank` for eight candidates, prompts of four to ten known prefixes; best of five passes."""
    rows: list[list[Cell]] = []
    for n in (8, 16, 32, 64):
        board, chance = Board(2_000_000), random.Random(n)
        board.see({f"r{i:03}": ReplicaLoad(f"r{i:03}", "m", chance.randrange(8), 32) for i in range(n)})
        asks = []
        for talk in range(500):
            depth = chance.randrange(4, 11)
            lengths = [64 << level for level in range(depth)]
            asks.append(Ask(lengths[-1], [f"{talk % 150}:{level}" for level in range(depth)], lengths))
        for turn, ask in enumerate(asks):
            board.started(board.bound(board.rank(ask, 1, turn=turn)[0], ask, turn * 0.01))
        passes = []
        for _ in range(5):
            began_s = time.process_time()
            for turn, ask in enumerate(asks):
                board.rank(ask, turn=turn)
            passes.append((time.process_time() - began_s) / len(asks))
        rows.append([str(n), min(passes) * 1e6])
    return Table("One decision", [Column("replicas"), Column("CPU time", "{:.1f} µs")], rows)
