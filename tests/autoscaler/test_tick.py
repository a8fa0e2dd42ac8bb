"""Ticks on real rows: launched once, started once, stored whole, replayed exactly, leased."""

from datetime import timedelta
from typing import Any

import pytest
from django.utils import timezone

from autoscaler import reconcile, timings
from autoscaler.models import Decision, Machine, MachineState, Replica, ReplicaPhase, ScalerState
from autoscaler.tick import replay, stored_commands, tick
from autoscaler.types import StageName
from controlplane.deployments.models import Deployment, Phase
from controlplane.policy import coming
from tests.autoscaler.conftest import Scaling
from workers.contract import ReplicaPhase as Reported


def test_idle_deployment_orders_nothing_and_says_so(scaling: Scaling) -> None:
    scaling.tick()
    assert scaling.seen().phase == Phase.IDLE
    assert Machine.objects.count() == 0


def test_a_waiting_request_buys_a_machine_and_places_a_replica_on_it_at_once(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    machine, replica = scaling.machine(), scaling.replica()
    assert (machine.state, machine.provider_ref) == (MachineState.PENDING, "ref-1")
    assert (replica.phase, replica.machine_id, replica.slots) == (ReplicaPhase.STARTING, machine.id, 4)
    desired = scaling.house.cell.read_desired(machine.id.hex)
    assert desired == {"generation": "", replica.id.hex: ""}
    assert scaling.house.cell.redis.llen(scaling.house.cell.keys.machine(machine.id.hex).bell) == 1
    assert scaling.house.cell.last_stage(scaling.deployment.id.hex) == ("launching_machine", "")
    assert scaling.seen().phase == Phase.STARTING


def test_a_deployment_of_another_cell_is_that_cells_business(scaling: Scaling) -> None:
    """Two cells share Postgres: each would take the other's replicas, which it cannot see in its Redis, for dead."""
    from autoscaler.watch import table

    scaling.queue("a")
    Deployment.objects.filter(id=scaling.deployment.id).update(cell="c1")
    scaling.tick()
    assert Machine.objects.count() == Decision.objects.count() == 0
    assert table.read("c0", 1).deployments == () and len(table.read("c1", 1).deployments) == 1
    Deployment.objects.filter(id=scaling.deployment.id).update(cell="c0")
    scaling.tick()
    assert Machine.objects.count() == 1


def test_ticking_twice_launches_and_starts_once(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    scaling.tick()
    assert (scaling.provider.n_launch_calls, Machine.objects.count(), Replica.objects.count()) == (1, 1, 1)


def test_a_tick_whose_memory_was_lost_repeats_no_command(scaling: Scaling) -> None:
    """Died after acting, before anything could be remembered: the same commands come again, by the same name."""
    from autoscaler.act import act
    from autoscaler.types import LaunchMachine

    scaling.queue("a")
    scaling.tick()
    for row in Decision.objects.all():
        for command in stored_commands(row):
            act(command, scaling.seen(), scaling.provider, scaling.house.config, scaling.house.cell)
    assert (Machine.objects.count(), Replica.objects.count(), len(scaling.provider.machines)) == (1, 1, 1)
    assert any(isinstance(c, LaunchMachine) for row in Decision.objects.all() for c in stored_commands(row))


def test_a_lost_reply_of_the_provider_ends_in_one_machine(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.provider.lose_reply = True
    with pytest.raises(TimeoutError):
        scaling.tick()
    machine = scaling.machine()
    assert (machine.state, machine.provider_ref) == (MachineState.PENDING, "")
    scaling.tick()  # counts on the machine that may be there
    assert Machine.objects.count() == 1
    reconcile.reconcile(scaling.house)
    assert scaling.machine().provider_ref == "ref-1"
    assert len(scaling.provider.machines) == 1


def test_a_machine_that_was_never_asked_for_is_asked_for_again_with_the_same_token(scaling: Scaling) -> None:
    """Died between row and provider."""
    scaling.queue("a")
    scaling.provider.lose_reply = True
    with pytest.raises(TimeoutError):
        scaling.tick()
    machine = scaling.machine()
    scaling.provider.machines.clear()
    Machine.objects.update(created_at=timezone.now() - timedelta(seconds=60))
    reconcile.reconcile(scaling.house)
    assert [m.client_token for m in scaling.provider.machines.values()] == [machine.command_id.hex]
    assert scaling.machine_up().state == MachineState.READY  # with the fresh proof


def test_every_stored_decision_replays_exactly(scaling: Scaling) -> None:
    scaling.serving()
    scaling.tick()
    scaling.change(min_replicas=0, max_replicas=3)
    scaling.queue(*(f"r{i}" for i in range(40)))
    scaling.tick()
    rows = list(Decision.objects.all())
    assert len(rows) >= 3
    for row in rows:
        assert replay(row).commands == stored_commands(row)
        assert row.reasons


def test_quiet_ticks_leave_no_rows(scaling: Scaling) -> None:
    scaling.serving()
    scaling.tick()
    n = Decision.objects.count()
    for _ in range(3):
        scaling.tick()
    assert Decision.objects.count() == n


def test_a_held_lease_makes_the_tick_step_back_and_an_expired_one_does_not(scaling: Scaling) -> None:
    scaling.tick()
    state = ScalerState.objects.filter(deployment_id=scaling.deployment.id)
    state.update(lease_owner="other", lease_until=timezone.now() + timedelta(seconds=60))
    scaling.queue("a")
    assert scaling.tick().busy
    assert Machine.objects.count() == 0
    state.update(lease_until=timezone.now() - timedelta(seconds=1))
    assert not scaling.tick().busy
    assert Machine.objects.count() == 1


def test_a_decision_that_cannot_be_stored_is_neither_remembered_nor_acted_on(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler import tick as ticking

    def fail(*_: object) -> None:
        raise RuntimeError("no space left")

    scaling.queue("a")
    monkeypatch.setattr(ticking, "_store", fail)
    with pytest.raises(RuntimeError, match="no space left"):
        scaling.tick()
    state = ScalerState.objects.get(deployment_id=scaling.deployment.id)
    assert (state.memory, state.lease_until, Machine.objects.count()) == ({}, None, 0)


def test_a_lease_lost_while_deciding_means_nothing_is_done(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler import tick as ticking

    real = ticking.observe

    def slow(*args: Any) -> Any:
        ScalerState.objects.update(version=77, lease_owner="other")
        return real(*args)

    scaling.queue("a")
    monkeypatch.setattr(ticking, "observe", slow)
    with pytest.raises(ticking.LeaseLostError):
        scaling.tick()
    state = ScalerState.objects.get(deployment_id=scaling.deployment.id)
    assert (state.version, state.lease_owner) == (77, "other")
    assert (Machine.objects.count(), Decision.objects.count()) == (0, 0)


def test_the_pool_never_exceeds_its_machines_even_for_two_deployments(scaling: Scaling) -> None:
    from autoscaler.tick import tick
    from controlplane.deployments import services

    other = services.create_deployment(
        organization_id=scaling.world.organization.id,
        project_id=scaling.world.project.id,
        name="other",
        model_version_id=scaling.deployment.model_version_id,
        engine_profile={"engine": "toy"},
        min_replicas=1,
    )
    scaling.queue("a")
    scaling.tick()
    tick(other.id, scaling.house)
    assert Machine.objects.count() == 1
    assert Replica.objects.count() == 2  # reuse first


def test_no_room_is_said_to_the_owner_and_later_to_clients(scaling: Scaling) -> None:
    scaling.configure(replicas_per_machine=1)
    scaling.serving()
    scaling.change(min_replicas=2, max_replicas=2)
    scaling.tick()
    seen = scaling.seen()
    assert seen.phase == Phase.READY
    assert seen.last_error == "no room for 1 replicas: all 1 of 1 machines are full"


def test_a_provider_without_machines_is_named_and_not_asked_all_the_time(scaling: Scaling) -> None:
    scaling.provider.refuse = True
    scaling.queue("a")
    now = (
        timezone.now()
    )  # the same for all: on a busy computer five ticks take longer than the first back-off
    for _ in range(5):
        tick(scaling.deployment.id, scaling.house, now)
    assert scaling.provider.n_launch_calls == 1  # back-off
    seen = scaling.seen()
    assert seen.phase == Phase.FAILED
    assert "machine_unavailable: no_capacity: none left; retrying in 1 s (1 of 5)" in seen.last_error


def test_a_failed_start_is_retried_with_back_off_and_told(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    scaling.machine_up()
    replica = scaling.replica()
    scaling.report(replica, Reported.FAILED, "bad_weights", "model.safetensors is damaged")
    scaling.tick()
    seen = scaling.seen()
    assert seen.phase == Phase.FAILED
    assert seen.last_error == ("failed: bad_weights: model.safetensors is damaged; retrying in 1 s (1 of 5)")
    assert scaling.house.cell.last_stage(scaling.deployment.id.hex) == ("failed", "bad_weights")
    assert Replica.objects.count() == 1
    Replica.objects.update(stopped_at=timezone.now() - timedelta(seconds=2))
    scaling.tick()
    assert Replica.objects.count() == 2
    assert scaling.seen().phase == Phase.STARTING


def test_after_five_failures_it_stays_failed_until_the_deployment_changes(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    scaling.machine_up()
    for n in range(5):
        scaling.report(scaling.replica(), Reported.FAILED, "engine_died", "killed")
        if n < 4:
            Replica.objects.update(stopped_at=timezone.now() - timedelta(seconds=100))
            scaling.tick()
    Replica.objects.update(stopped_at=timezone.now() - timedelta(seconds=100))
    scaling.tick()
    assert Replica.objects.count() == 5
    assert "gave up after 5 attempts" in scaling.seen().last_error
    assert scaling.house.cell.last_stage(scaling.deployment.id.hex) == ("failed", "engine_died")
    scaling.change(idle_timeout_s=61)
    scaling.tick()
    assert Replica.objects.count() == 6


def test_a_deleted_deployment_loses_its_replicas(scaling: Scaling) -> None:
    replica = scaling.serving()
    scaling.change(deleted_at=timezone.now(), phase=Phase.DELETED)
    scaling.tick()
    assert scaling.replica().phase == ReplicaPhase.DRAINING
    assert scaling.house.cell.read_desired(replica.machine_id.hex)[replica.id.hex] == "drain"
    assert (
        scaling.house.cell.redis.hget(scaling.house.cell.keys.replica(replica.id.hex), "state") == b"draining"
    )
    scaling.report(replica, Reported.STOPPED)
    assert scaling.replica().phase == ReplicaPhase.STOPPED
    assert scaling.house.cell.read_desired(replica.machine_id.hex) == {"generation": ""}


def test_a_suspended_tenant_loses_its_replicas_after_the_grace(scaling: Scaling) -> None:
    scaling.serving()
    tenant_row = scaling.deployment.organization
    grace = timedelta(seconds=scaling.house.config.suspension_grace_s)
    for since, phase in ((timedelta(0), ReplicaPhase.READY), (grace, ReplicaPhase.DRAINING)):
        type(tenant_row).objects.filter(id=tenant_row.id).update(suspended_at=timezone.now() - since)
        scaling.tick()
        assert scaling.replica().phase == phase


def test_a_new_engine_profile_replaces_the_replica_and_a_new_bound_does_not(scaling: Scaling) -> None:
    first = scaling.serving()
    scaling.change(max_replicas=2)
    scaling.tick()
    assert Replica.objects.count() == 1
    scaling.change(engine_profile={**scaling.deployment.engine_profile, "max_num_seqs": 8})
    scaling.tick()
    second = scaling.replica()
    assert (Replica.objects.count(), second.slots) == (2, 8)
    assert Replica.objects.get(id=first.id).phase == ReplicaPhase.READY  # serves until its successor does
    scaling.report(second, Reported.READY)
    scaling.tick()
    assert Replica.objects.get(id=first.id).phase == ReplicaPhase.DRAINING


def test_redis_away_does_not_lose_an_order(scaling: Scaling) -> None:
    from dataclasses import replace

    from autoscaler.cell import Cell

    good = scaling.house.cell
    scaling.change(min_replicas=1)
    scaling.house = replace(scaling.house, cell=Cell("redis://127.0.0.1:1/0", good.keys))
    scaling.tick()
    replica = scaling.replica()
    scaling.house = replace(scaling.house, cell=good)
    assert good.read_desired(replica.machine_id.hex) == {}
    assert reconcile.restore(scaling.house) == 1
    assert good.read_desired(replica.machine_id.hex) == {"generation": "", replica.id.hex: ""}
    assert reconcile.restore(scaling.house) == 0


def test_slots_are_observed_as_given_and_as_configured(scaling: Scaling) -> None:
    replica = scaling.serving()
    scaling.house.cell.resize(replica.id.hex, was=4, slots=3, why="too slow")
    scaling.beat(replica, 1)
    decision = scaling.tick().decision
    (seen,) = decision.memory.samples[-1:]
    assert seen.slots == 3.0
    scaling.house.cell.redis.delete(scaling.house.cell.keys.replica(replica.id.hex))
    assert scaling.tick().decision.memory.samples[-1].slots == 4.0


def test_gateways_are_told_when_a_replica_that_starts_will_be_there(scaling: Scaling) -> None:
    """As long as it starts, and no longer; what is told does not move while it goes by plan."""
    timings.note("fake", "", StageName.LAUNCHING_MACHINE, 40_000)
    digest = scaling.deployment.model_version.digest
    timings.note("fake", digest, StageName.STARTING_REPLICA, 2_000)
    timings.note("fake", digest, StageName.LOADING_MODEL, 3_000)
    cell, did = scaling.house.cell, scaling.deployment.id.hex

    def told() -> tuple[tuple[int, int], ...]:
        scaling.tick()
        return coming.parse(cell.last_told(did)[2].encode())

    scaling.queue("a")
    told()
    began_ms = round(scaling.replica().phase_at.timestamp() * 1000)
    assert told() == told() == ((4, began_ms + 45_000),)
    ready_at = scaling.machine_up().ready_at
    assert ready_at is not None
    assert told() == ((4, round(ready_at.timestamp() * 1000) + 5_000),)
    scaling.report(scaling.replica(), Reported.READY)
    assert told() == ()
