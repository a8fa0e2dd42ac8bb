"""Rows, the provider's list and Redis are made to agree, whoever is wrong."""

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import pytest
from django.utils import timezone

from autoscaler import reconcile
from autoscaler.models import Decision, Machine, MachineState, Replica, ReplicaPhase
from autoscaler.policy.machines import Silence
from infra.providers.base import Offering, ProviderState
from tests.autoscaler.conftest import Scaling
from workers.contract import ReplicaPhase as Reported


def _later(scaling: Scaling) -> None:
    past = timezone.now() - timedelta(seconds=60)
    Machine.objects.update(created_at=past, launched_at=past)


def test_an_unknown_machine_is_ended_and_reported(scaling: Scaling, caplog: pytest.LogCaptureFixture) -> None:
    scaling.serving()
    stranger = scaling.provider.add("e" * 32)
    report = reconcile.reconcile(scaling.house)
    assert report.n_killed == 1
    assert scaling.provider.terminated == [stranger.ref]
    assert "machine.unknown" in caplog.text


def test_a_vanished_machine_takes_its_replicas_along_and_their_requests_move(scaling: Scaling) -> None:
    replica = scaling.serving()
    cell, did = scaling.house.cell, scaling.deployment.id.hex
    assert cell.redis.zcard(cell.keys.queue(did)) == 0  # "first" was handed to the replica
    scaling.provider.machines.clear()
    report = reconcile.reconcile(scaling.house)
    assert (report.n_gone, report.deployments) == (1, {scaling.deployment.id})
    assert scaling.machine().state == MachineState.GONE
    lost = Replica.objects.get(id=replica.id)
    assert (lost.phase, lost.reason_code) == (ReplicaPhase.FAILED, "machine_lost")
    assert cell.redis.zrange(cell.keys.queue(did), 0, -1) == [b"first"]
    assert not cell.has_user(replica.machine_id.hex)
    scaling.tick()
    assert Machine.objects.exclude(state=MachineState.GONE).count() == 1


def test_a_dead_agent_is_restarted_so_often_and_then_its_machine_replaced(scaling: Scaling) -> None:
    scaling.serving()
    _later(scaling)
    ref = scaling.machine().provider_ref
    for n in range(3):
        scaling.provider.set_state(ref, ProviderState.AGENT_DOWN)
        assert reconcile.reconcile(scaling.house).n_restarted == 1, n
        _later(scaling)
    scaling.provider.set_state(ref, ProviderState.AGENT_DOWN)
    report = reconcile.reconcile(scaling.house)
    assert (report.n_restarted, report.n_gone) == (0, 1)
    assert scaling.provider.terminated == [ref]
    assert "restarted 3 times" in scaling.machine().reason


def test_a_silent_machine_that_never_answered_is_left_to_its_own_timeout(scaling: Scaling) -> None:
    scaling.serving()
    Machine.objects.update(state=MachineState.ENROLLED)
    silence = Silence(1e4)
    reconcile.check_machine(scaling.machine().id, scaling.house, silence)
    assert scaling.provider.terminated == []
    Machine.objects.update(state=MachineState.READY)
    report = reconcile.check_machine(scaling.machine().id, scaling.house, silence)
    assert (report.n_gone, report.deployments) == (1, {scaling.deployment.id})
    assert scaling.provider.machines == {}


def test_an_agent_that_runs_for_long_may_be_restarted_again(scaling: Scaling) -> None:
    scaling.serving()
    _later(scaling)
    Machine.objects.update(n_restarts=3, launched_at=timezone.now() - timedelta(minutes=3))
    reconcile.reconcile(scaling.house)
    assert scaling.machine().n_restarts == 0


def test_an_agent_that_ended_before_it_enrolled_is_not_restarted(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    _later(scaling)
    scaling.provider.set_state(scaling.machine().provider_ref, ProviderState.AGENT_DOWN)
    report = reconcile.reconcile(scaling.house)
    assert (report.n_gone, scaling.provider.restarted) == (1, [])
    assert "see agent.log" in scaling.machine().reason
    assert scaling.replica().reason_code == "machine_lost"


def test_a_machine_that_does_not_come_up_is_given_back(scaling: Scaling) -> None:
    scaling.queue("a")
    scaling.tick()
    Machine.objects.update(created_at=timezone.now() - timedelta(seconds=301))
    reconcile.reconcile(scaling.house)
    machine = scaling.machine()
    assert machine.state == MachineState.GONE
    assert "did not come up in 301 s, allowed 300 s" in machine.reason


def test_a_machine_stays_warm_after_its_last_replica_and_is_then_given_back(scaling: Scaling) -> None:
    replica = scaling.serving()
    scaling.report(replica, Reported.FAILED, "engine_died")
    reconcile.reconcile(scaling.house)
    assert scaling.machine().state == MachineState.READY
    Replica.objects.update(stopped_at=timezone.now() - timedelta(seconds=901))
    Machine.objects.update(ready_at=timezone.now() - timedelta(seconds=2000))
    assert reconcile.reconcile(scaling.house).n_released == 1
    assert scaling.machine().state == MachineState.GONE
    assert scaling.provider.machines == {}


def test_a_machine_with_a_live_replica_is_never_given_back(scaling: Scaling) -> None:
    from autoscaler import launch

    scaling.serving()
    assert not launch.terminate(scaling.machine().id, "no reason", scaling.provider, scaling.house.cell)
    assert scaling.machine().state == MachineState.READY


def test_desired_state_is_restored_after_an_empty_redis_and_extras_are_dropped(scaling: Scaling) -> None:
    replica = scaling.serving()
    cell, mid = scaling.house.cell, replica.machine_id.hex
    keys = cell.keys.machine(mid)
    before = cell.redis.hget(keys.desired, replica.id.hex)
    cell.redis.flushall()
    assert reconcile.restore(scaling.house) == 1
    assert cell.redis.hget(keys.desired, replica.id.hex) == before
    cell.redis.hset(keys.desired, "f" * 32, b"{}")
    assert reconcile.restore(scaling.house) == 1
    assert set(cell.read_desired(mid)) == {"generation", replica.id.hex}


def test_restoring_never_undoes_what_was_ordered_meanwhile(scaling: Scaling) -> None:
    """Our rows were read before somebody drained the replica; the hash is ahead of them."""
    from autoscaler.specs import desired_spec

    replica = scaling.serving()
    cell, mid = scaling.house.cell, replica.machine_id.hex
    stale = {replica.id.hex: desired_spec(replica)}
    Replica.objects.update(phase=ReplicaPhase.DRAINING)
    cell.set_desired(mid, desired_spec(scaling.replica()))
    assert not cell.restore_desired(mid, stale, cell.read_desired(mid))
    assert cell.read_desired(mid)[replica.id.hex] == "drain"


def test_a_drain_that_redis_missed_is_restored(scaling: Scaling) -> None:
    replica = scaling.serving()
    Replica.objects.update(phase=ReplicaPhase.DRAINING)
    reconcile.restore(scaling.house)
    assert scaling.house.cell.read_desired(replica.machine_id.hex)[replica.id.hex] == "drain"
    assert (
        scaling.house.cell.redis.hget(scaling.house.cell.keys.replica(replica.id.hex), "state") == b"draining"
    )


def test_a_replica_that_ended_while_redis_was_away_loses_its_route(scaling: Scaling) -> None:
    replica = scaling.serving()
    cell = scaling.house.cell
    Replica.objects.update(phase=ReplicaPhase.FAILED, stopped_at=timezone.now())
    assert cell.routed(scaling.deployment.id.hex) == [UUID(hex=replica.id.hex)]
    reconcile.restore(scaling.house)
    assert cell.routed(scaling.deployment.id.hex) == []
    assert cell.redis.zcard(cell.keys.queue(scaling.deployment.id.hex)) == 1


def test_requests_of_a_replica_that_ended_are_found_although_redis_forgot_its_end(scaling: Scaling) -> None:
    replica = scaling.serving()
    cell, queue = scaling.house.cell, scaling.house.cell.keys.queue(scaling.deployment.id.hex)
    cell.drain(replica.id.hex)  # the last that Redis knows: it has no route, and still its requests
    Replica.objects.update(phase=ReplicaPhase.STOPPED, stopped_at=timezone.now())
    assert (cell.routed(scaling.deployment.id.hex), cell.redis.zcard(queue)) == ([], 0)
    reconcile.restore(scaling.house)
    assert cell.redis.zrange(queue, 0, -1) == [b"first"]
    assert reconcile.restore(scaling.house) == 0


def test_old_decisions_are_pruned(scaling: Scaling) -> None:
    scaling.serving()
    n = Decision.objects.count()
    reconcile.reconcile(scaling.house, timezone.now() + timedelta(days=6))
    assert Decision.objects.count() == n
    reconcile.reconcile(scaling.house, timezone.now() + timedelta(days=8))
    assert Decision.objects.count() == 0


def test_what_an_unknown_machine_cost_is_counted(scaling: Scaling) -> None:
    from autoscaler import market, metrics

    kind = Offering(instance_type="t", zone="z", is_spot=True, price_nano_per_h=2_000_000_000)
    scaling.provider.kinds = [kind]
    market.refresh(scaling.provider, "c0")
    stray = scaling.provider.add("77" * 16)
    scaling.provider.machines[stray.ref] = replace(
        stray, offering=kind.name, started_at_s=timezone.now().timestamp() - 1800
    )
    before = metrics.ORPHAN_DOLLARS._value.get()
    assert reconcile.reconcile(scaling.house).n_killed == 1
    assert metrics.ORPHAN_DOLLARS._value.get() - before == pytest.approx(1.0, abs=0.01)
    assert scaling.provider.machines == {}
