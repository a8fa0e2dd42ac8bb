"""Commands against fresh rows: what is no longer true is not carried out, and nothing is carried out twice."""

from __future__ import annotations

import threading
from uuid import UUID, uuid4

import pytest
from django.db import connections
from django.utils import timezone

from autoscaler import launch, records
from autoscaler.act import act
from autoscaler.models import Machine, MachineState, Replica, ReplicaPhase
from autoscaler.types import Command, DrainReplica, StartReplica, StopReplica
from tests.autoscaler.conftest import Scaling
from workers.contract import MACHINE_STOPPED, ReplicaStatus
from workers.contract import ReplicaPhase as Reported


def _do(scaling: Scaling, command: Command) -> bool:
    return act(command, scaling.seen(), scaling.provider, scaling.house.config, scaling.house.cell)


def _launch(scaling: Scaling, command_id: UUID) -> Machine | None:
    return launch.launch(command_id, scaling.provider, scaling.house.config, scaling.house.cell)


def _start(machine: Machine) -> StartReplica:
    return StartReplica(uuid4().hex, machine.id.hex)


def test_the_pool_is_never_exceeded_whatever_was_decided(scaling: Scaling) -> None:
    scaling.configure(max_machines=2)
    machines = [_launch(scaling, uuid4()) for _ in range(4)]
    assert [machine is not None for machine in machines] == [True, True, False, False]
    assert {machine.pool_slot for machine in machines if machine} == {0, 1}
    assert scaling.provider.n_launch_calls == 2


def test_a_command_given_again_answers_the_machine_of_the_first_time(scaling: Scaling) -> None:
    command_id = uuid4()
    first = _launch(scaling, command_id)
    assert first is not None
    assert _launch(scaling, command_id) == first
    assert scaling.provider.n_launch_calls == 1


def test_a_place_is_free_again_when_its_machine_is_gone(scaling: Scaling) -> None:
    first = _launch(scaling, uuid4())
    assert first is not None
    launch.mark_gone(first.id, "test")
    assert _launch(scaling, uuid4()) is not None


@pytest.mark.parametrize("same_command", [True, False])
def test_racing_launches_end_in_one_machine(scaling: Scaling, same_command: bool) -> None:
    commands = [uuid4()] * 6 if same_command else [uuid4() for _ in range(6)]
    barrier, found = threading.Barrier(6), []

    def run(command_id: UUID) -> None:
        try:
            barrier.wait(10)
            found.append(_launch(scaling, command_id))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(command_id,)) for command_id in commands]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert Machine.objects.count() == 1
    assert len(scaling.provider.machines) == 1
    assert len({machine.id for machine in found if machine}) == 1
    assert len([m for m in found if m]) == (6 if same_command else 1)
    assert scaling.machine_up().state == MachineState.READY  # what it was given fits its row


def test_a_full_machine_takes_no_more_whatever_was_decided(scaling: Scaling) -> None:
    scaling.configure(replicas_per_machine=2)
    machine = _launch(scaling, uuid4())
    assert machine is not None
    assert [_do(scaling, _start(machine)) for _ in range(3)] == [True, True, False]


def test_racing_starts_do_not_overfill_a_machine(scaling: Scaling) -> None:
    scaling.configure(replicas_per_machine=2)
    machine = _launch(scaling, uuid4())
    assert machine is not None
    barrier, done = threading.Barrier(6), []

    def run() -> None:
        try:
            barrier.wait(10)
            done.append(_do(scaling, _start(machine)))
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert (done.count(True), Replica.objects.count()) == (2, 2)


def test_a_machine_says_itself_how_much_it_holds(scaling: Scaling) -> None:
    machine = _launch(scaling, uuid4())
    assert machine is not None
    Machine.objects.update(capabilities={"max_replicas": 1})
    assert [_do(scaling, _start(machine)) for _ in range(2)] == [True, False]
    Machine.objects.update(capabilities={"max_replicas": "lots"})  # nonsense: the pool's default
    assert _do(scaling, _start(machine))


def test_nothing_is_started_on_a_machine_that_leaves(scaling: Scaling) -> None:
    machine = _launch(scaling, uuid4())
    assert machine is not None
    Machine.objects.update(state=MachineState.DRAINING)
    assert not _do(scaling, _start(machine))


def test_nothing_is_started_for_a_deployment_that_changed_or_went(scaling: Scaling) -> None:
    machine = _launch(scaling, uuid4())
    assert machine is not None
    stale = scaling.seen()
    scaling.change(max_replicas=3)
    house = scaling.house
    assert not act(_start(machine), stale, scaling.provider, house.config, house.cell)
    scaling.change(deleted_at=timezone.now(), phase="deleted")
    assert not _do(scaling, _start(machine))
    assert Replica.objects.count() == 0


def test_drain_and_stop_are_once(scaling: Scaling) -> None:
    replica = scaling.serving()
    drain = DrainReplica(uuid4().hex, replica.id.hex, "test")
    stop = StopReplica(uuid4().hex, replica.id.hex, "test", failure_code="start_timeout")
    assert [_do(scaling, drain), _do(scaling, drain)] == [True, False]
    assert [_do(scaling, stop), _do(scaling, stop)] == [True, False]
    assert scaling.replica().phase == ReplicaPhase.FAILED
    assert not _do(scaling, drain)
    assert scaling.replica().phase == ReplicaPhase.FAILED


def test_reports_that_are_late_or_of_others_change_nothing(scaling: Scaling) -> None:
    replica = scaling.serving()
    assert scaling.report(replica, Reported.LOADING) is None
    status = ReplicaStatus(replica=replica.id.hex, phase=Reported.FAILED)
    assert records.replica_reported(uuid4(), status, scaling.house.cell) is None
    assert scaling.replica().phase == ReplicaPhase.READY
    assert scaling.report(replica, Reported.FAILED, "engine_died") == scaling.deployment.id
    assert scaling.report(replica, Reported.READY) is None
    assert scaling.replica().phase == ReplicaPhase.FAILED


def test_a_machine_that_was_stopped_is_no_failure_of_what_it_ran(scaling: Scaling) -> None:
    """`down` and `up` follow each other: the next request starts a replica at once, however often."""
    replica = scaling.serving()
    for _ in range(7):
        assert scaling.report(replica, Reported.STOPPED, MACHINE_STOPPED, "its machine was stopped")
        assert scaling.replica().phase == ReplicaPhase.STOPPED
        scaling.tick()
        successor = scaling.replica()
        assert successor.id != replica.id, "the queue still waits: the next one starts at once"
        scaling.report(successor, Reported.READY)
        replica = successor
    assert scaling.seen().last_error == ""


def test_a_stop_that_nobody_ordered_is_a_failure(scaling: Scaling) -> None:
    replica = scaling.serving()
    scaling.report(replica, Reported.STOPPED)
    assert scaling.replica().phase == ReplicaPhase.FAILED
    assert scaling.replica().reason_code == "stopped"


def test_overlong_words_of_a_machine_are_cut(scaling: Scaling) -> None:
    replica = scaling.serving()
    scaling.report(replica, Reported.FAILED, "c" * 1000, "m" * 10_000)
    ended = scaling.replica()
    assert (len(ended.reason_code), len(ended.reason_message)) == (64, 500)
    scaling.tick()
    assert len(scaling.seen().last_error) <= 500
