"""The control worker dies between any two side effects of launch, drain and terminate, and another one goes on.

Every place is tried, by counting the effects of an undisturbed run. Whatever happened: no command buys two machines,
no machine is forgotten, and in the end rows, provider and Redis agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from django.utils import timezone

from autoscaler import pool, reconcile, records, services, stopping
from autoscaler.models import LIVE_PHASES, Machine, MachineState, Replica, ScalerState
from autoscaler.models import Decision as DecisionRow
from autoscaler.models import ReplicaPhase as ReplicaRow
from infra.providers.base import Offering, ProviderState
from tests.autoscaler import test_sleeping
from tests.autoscaler.conftest import Scaling
from tests.autoscaler.crashing import Crash, Effects, crashing
from workers.contract import ReplicaPhase

KIND = Offering(instance_type="t", zone="z", is_spot=True, price_nano_per_h=1)
OTHER = Offering(instance_type="t", zone="y", is_spot=True, price_nano_per_h=2)
COVER = Offering(instance_type="t", zone="z", is_spot=False, price_nano_per_h=5)
MAX_EFFECTS = 200


def _launch(scaling: Scaling, now: datetime) -> None:
    _tick(scaling, now)


def _drain(scaling: Scaling, now: datetime) -> None:
    scaling.change(deleted_at=now)
    _tick(scaling, now)


def _terminate(scaling: Scaling, now: datetime) -> None:
    reconcile.reconcile(scaling.house, now)


def _tick(scaling: Scaling, now: datetime) -> None:
    from autoscaler.tick import tick

    tick(scaling.deployment.id, scaling.house, now)


def _nothing(scaling: Scaling) -> None:
    scaling.queue("a")


def _serving(scaling: Scaling) -> None:
    scaling.serving()


def _drained(scaling: Scaling) -> None:
    replica = scaling.serving()
    scaling.change(deleted_at=timezone.now())
    _tick(scaling, timezone.now())
    scaling.report(replica, ReplicaPhase.STOPPED)


def _sleepy(scaling: Scaling) -> None:
    test_sleeping.serving(scaling)


def _asleep(scaling: Scaling) -> None:
    test_sleeping.asleep(scaling)
    scaling.queue("b")


def _idle_machine(scaling: Scaling) -> None:
    """Nobody waits, and the model is wanted."""
    _drained(scaling)
    scaling.house.cell.redis.flushdb()
    scaling.change(deleted_at=None)


def _stop(scaling: Scaling, now: datetime) -> None:
    stopping.stop(scaling.machine().id, "rests", _keeper(scaling), now)


def _stopped(scaling: Scaling) -> None:
    _idle_machine(scaling)
    _stop(scaling, timezone.now())
    reconcile.reconcile(scaling.house)
    assert scaling.machine().state == MachineState.STOPPED
    scaling.queue("b")


def _keeper(scaling: Scaling) -> stopping.Keeper:
    return stopping.Keeper(scaling.house.config, scaling.house.provider, scaling.house.cell)


def _on_spot(scaling: Scaling) -> None:
    """A replica serves on spot, and what is lost there is stood in for by a machine that lies stopped."""
    scaling.provider.kinds = [KIND, OTHER, COVER]
    scaling.configure(
        spot_reserve=1, max_spares=0, machine_boot_s=180.0, disruption_share=1.0, max_machines=2
    )
    scaling.serving()


def _turn(scaling: Scaling, now: datetime) -> None:
    pool.turn(scaling.house, now)


def _reserved(scaling: Scaling) -> None:
    _on_spot(scaling)
    _turn(scaling, timezone.now())
    scaling.machine_up()
    _turn(scaling, timezone.now())
    reconcile.reconcile(scaling.house)
    assert scaling.machine().state == MachineState.STOPPED


def _noticed(scaling: Scaling) -> None:
    _reserved(scaling)
    records.machine_leaves(scaling.replica().machine_id, 600_000)


def _stood_in_for(scaling: Scaling) -> None:
    """It was started in vain, was given up, and nothing runs on it any more."""
    _reserved(scaling)
    assert stopping.resume_one(_keeper(scaling)) is not None
    records.machine_answers(scaling.machine().id)
    pool.give_up(scaling.machine().id, "spot serves", scaling.house, timezone.now())


SCENES: dict[str, tuple[Callable[[Scaling], None], Callable[[Scaling, datetime], None]]] = {
    "launch": (_nothing, _launch),
    "drain": (_serving, _drain),
    "terminate": (_drained, _terminate),
    "sleep": (_sleepy, _launch),
    "wake": (_asleep, _launch),
    "stop": (_idle_machine, _stop),
    "resume": (_stopped, _launch),
    "reserve": (_on_spot, _turn),
    "stand-in": (_noticed, _launch),
    "lie-down": (_stood_in_for, _terminate),
}


MUST_STRIKE = {
    "launch": {"FakeProvider.launch", "QuerySet.create", "Cell.set_desired"},
    "drain": {"QuerySet.update", "Cell.drain", "Cell.set_desired"},
    "terminate": {"FakeProvider.terminate", "QuerySet.update", "Cell.delete_machine"},
    "sleep": {"QuerySet.update", "Cell.put_to_sleep", "Cell.set_desired"},
    "wake": {"QuerySet.update", "Cell.set_desired"},
    "stop": {"QuerySet.update", "Cell.delete_machine", "FakeProvider.stop"},
    "resume": {"QuerySet.update", "Cell.set_user", "FakeProvider.start", "Cell.set_desired"},
    "reserve": {"QuerySet.update", "QuerySet.create", "FakeProvider.launch"},
    "stand-in": {"QuerySet.update", "Cell.set_user", "FakeProvider.start", "Cell.set_desired"},
    "lie-down": {"QuerySet.update", "Cell.delete_machine", "FakeProvider.stop"},
}


def _restart(scaling: Scaling) -> None:
    """What another control worker does, until nothing changes; leases of the dead one have run out.

    The provider's first list is as old as the crash: it shows nothing.
    """
    scaling.provider.n_blind, scaling.provider.lists_after_s = 1, 120.0
    now = timezone.now() + timedelta(seconds=60)
    for _ in range(6):
        ScalerState.objects.update(lease_until=None, lease_owner="")
        if scaling.house.config.spot_reserve:
            pool.turn(scaling.house, now)
        reconcile.reconcile(scaling.house, now)
        _tick(scaling, now)
        now += timedelta(seconds=20)


def _check(scaling: Scaling, where: str) -> None:
    provider = scaling.provider
    live = Machine.objects.exclude(state=MachineState.GONE)
    tokens = Counter(m.client_token for m in provider.machines.values())
    assert all(n == 1 for n in tokens.values()), f"{where}: one command bought two machines: {tokens}"
    assert {m.machine_id for m in provider.machines.values()} == {row.id.hex for row in live}, (
        f"{where}: forgotten"
    )
    in_reserve = {row.provider_ref for row in live if row.reserve_place is not None}
    assert len(in_reserve) <= scaling.house.config.spot_reserve, f"{where}: more than the reserve"
    leaving = {row.provider_ref for row in live if row.ends_at is not None}
    assert len(set(provider.machines) - in_reserve - leaving) <= scaling.house.config.max_machines, (
        f"{where}: more than the pool may have"
    )
    for row in live:
        seen = provider.machines[row.provider_ref].state
        rests = row.state in (MachineState.STOPPING, MachineState.STOPPED)
        assert rests is (seen is ProviderState.STOPPED), f"{where}: {row.state}, {seen}"
        assert row.state != MachineState.STOPPING, f"{where}: nobody noticed that it has stopped"
        wanted = {r.id.hex for r in Replica.objects.filter(machine=row, phase__in=LIVE_PHASES)}
        told = scaling.house.cell.read_desired(row.id.hex)
        assert set(told) - {"generation"} == wanted, f"{where}: Redis and rows disagree"
        asleep = Replica.objects.filter(machine=row, phase=ReplicaRow.SLEEPING)
        assert {r for r in wanted if told[r] == "sleep"} == {r.id.hex for r in asleep}, f"{where}: asleep"


@pytest.mark.parametrize(
    ("scene", "before", "stride"),
    [
        ("launch", False, 4),
        *(
            pytest.param(
                scene, before, 1, marks=pytest.mark.full, id=f"{scene}-{'undone' if before else 'done'}"
            )
            for scene in SCENES
            for before in (True, False)
        ),
    ],
)
def test_no_crash_buys_twice_or_forgets(scaling: Scaling, scene: str, before: bool, stride: int) -> None:
    """One world, played again and again: what is left of one round is given back before the next."""
    prepare, act = SCENES[scene]
    scaling.provider.kinds = [COVER if scene in ("stop", "resume") else KIND]
    scaling.configure(machine_keep_warm_s=0.0)
    struck: list[str] = []
    for at in range(1, MAX_EFFECTS, stride):
        prepare(scaling)
        effects = Effects(at, before=before)
        with crashing(effects):
            try:
                act(scaling, timezone.now())
            except Crash as crash:
                struck.append(str(crash))
        crashed = effects.seen >= at
        where = f"{scene}, {'before' if before else 'after'} effect {at} ({effects.names[-1:]})"
        _restart(scaling)
        _check(scaling, where)
        _end_round(scaling)
        assert scaling.provider.machines == {}, f"{where}: still paid for"
        if not crashed:
            break
    if stride == 1:
        assert MUST_STRIKE[scene] <= set(struck), struck
    assert 4 <= len(struck) < MAX_EFFECTS - 1


def _end_round(scaling: Scaling) -> None:
    """The model is given up: everything is given back by the ordinary loop; then it is wanted again."""
    scaling.change(deleted_at=timezone.now())
    scaling.configure(spot_reserve=0)
    now = timezone.now() + timedelta(seconds=600)
    for _ in range(4):
        ScalerState.objects.update(lease_until=None, lease_owner="")
        _tick(scaling, now)
        for replica in Replica.objects.filter(phase__in=LIVE_PHASES):
            scaling.report(replica, ReplicaPhase.STOPPED)
        pool.turn(scaling.house, now)
        reconcile.reconcile(scaling.house, now)
        now += timedelta(seconds=60)
    assert Machine.objects.exclude(state=MachineState.GONE).count() == 0
    for rows in (
        Replica,
        Machine,
        DecisionRow,
        ScalerState,
    ):  # failures would be remembered, and make the next wait
        rows.objects.all().delete()
    scaling.house.cell.redis.delete(*scaling.house.cell.redis.keys(f"{scaling.house.cell.keys.prefix}*"))
    scaling.change(deleted_at=None)


def test_the_proof_of_a_machine_whose_buyer_died_is_renewed(scaling: Scaling) -> None:
    scaling.provider.kinds = [KIND]
    scaling.queue("a")
    with crashing(Effects("FakeProvider.launch", before=True)), pytest.raises(Crash):
        _tick(scaling, timezone.now())
    assert scaling.provider.machines == {}
    _restart(scaling)
    machine = Machine.objects.exclude(state=MachineState.GONE).get()
    services.enrol(
        machine_id=machine.id.hex,
        proof=scaling.provider.proofs[machine.id.hex],
        capabilities={},
        cell=scaling.house.cell,
    )
    assert records.machine_answers(machine.id)
