"""`manage.py bench modelcache`: ten models on one machine with room for three, by what leaves a full cache.

Requests come one after the other by the popularity of Alibaba's image service (GenTD26, 16 days; the ten base models
most asked for): by a law fitted to it, which is in this file, or with `--traces DIRECTORY` by the trace itself. A
request whose model is on the disk starts at once; another waits for its fetch, and before that for room, since what
runs is never evicted. Ours is the store's own rule (workers/modelcache/eviction.py); beside it least recently used, and
the best that anybody could do who knows the future and whose fetches take no time (exact, by dynamic programming).
"""

from __future__ import annotations

import csv
import gzip
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.stats import quantile
from workers.modelcache.eviction import Held, Use, victims

TRACE: Final = "alibaba_genai_lora_requests.csv.gz"
N_MODELS, ROOM = 10, 3
# Fitted to the trace (13,263 requests for its ten most wanted models): Zipf by maximum likelihood; how often a request
# repeats one of the last few, by the share that repeats the very last (0.30) and the hits of an LRU of three (0.65);
# gaps (median 20 s, 90 % below 87 s) and service (median 22 s, mean 27 s) as log-normal.
ZIPF, N_REQUESTS = 1.03, 13_263
P_REPEAT, N_RECENT = 0.33, 3
GAP_MEDIAN_S, GAP_SIGMA, RUN_MEDIAN_S, RUN_SIGMA = 20.0, 1.15, 22.0, 0.64
SETUP_S, BYTES_PER_S = 1.0, 1.25e9  # of a fetch: 10 Gbit/s, what a g6.xlarge has at most
MIXED_GB: Final = (8, 3, 16, 5, 8, 14, 3, 8, 5, 10)  # by popularity; 8 in the mean
ALIKE = 1.05
SETTLES = 300  # requests before counting: everybody begins with an empty disk


@dataclass(frozen=True, slots=True)
class Request:
    at_s: float
    model: int  # 0: the most wanted
    run_s: float


@dataclass(frozen=True, slots=True)
class Result:
    waits_s: tuple[float, ...]  # of each counted request
    n_fetched: int
    fetched_bytes: int
    n_running_evicted: int


Evict = Callable[[Sequence[Held], dict[str, float], int, float], tuple[str, ...] | None]


def ours(
    held: Sequence[Held], last_s: dict[str, float], n_bytes: int, now_s: float
) -> tuple[str, ...] | None:
    """The store's rule."""
    return victims(held, n_bytes, now_s, bytes_per_s=BYTES_PER_S)


def lru(held: Sequence[Held], last_s: dict[str, float], n_bytes: int, now_s: float) -> tuple[str, ...] | None:
    """Least recently used of what does not run."""
    chosen, n_freed = [], 0
    for each in sorted((h for h in held if not h.in_use), key=lambda h: last_s[h.digest]):
        if n_freed >= n_bytes:
            break
        chosen.append(each.digest)
        n_freed += each.size_bytes
    return tuple(chosen) if n_freed >= n_bytes else None


def measure(
    *,
    repeats: int = 7,
    traces: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """The report that `--json` prints. repeats: seeds of the fitted law; a trace is one."""
    if traces is not None:
        days = [read_trace(traces)]
        source = "the trace's ten most wanted base models"
    else:
        days = [fitted(seed) for seed in range(repeats)]
        source = f"the law fitted to it, {repeats} seeds"
    cases = {}
    for name, sizes in (("equal", [8 * 10**9] * N_MODELS), ("mixed", [gb * 10**9 for gb in MIXED_GB])):
        room = ROOM * sum(sizes) // N_MODELS
        progress(f"{name} sizes: {len(days)} × {len(days[0])} requests")
        played = {policy.__name__: [play(day, sizes, room, policy) for day in days] for policy in (ours, lru)}
        best = [best_hits(day, sizes, room) for day in days]
        cases[name] = {
            **{policy: _figures(results) for policy, results in played.items()},
            "optimum_hit_rate": round(_median(best), 4),
            "room_bytes": room,
        }
    return {
        "assumptions": {
            "requests": source,
            "models": N_MODELS,
            "room": f"{ROOM} of mean size",
            "fetch": f"{SETUP_S:g} s + size at {BYTES_PER_S / 1e6:.0f} MB/s",
            "mixed_gb": MIXED_GB,
        },
        **cases,
        "goals": _goals(cases),
    }


def play(requests: Iterable[Request], sizes: Sequence[int], room: int, evict: Evict) -> Result:
    """One machine's disk through all requests, in order of arrival."""
    machine = _Machine(sizes, room, evict)
    waits = [machine.serve(request) for request in requests]
    return Result(tuple(waits[SETTLES:]), machine.n_fetched, machine.fetched_bytes, machine.n_running_evicted)


@dataclass
class _Machine:
    """What is on the disk from when on, and what runs until when. Fetches are one after the other, as on one link."""

    sizes: Sequence[int]
    room: int
    evict: Evict
    there_s: dict[int, float] = field(default_factory=dict)  # model -> since when, or when its fetch ends
    runs_until_s: dict[int, float] = field(default_factory=dict)
    uses: dict[int, Use] = field(default_factory=dict)
    last_s: dict[str, float] = field(default_factory=dict)
    link_free_s: float = 0.0
    n_fetched: int = 0
    fetched_bytes: int = 0
    n_running_evicted: int = 0

    def serve(self, request: Request) -> float:
        """Seconds it waits for its model."""
        model, now_s = request.model, request.at_s
        # Only what has come counts as used: the same moments as the store's claims.
        if model not in self.there_s:
            begins_s = self._make_room(max(now_s, self.link_free_s), self.sizes[model])
            fetch_s = SETUP_S + self.sizes[model] / BYTES_PER_S
            self.there_s[model] = self.link_free_s = begins_s + fetch_s
            self.n_fetched += 1
            self.fetched_bytes += self.sizes[model]
            self._use(model, now_s, fetch_s)
        else:
            self._use(model, now_s)
        starts_s = max(now_s, self.there_s[model])
        self.runs_until_s[model] = max(self.runs_until_s.get(model, 0.0), starts_s + request.run_s)
        return starts_s - now_s

    def _use(self, model: int, now_s: float, fetch_s: float = 0.0) -> None:
        use = self.uses.get(model, Use()).seen(now_s)
        self.uses[model] = Use(use.score, use.at_s, fetch_s or use.fetch_s)
        self.last_s[str(model)] = now_s

    def _make_room(self, now_s: float, n_bytes: int) -> float:
        """When there is room: at once, or when enough of what runs has ended."""
        while True:
            held = [
                Held(str(m), self.sizes[m], self.uses[m], self.runs_until_s.get(m, 0.0) > now_s)
                for m in self.there_s
            ]
            lacking = n_bytes - (self.room - sum(h.size_bytes for h in held))
            if lacking <= 0:
                return now_s
            leaving = self.evict(held, self.last_s, lacking, now_s)
            if leaving is None:
                now_s = min(end for m, end in self.runs_until_s.items() if m in self.there_s and end > now_s)
                continue
            for digest in leaving:
                self.n_running_evicted += self.runs_until_s.get(int(digest), 0.0) > now_s
                del self.there_s[int(digest)]


def fitted(seed: int, n: int = N_REQUESTS) -> list[Request]:
    """Requests by the law above."""
    dice = random.Random(seed)
    weights = [1 / k**ZIPF for k in range(1, N_MODELS + 1)]
    recent: deque[int] = deque(maxlen=N_RECENT)
    now_s, found = 0.0, []
    for _ in range(n):
        if recent and dice.random() < P_REPEAT:
            model = dice.choice(recent)
        else:
            model = dice.choices(range(N_MODELS), weights)[0]
        recent.append(model)
        now_s += dice.lognormvariate(math.log(GAP_MEDIAN_S), GAP_SIGMA)
        found.append(Request(now_s, model, dice.lognormvariate(math.log(RUN_MEDIAN_S), RUN_SIGMA)))
    return found


def read_trace(directory: Path) -> list[Request]:
    """The ten base models most asked for; ValueError where the directory has no such trace."""
    path = next(iter(sorted(directory.rglob(TRACE))), None)
    if path is None:
        raise ValueError(f"--traces {directory}: no {TRACE} in it")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [
            (
                datetime.fromisoformat(row["gmt_create"]).timestamp(),
                row["checkpoint_model_version_id"],
                float(row["exec_time_seconds"] or 0),
            )
            for row in csv.DictReader(file)
            if row["checkpoint_model_version_id"]
        ]
    ranks = {m: n for n, (m, _) in enumerate(Counter(m for _, m, _ in rows).most_common(N_MODELS))}
    rows.sort()
    return [Request(at_s - rows[0][0], ranks[m], run_s) for at_s, m, run_s in rows if m in ranks]


def best_hits(requests: Sequence[Request], sizes: Sequence[int], room: int) -> float:
    """The largest share of requests whose model can be there, over every way to choose what stays.

    States are the sets of models that fit; evicting no earlier than at a miss loses nothing.
    """
    models = range(len(sizes))
    states = [
        frozenset(found)
        for n in range(len(sizes) + 1)
        for found in itertools.combinations(models, n)
        if sum(sizes[m] for m in found) <= room
    ]
    index = {state: n for n, state in enumerate(states)}
    # From a state without m to one with it: some of what was there stays.
    moves: dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    for m in models:
        pairs = [
            (index[before], index[after])
            for after in states
            if m in after
            for before in states
            if m not in before and after - {m} <= before
        ]
        pairs.sort(key=lambda pair: pair[1])
        froms = np.array([a for a, _ in pairs])
        starts = [0] + [n for n in range(1, len(pairs)) if pairs[n][1] != pairs[n - 1][1]]
        targets = np.array([pairs[n][1] for n in starts])
        moves[m] = froms, np.array(starts), targets
    misses = np.full(len(states), np.inf)
    misses[index[frozenset()]] = 0
    counted = 0.0
    for n, request in enumerate(requests):
        if n == SETTLES:
            counted = float(misses.min())
        froms, firsts, targets = moves[request.model]
        after = np.full(len(states), np.inf)
        after[targets] = np.minimum(misses[targets], np.minimum.reduceat(misses[froms], firsts) + 1)
        misses = after
    n_counted = len(requests) - SETTLES
    return 1 - (float(misses.min()) - counted) / n_counted


def _figures(results: Sequence[Result]) -> dict[str, Any]:
    hits = [sum(w == 0 for w in r.waits_s) / len(r.waits_s) for r in results]
    waits = [w for r in results for w in r.waits_s]
    cold = [w for w in waits if w > 0]
    return {
        "hit_rate": round(_median(hits), 4),
        "hit_rate_range": [round(min(hits), 4), round(max(hits), 4)],
        "wait_mean_s": round(sum(waits) / len(waits), 3),
        "wait_p99_s": round(quantile(waits, 0.99), 2),
        "cold_p50_s": round(quantile(cold, 0.5), 2),
        "cold_p99_s": round(quantile(cold, 0.99), 2),
        "fetched_tb": round(sum(r.fetched_bytes for r in results) / len(results) / 1e12, 2),
        "n_running_evicted": sum(r.n_running_evicted for r in results),
    }


def _goals(cases: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for name in ("equal", "mixed"):
        mine, other = cases[name]["ours"], cases[name]["lru"]
        found += [
            {"figure": f"{name}: hit rate at least LRU's", "median": mine["hit_rate"],
             "reached": mine["hit_rate"] >= other["hit_rate"]},
            # It is made by who else waits for the link, and differs by a percent or two either way between seeds.
            {"figure": f"{name}: p99 of a cold hit at most {ALIKE} × LRU's", "median": mine["cold_p99_s"],
             "reached": mine["cold_p99_s"] <= ALIKE * other["cold_p99_s"]},
            {"figure": f"{name}: running versions evicted", "goal_at_most": 0,
             "median": mine["n_running_evicted"], "reached": mine["n_running_evicted"] == 0},
        ]  # fmt: skip
    return found


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def as_text(report: dict[str, Any]) -> str:
    told = report["assumptions"]
    lines = [
        f"{told['models']} models, room for {told['room']}; {told['requests']}; a fetch: {told['fetch']}"
    ]
    for name in ("equal", "mixed"):
        case = report[name]
        lines.append(f"{name} sizes, optimum that knows the future: {case['optimum_hit_rate']:.1%} hits")
        for policy in ("ours", "lru"):
            f = case[policy]
            low, high = f["hit_rate_range"]
            lines.append(
                f"  {policy:5} {f['hit_rate']:.1%} hits ({low:.1%} to {high:.1%}); wait mean {f['wait_mean_s']:.2f} s, "
                f"p99 {f['wait_p99_s']:.1f} s; a cold hit p50 {f['cold_p50_s']:.1f} s, p99 {f['cold_p99_s']:.1f} s; "
                f"{f['fetched_tb']:.1f} TB fetched; {f['n_running_evicted']} running evicted"
            )
    lines += [
        f"{goal['figure']}: {goal['median']}: " + ("reached" if goal["reached"] else "NOT reached")
        for goal in report["goals"]
    ]
    return "\n".join(lines)
