"""A deployment on a clock for policy tests: say what is there, walk through time, read what was ordered."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from autoscaler.policy.comeback import Stopping, StopTimes
from autoscaler.policy.decide import decide
from autoscaler.types import (
    Decision,
    Failure,
    MachineState,
    MachineView,
    Observation,
    ReplicaPhase,
    ReplicaView,
    ScalerMemory,
    ScalerSpec,
)

T0 = 1_000_000.0


def spec(**overrides: Any) -> ScalerSpec:
    """Zero to four replicas of ten slots, seven wanted busy, idle after 60 s, room for two machines."""
    values: dict[str, Any] = {
        "generation": 1,
        "min_replicas": 0,
        "max_replicas": 4,
        "idle_timeout_s": 60.0,
        "slots": 10,
        "max_machines": 2,
    }
    return ScalerSpec(**{**values, **overrides})


def replica(rid: str, phase: ReplicaPhase = ReplicaPhase.READY, **overrides: Any) -> ReplicaView:
    values: dict[str, Any] = {
        "machine_id": "m1",
        "created_at_s": T0,
        "phase_at_s": T0,
        "slots": 10,
        "used": 0,
        "beat_seq": 1,
    }
    return ReplicaView(rid, phase=phase, **{**values, **overrides})


def machine(mid: str = "m1", n_free: int = 4, **overrides: Any) -> MachineView:
    values: dict[str, Any] = {"state": MachineState.READY, "n_replicas": 0, "created_at_s": T0}
    return MachineView(mid, n_free=n_free, **{**values, **overrides})


def failure(at_s: float, code: str = "engine_died", **overrides: Any) -> Failure:
    return Failure(f"r{at_s:g}", at_s, code, "it broke", **overrides)


@dataclass
class Scene:
    """One deployment through time. Beats move by themselves unless `frozen` names the replica."""

    spec: ScalerSpec = field(default_factory=spec)
    now_s: float = T0
    n_queued: int | None = 0
    replicas: tuple[ReplicaView, ...] = ()
    machines: tuple[MachineView, ...] = ()
    failures: tuple[Failure, ...] = ()
    machine_failures: tuple[Failure, ...] = ()
    stopped: tuple[str, ...] = ()
    stopping: tuple[Stopping, ...] = ()
    stop_times: StopTimes = field(default_factory=StopTimes)
    last_good_at_s: float | None = None
    memory: ScalerMemory = field(default_factory=ScalerMemory)
    frozen: frozenset[str] = frozenset()

    def observation(self) -> Observation:
        beat = int(self.now_s * 2)
        return Observation(
            now_s=self.now_s,
            deployment_id="d1",
            n_queued=self.n_queued,
            replicas=tuple(r if r.id in self.frozen else replace(r, beat_seq=beat) for r in self.replicas),
            machines=self.machines,
            n_machines=sum(1 for m in self.machines if m.ends_at_s is None),
            failures=self.failures,
            machine_failures=self.machine_failures,
            stopped=self.stopped,
            stopping=self.stopping,
            stop_times=self.stop_times,
            last_good_at_s=self.last_good_at_s,
        )

    def tick(self, after_s: float = 5.0) -> Decision:
        """Move the clock, decide, remember."""
        self.now_s += after_s
        decision = decide(self.observation(), self.spec, self.memory)
        self.memory = decision.memory
        return decision

    def tick_for(self, duration_s: float) -> Decision:
        """Ticks every 5 s for that long; the last decision."""
        decision = self.tick()
        for _ in range(int(duration_s / 5) - 1):
            decision = self.tick()
        return decision


def kinds(decision: Decision) -> list[str]:
    return [command.KIND for command in decision.commands]
