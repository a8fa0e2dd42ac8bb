"""What the watcher remembers of slots: per replica while it lives, per deployment for those that come after it."""

from __future__ import annotations

from typing import Any, cast

from autoscaler.cell import ReplicaReading
from autoscaler.models import ReplicaPhase
from autoscaler.watch.slots import SlotKeeper
from autoscaler.watch.table import KnownReplica
from workers.contract import Heartbeat
from workers.engine.steps import StepWindow


class FakeCell:
    """Takes every change, or refuses all (`answer` -1)."""

    def __init__(self) -> None:
        self.answer = 0
        self.changes: list[tuple[str, int, int]] = []

    def resize(self, replica: str, *, was: int, slots: int, why: str) -> int:
        self.changes.append((replica, was, slots))
        return self.answer


def known(rid: str, slots: int = 16, deployment: str = "d1") -> KnownReplica:
    return KnownReplica(rid, "m1", deployment, slots, ReplicaPhase.READY, itl_ms=100)


def slow(keeper: SlotKeeper, replica: KnownReplica, slots: int, n_beats: int = 6) -> None:
    """Beats of a replica that keeps 300 ms with all its slots taken."""
    for n in range(n_beats):
        window = StepWindow()
        window.add(300.0, slots, 0, n_steps=20)
        beat = Heartbeat(
            machine="m1", seq=n, at_ms=n, replica=replica.id, slots=replica.slots, n_steps=20,
            itl_counts=window.take().buckets,
        )  # fmt: skip
        reading = ReplicaReading("ready", slots, slots, True, beat)
        keeper.adapt({replica.id: replica}, {replica.id: reading}, {}, ("d1",), n / 2)


def test_a_later_replica_of_the_deployment_begins_with_what_was_learned() -> None:
    cell = FakeCell()
    keeper = SlotKeeper(cast(Any, cell))
    assert keeper.slots_for(known("r1"), 16) == 16
    slow(keeper, known("r1"), 16, n_beats=4)
    assert cell.changes == [("r1", 16, 8)]
    assert keeper.slots_for(known("r1"), 16) == 8
    assert keeper.slots_for(known("r2"), 16) == 8
    assert keeper.slots_for(known("r2"), 3) == 3  # a machine may offer fewer
    assert keeper.slots_for(known("r3", deployment="d2"), 16) == 16
    assert keeper.slots_for(known("r4", slots=32), 32) == 32  # another engine profile


def test_a_change_that_the_cell_refuses_is_not_remembered() -> None:
    cell = FakeCell()
    cell.answer = -1
    keeper = SlotKeeper(cast(Any, cell))
    slow(keeper, known("r1"), 16, n_beats=4)
    assert cell.changes
    assert keeper.slots_for(known("r1"), 16) == 16
    assert keeper.slots_for(known("r2"), 16) == 16


def test_what_was_learned_outlives_replicas_and_ends_with_the_deployment() -> None:
    keeper = SlotKeeper(cast(Any, FakeCell()))
    slow(keeper, known("r1"), 16, n_beats=4)
    keeper.adapt({}, {}, {}, ("d1", "d2"), 10.0)  # scaled to zero
    assert keeper.slots_for(known("r2"), 16) == 8
    keeper.adapt({}, {}, {}, ("d2",), 11.0)
    assert keeper.slots_for(known("r2"), 16) == 16
