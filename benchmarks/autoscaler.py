"""How long one pass of the autoscaler over a whole cell takes, and the fleet-wide purchase plan beside it.

The pass is policy/fleet.py: what is observed goes in, commands come out, each deployment decided by the code that
decides it live. Measured in CPU seconds of one core at a tenth, a third and the whole of the asked size, with a minute
of history in every memory. The plan is measured against its own time limit.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from autoscaler.policy.diversify import Need, greedy
from autoscaler.policy.fleet import Seen, decide_all
from autoscaler.policy.tail import Offer, events
from autoscaler.purchase import plan
from autoscaler.types import (
    Decision,
    MachineState,
    MachineView,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerMemory,
    ScalerSpec,
)

PLAN_LIMIT_S = 30.0
_TYPES = ((0.8, 1), (1.2, 1), (2.0, 2), (4.0, 4), (7.0, 6), (11.0, 8))  # USD an hour on demand, replicas held
_ZONES = 5
_NEEDS = 12
_GAP_S = 180.0  # from a loss to its replacement, less the notice
_PER_MACHINE = 4
_SLOTS = 32
_TICK_S = 5.0
_HISTORY_TICKS = 13  # more than the stable window
_MOST = 10_000  # replicas a specification allows
_SHARES = (0.1, 1 / 3, 1.0)


def measure(
    *,
    repeats: int,
    progress: Callable[[str], object],
    replicas: int = 10_000,
    deployments: int = 1000,
    limit_s: float = PLAN_LIMIT_S,
) -> dict[str, Any]:
    """CPU seconds of a pass by size; `replicas` at least as many as `deployments`."""
    sizes = []
    for share in _SHARES:
        n_replicas, n_deployments = max(round(replicas * share), 1), max(round(deployments * share), 1)
        sizes.append(_size(n_replicas, n_deployments, repeats))
        progress(f"{n_replicas:,} replicas of {n_deployments:,} deployments: {sizes[-1]['pass_s']:.3f} s")
    for size in sizes:
        size["us_per_replica"] = size["pass_s"] / size["replicas"] * 1e6
    whole = sizes[-1]
    one = _size(min(replicas, _MOST), 1, repeats)
    one["us_per_replica"] = one["pass_s"] / one["replicas"] * 1e6
    bought = _purchase(replicas, limit_s)
    progress(f"purchase plan: {bought['programme_s']:.1f} s")
    return {
        "one_deployment": one,
        "purchase": bought,
        "sizes": sizes,
        "whole_over_tenth_per_replica": whole["us_per_replica"] / sizes[0]["us_per_replica"],
        "whole_over_third_per_replica": whole["us_per_replica"] / sizes[1]["us_per_replica"],
    }


def as_text(report: dict[str, Any]) -> str:
    lines = ["One pass over all deployments, one core, CPU seconds (median)"]
    for size in (*report["sizes"], report["one_deployment"]):
        lines.append(
            f"  {size['replicas']:>7,} replicas, {size['deployments']:>6,} deployments, {size['machines']:>6,} "
            f"machines: {size['pass_s']:.3f} s (worst {size['worst_s']:.3f}), {size['us_per_replica']:.0f} µs a "
            f"replica, {size['commands']} commands"
        )
    lines.append(
        f"  time per replica, whole size over a third and over a tenth: "
        f"{report['whole_over_third_per_replica']:.2f}, {report['whole_over_tenth_per_replica']:.2f} (1 = linear)"
    )
    bought = report["purchase"]
    lines += [
        f"Purchase plan for {report['sizes'][-1]['replicas']:,} replicas: {bought['needs']} needs, {bought['offers']} "
        "offers, at most 0.1 % short",
        f"  greedy {bought['greedy_s']:.1f} s, {bought['greedy_usd_per_h']:,.0f} USD/h; programme: limit "
        f"{bought['limit_s']:g} s, took {bought['programme_s']:.1f} s in all, "
        f"{bought['usd_per_h']:,.0f} USD/h",
        f"  {bought['verdict']}",
    ]
    return "\n".join(lines)


def _purchase(n_replicas: int, limit_s: float) -> dict[str, Any]:
    """The whole cell at once: needs that fit three types each, on a market of types x zones x {spot, on-demand}."""
    rng = random.Random(0)
    zones = [f"z{i}" for i in range(_ZONES)]
    offers = []
    for i, (usd, _) in enumerate(_TYPES):
        for zone in zones:
            offers.append(Offer(f"t{i}-{zone}-od", zone, usd * rng.uniform(0.98, 1.05), n_replicas))
            spot_usd = usd * rng.uniform(0.25, 0.6)
            n_most, losses_per_h = n_replicas // len(_TYPES), rng.uniform(0.02, 0.4)
            offers.append(Offer(f"t{i}-{zone}", zone, spot_usd, n_most, losses_per_h))
    weights = [rng.random() ** 2 + 0.05 for _ in range(_NEEDS)]
    needs = []
    for i, weight in enumerate(weights):
        first = rng.randrange(len(_TYPES) - 2)
        units = {o.name: _TYPES[t][1] for t in range(first, first + 3) for o in offers if o.name[1] == str(t)}
        needs.append(Need(f"n{i:02d}", round(n_replicas * weight / sum(weights)), units))
    found = events(offers, _GAP_S)
    began_s = time.perf_counter()
    quick = greedy(needs, offers, found)
    greedy_s = time.perf_counter() - began_s
    began_s = time.perf_counter()
    made = plan(needs, offers, found, time_limit_s=limit_s)
    return {
        "needs": _NEEDS,
        "offers": len(offers),
        "limit_s": limit_s,
        "greedy_s": greedy_s,
        "programme_s": time.perf_counter() - began_s,
        "greedy_usd_per_h": quick.usd_per_h,
        "usd_per_h": made.usd_per_h,
        "bound_usd_per_h": made.bound_usd_per_h,
        "solver": made.solver.value,
        "unmet": list(made.unmet),
        "verdict": made.reasons[0],
    }


def _size(n_replicas: int, n_deployments: int, repeats: int) -> dict[str, Any]:
    cell = _Cell(n_replicas, n_deployments)
    for _ in range(_HISTORY_TICKS):
        cell.pass_()
    times, n_commands = [], 0
    for _ in range(repeats):
        seen, machines = cell.seen(), cell.machines
        began_s = time.process_time()
        decisions = decide_all(seen, machines)
        times.append(time.process_time() - began_s)
        cell.remember(decisions)
        n_commands += sum(len(d.commands) for d in decisions)
    return {
        "replicas": n_replicas,
        "deployments": n_deployments,
        "machines": len(cell.machines),
        "pass_s": statistics.median(times),
        "worst_s": max(times),
        "commands": round(n_commands / repeats),
    }


class _Cell:
    """Deployments of unequal size (the largest holds a few per cent) under load that moves at every look."""

    def __init__(self, n_replicas: int, n_deployments: int) -> None:
        self.rng = random.Random(0)
        self.now_s = 1_000_000.0
        n_machines = -(-n_replicas // _PER_MACHINE) + n_deployments // 10 + 1
        rooms = [f"{i:032x}" for i in range(n_machines) for _ in range(_PER_MACHINE)]
        self.rng.shuffle(rooms)
        used: dict[str, int] = {}
        self.replicas: list[list[ReplicaView]] = [[] for _ in range(n_deployments)]
        for i in range(n_replicas):
            # The first n go one to each, the rest by a Pareto-like draw.
            home = i if i < n_deployments else int(n_deployments * self.rng.random() ** 2)
            used[rooms[i]] = used.get(rooms[i], 0) + 1
            self.replicas[home].append(self._replica(f"{i:032x}", rooms[i]))
        leaving = set(self.rng.sample(range(n_machines), n_machines // 100))
        self.machines = tuple(
            MachineView(
                mid,
                MachineState.DRAINING if i in leaving else MachineState.READY,
                _PER_MACHINE - used.get(mid, 0),
                used.get(mid, 0),
                0.0,
                None if mid in used else 0.0,
                self.now_s + 100.0 if i in leaving else None,
            )
            for i, mid in enumerate(f"{i:032x}" for i in range(n_machines))
        )
        self.specs = [
            ScalerSpec(1, 1, min(2 * len(r) + 2, _MOST), 300.0, _SLOTS, max_machines=_MOST)
            for r in self.replicas
        ]
        self.memories = [ScalerMemory() for _ in self.replicas]
        self.load = [self.rng.uniform(0.2, 0.9) for _ in self.replicas]

    def _replica(self, rid: str, mid: str) -> ReplicaView:
        phase = ReplicaPhase.READY if self.rng.random() < 0.97 else ReplicaPhase.LOADING
        return ReplicaView(rid, mid, phase, self.now_s - 100, self.now_s - 100, _SLOTS)

    def seen(self) -> list[Seen]:
        """What would be observed `_TICK_S` after the last look."""
        self.now_s += _TICK_S
        found = []
        for i, replicas in enumerate(self.replicas):
            self.load[i] = min(max(self.load[i] + self.rng.uniform(-0.1, 0.1), 0.0), 1.2)
            busy = min(round(self.load[i] * _SLOTS), _SLOTS)
            views = tuple(
                replace(r, used=busy, slots_now=_SLOTS, beat_seq=int(self.now_s), n_requests_total=busy)
                for r in replicas
            )
            n_queued = round(max(self.load[i] - 1, 0) * _SLOTS * len(replicas))
            observation = Observation(self.now_s, f"{i:032x}", n_queued, views)
            found.append(Seen(observation, self.specs[i], self.memories[i]))
        self.rng.shuffle(found)
        return found

    def remember(self, decisions: tuple[Decision, ...]) -> None:
        """Memories go on; orders are not carried out, so that every pass has the same size."""
        self.memories = [d.memory for d in decisions]

    def pass_(self) -> None:
        self.remember(decide_all(self.seen(), self.machines))
