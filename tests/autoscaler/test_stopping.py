"""The stop/start rung on real rows and Redis: intents before effects, places, rules for spot, the ladder's orders."""

from __future__ import annotations

from datetime import datetime, timedelta
from io import StringIO

import pytest
import redis
from django.core.management import call_command
from django.utils import timezone

from autoscaler import pool, reconcile, records, stopping
from autoscaler.models import (
    Decision,
    Machine,
    MachineState,
    Offer,
    PoolDecision,
    Replica,
    ReplicaPhase,
    StartTiming,
)
from autoscaler.observe import machine_views, startable
from autoscaler.stopping import Keeper
from infra.providers.base import Offering, ProviderMachine, ProviderRefusedError, ProviderState
from tests.autoscaler.conftest import Scaling
from workers.contract import ReplicaPhase as Reported

COVER = Offering(instance_type="g6.xlarge", zone="z-a", is_spot=False, price_nano_per_h=805_000_000)


def keeper(scaling: Scaling) -> Keeper:
    return Keeper(scaling.house.config, scaling.house.provider, scaling.house.cell)


@pytest.fixture
def idle(scaling: Scaling) -> Machine:
    """An on-demand machine that is up, and on which nothing runs any more."""
    scaling.provider.kinds = [COVER]
    replica = scaling.serving()
    cell = scaling.house.cell
    cell.redis.flushdb()
    scaling.report(replica, Reported.DRAINING)
    scaling.report(replica, Reported.STOPPED)
    assert not Replica.objects.exclude(phase=ReplicaPhase.STOPPED).exists()
    return scaling.machine()


def stopped(scaling: Scaling, machine: Machine) -> Machine:
    assert stopping.stop(machine.id, "rests", keeper(scaling))
    reconcile.reconcile(scaling.house)
    found = scaling.machine()
    assert found.state == MachineState.STOPPED
    return found


def test_a_stopped_machine_has_neither_place_nor_user_and_its_disk_is_kept(
    scaling: Scaling, idle: Machine
) -> None:
    machine = stopped(scaling, idle)
    mid = machine.id.hex
    assert scaling.provider.machines[machine.provider_ref].state is ProviderState.STOPPED
    assert (machine.pool_slot, scaling.house.cell.has_user(mid)) == (None, False)
    assert machine_views(scaling.house.config, "c0") == ()
    assert startable(scaling.house.config, "c0", timezone.now()) == (mid,)
    report = reconcile.reconcile(scaling.house, timezone.now() + timedelta(days=1))
    assert (report.n_killed, report.n_gone, report.n_released, report.n_restored) == (0, 0, 0, 0)
    assert not scaling.house.cell.has_user(mid), "nobody lets it in while it is stopped"
    assert scaling.provider.terminated == []


def test_a_request_starts_it_again_instead_of_buying(scaling: Scaling, idle: Machine) -> None:
    machine = stopped(scaling, idle)
    scaling.queue("a")
    scaling.tick()
    back = scaling.machine()
    assert (back.id, back.state, back.pool_slot) == (machine.id, MachineState.RESUMING, 0)
    assert scaling.provider.machines[back.provider_ref].state is ProviderState.RUNNING
    assert scaling.house.cell.has_user(back.id.hex), "by the password on its disk"
    assert scaling.provider.n_launch_calls == 1, "nothing was bought"
    replica = scaling.replica()
    assert (replica.machine_id, replica.phase) == (machine.id, ReplicaPhase.STARTING)
    did = scaling.deployment.id.hex
    scaling.tick()
    assert scaling.house.cell.last_stage(did) == ("starting_machine", "")
    Machine.objects.update(rest_at=timezone.now() - timedelta(seconds=20))
    assert scaling.deployment.id in records.machine_answers(machine.id)
    assert scaling.machine().state == MachineState.READY
    assert StartTiming.objects.get(stage="starting_machine").average_ms == pytest.approx(20_000, rel=0.1)


def test_where_there_is_no_room_for_it_a_new_one_is_bought(scaling: Scaling, idle: Machine) -> None:
    machine = stopped(scaling, idle)
    scaling.provider.no_room = True
    scaling.queue("a")
    scaling.tick()
    old = Machine.objects.get(id=machine.id)
    assert (old.state, old.pool_slot) == (MachineState.STOPPED, None)
    assert startable(scaling.house.config, "c0", timezone.now()) == ()
    assert scaling.provider.n_launch_calls == 2 and scaling.machine().id != machine.id
    assert startable(scaling.house.config, "c0", timezone.now() + timedelta(seconds=61)) == (machine.id.hex,)


@pytest.mark.parametrize("what", ["spot", "busy", "leaving", "cannot"])
def test_what_must_not_be_stopped_is_not(scaling: Scaling, idle: Machine, what: str) -> None:
    if what == "spot":
        Machine.objects.update(offering="spot/z-a/g6.xlarge")
    elif what == "busy":
        Replica.objects.update(phase=ReplicaPhase.READY)
    elif what == "leaving":
        Machine.objects.update(ends_at=timezone.now())
    else:
        scaling.provider.stops = False
    assert not stopping.stop(idle.id, "rests", keeper(scaling))
    assert scaling.machine().state == MachineState.READY
    assert scaling.provider.machines[idle.provider_ref].state is ProviderState.RUNNING


def test_one_that_does_not_come_back_is_ended(scaling: Scaling, idle: Machine) -> None:
    machine = stopped(scaling, idle)
    assert stopping.resume(machine.id, keeper(scaling))
    late = timezone.now() + timedelta(seconds=scaling.house.config.machine_pending_timeout_s + 1)
    assert reconcile.reconcile(scaling.house, late).n_gone == 1
    assert scaling.provider.terminated == [machine.provider_ref]
    assert scaling.machine().state == MachineState.GONE


@pytest.mark.parametrize("what", ["stop", "start"])
def test_an_order_that_its_provider_never_takes_is_given_up_in_time(
    scaling: Scaling, idle: Machine, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def refused(ref: str) -> None:
        raise ProviderRefusedError("not this one")

    if what == "start":
        stopped(scaling, idle)
    monkeypatch.setattr(scaling.provider, what, refused)
    if what == "stop":
        assert stopping.stop(idle.id, "rests", keeper(scaling))
    else:
        assert stopping.resume(idle.id, keeper(scaling))
    patience = timedelta(seconds=scaling.house.config.machine_pending_timeout_s)
    assert reconcile.reconcile(scaling.house, timezone.now() + patience / 2).n_gone == 0
    assert reconcile.reconcile(scaling.house, timezone.now() + patience * 1.01).n_gone == 1
    assert scaling.provider.terminated == [idle.provider_ref]


def test_two_at_once_start_it_once_and_never_beyond_the_places(scaling: Scaling, idle: Machine) -> None:
    machine = stopped(scaling, idle)
    assert stopping.resume(machine.id, keeper(scaling))
    assert not stopping.resume(machine.id, keeper(scaling))
    Machine.objects.update(state=MachineState.STOPPED)
    Machine.objects.update(pool_slot=0)
    assert not stopping.resume(machine.id, keeper(scaling)), "the pool is full"


def test_while_it_stops_nothing_is_bought_in_its_place(scaling: Scaling, idle: Machine) -> None:
    """EC2 takes a minute, the pool's turns come every quarter of one."""
    scaling.configure(machine_keep_warm_s=1e5, machine_boot_s=180.0, late_usd=0.01, late_usd_per_s=0.0005)
    for stage, seconds in (("launching_machine", 180), ("starting_replica", 3), ("loading_model", 2)):
        StartTiming.objects.filter(stage=stage).update(average_ms=1000 * seconds)
    now = timezone.now()
    for minute in range(0, 60, 2):
        at = now + timedelta(minutes=minute)
        Offer.objects.update(priced_at=at)
        pool.turn(scaling.house, at)
        if scaling.machine().state == MachineState.STOPPING:
            break
    for seconds in range(1, 60, 15):
        pool.turn(scaling.house, at + timedelta(seconds=seconds))
    assert [(m.id, m.state) for m in Machine.objects.all()] == [(idle.id, MachineState.STOPPING)]
    assert scaling.provider.n_launch_calls == 1


@pytest.fixture
def leaving(scaling: Scaling, idle: Machine) -> Machine:
    """Being stopped since a moment ago. A stop takes 20 s, a start 60 s, a boot 100 s."""
    scaling.provider.stops_slowly = True
    for stage, seconds in (("stopping_machine", 20), ("starting_machine", 60), ("launching_machine", 100)):
        StartTiming.objects.update_or_create(
            provider="fake", model_digest="", stage=stage, defaults={"average_ms": 1000 * seconds}
        )
    for stage in ("starting_replica", "loading_model"):
        StartTiming.objects.filter(stage=stage).update(average_ms=1000)
    assert stopping.stop(idle.id, "rests", keeper(scaling))
    scaling.configure(max_machines=3)
    return scaling.machine()


def test_a_request_while_it_is_being_stopped_waits_for_it_and_starts_it_then(
    scaling: Scaling, leaving: Machine
) -> None:
    cell, did = scaling.house.cell, scaling.deployment.id.hex
    scaling.queue("a")
    decided = scaling.tick().decision
    assert (decided.commands, decided.memory.awaited) == ((), (leaving.id.hex,))
    assert cell.last_stage(did) == ("starting_machine", "")
    eta_ms = int(cell.redis.hget(cell.keys.stage(did), "eta_ms") or 0)
    assert 20_000 + 60_000 < eta_ms < 20_000 + 60_000 + 5_000, "its stop, its start, and the replica's"
    assert Decision.objects.latest("at").reasons[-1].startswith(f"machine {leaving.id.hex} was told to stop")

    scaling.provider.set_state(leaving.provider_ref, ProviderState.STOPPED)
    cell.redis.delete(cell.keys.look_lock)  # two seconds on
    Machine.objects.update(rest_at=timezone.now() - timedelta(seconds=10))
    scaling.tick()
    back = scaling.machine()
    assert (back.id, back.state) == (leaving.id, MachineState.RESUMING), "seen and started by the same tick"
    assert (scaling.replica().machine_id, scaling.provider.n_launch_calls) == (leaving.id, 1)
    assert StartTiming.objects.get(stage="stopping_machine").average_ms == pytest.approx(17_000, rel=0.05)


def test_whoever_waits_asks_the_provider_seldom(
    scaling: Scaling, leaving: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    listed = scaling.provider.describe

    def counted() -> list[ProviderMachine]:
        asked.append(1)
        return listed()

    monkeypatch.setattr(scaling.provider, "describe", counted)
    scaling.queue("a")
    for _ in range(3):
        scaling.tick()
    assert len(asked) == 1


def test_one_that_hangs_in_stopping_holds_nobody_beyond_the_bound_and_is_ended(
    scaling: Scaling, leaving: Machine
) -> None:
    """Late by 40 s, what a start of it saves against a boot: that is when a machine is bought."""
    scaling.queue("a")
    for seconds, n_bought in ((1, 1), (59, 1), (61, 2)):
        Machine.objects.filter(id=leaving.id).update(rest_at=timezone.now() - timedelta(seconds=seconds))
        scaling.tick()
        assert scaling.provider.n_launch_calls == n_bought, seconds
    assert scaling.replica().machine_id == scaling.machine().id != leaving.id
    late = timezone.now() + timedelta(seconds=scaling.house.config.machine_pending_timeout_s - 60)
    assert reconcile.reconcile(scaling.house, late).n_gone == 1
    assert scaling.provider.terminated == [leaving.provider_ref], "nobody pays for it for good"


def test_a_request_that_dies_with_redis_away_buys_nothing_either(
    scaling: Scaling, leaving: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can say who may ask: the next pass of reconcile sees that it has stopped."""
    scaling.queue("a")
    scaling.provider.set_state(leaving.provider_ref, ProviderState.STOPPED)

    def away(life_ms: int) -> bool:
        raise redis.ConnectionError("away")

    monkeypatch.setattr(scaling.house.cell, "may_look", away)
    assert scaling.tick().decision.memory.awaited == (leaving.id.hex,)
    reconcile.reconcile(scaling.house)
    scaling.tick()
    assert (scaling.machine().state, scaling.provider.n_launch_calls) == (MachineState.RESUMING, 1)


def test_the_ladder_stops_it_and_ends_it_when_even_its_disk_is_not_worth_it(
    scaling: Scaling, idle: Machine
) -> None:
    """The envelope over warm, stopped and nothing, by turns of the pool."""
    scaling.configure(machine_keep_warm_s=1e5, machine_boot_s=180.0, late_usd=0.01, late_usd_per_s=0.0005)
    for stage, seconds in (("launching_machine", 180), ("starting_replica", 3), ("loading_model", 2)):
        StartTiming.objects.filter(stage=stage).update(average_ms=1000 * seconds)
    now = timezone.now()
    seen: list[tuple[str, float]] = []

    def turn(at: datetime) -> None:
        Offer.objects.update(priced_at=at)  # prices are read by the real clock
        pool.turn(scaling.house, at)
        reconcile.reconcile(scaling.house, at)
        state = scaling.machine().state
        if not seen or seen[-1][0] != state:
            seen.append((state, (at - now).total_seconds()))

    for minute in range(0, 5 * 60, 20):
        turn(now + timedelta(minutes=minute))
        if scaling.machine().state == MachineState.GONE:
            break
    assert [state for state, _ in seen] == [MachineState.READY, MachineState.STOPPED, MachineState.GONE], seen
    assert scaling.provider.terminated == [idle.provider_ref]
    told = [row.reasons for row in PoolDecision.objects.order_by("at")]
    assert any("rests: stopped machine" in reason for reasons in told for reason in reasons)
    assert any("rests: nothing" in reason for reasons in told for reason in reasons)
    for row in PoolDecision.objects.all():
        call_command("explain", "decision", str(row), stdout=StringIO())
