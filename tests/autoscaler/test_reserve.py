"""The reserve of stopped machines on real rows and Redis: bought once, filled, laid down; started for what a notice
takes, and laid down again when spot serves."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.utils import timezone

from autoscaler import pool, pooldecisions, prefetch, reconcile, records, stopping
from autoscaler.models import Machine, MachineState, Offer, PoolDecision, PoolState, Replica, ReplicaPhase
from autoscaler.observe import machine_views, startable
from autoscaler.policy.poolplan import PoolInputs
from autoscaler.tick import tick
from controlplane.management.commands import quarantine as command
from infra.providers.base import Offering, ProviderState
from tests.autoscaler.conftest import Scaling
from workers.contract import ReplicaPhase as Reported

SPOT = Offering(
    instance_type="g6.xlarge", zone="z-a", is_spot=True, price_nano_per_h=300_000_000, gpu="l4", n_gpus=1
)
OTHER = replace(SPOT, zone="z-b", price_nano_per_h=310_000_000)
COVER = replace(SPOT, is_spot=False, price_nano_per_h=805_000_000)


@pytest.fixture
def reserved(scaling: Scaling) -> Scaling:
    """One replica serves on spot, whose notice is shorter than a boot; one machine lies stopped for it."""
    _spot_serves(scaling)
    _turn(scaling)
    scaling.machine_up()
    _turn(scaling)
    reconcile.reconcile(scaling.house)
    assert _reserve().state == MachineState.STOPPED
    return scaling


def _spot_serves(scaling: Scaling) -> None:
    scaling.provider.kinds = [SPOT, OTHER, COVER]
    scaling.configure(
        max_machines=2, spot_reserve=1, machine_boot_s=180.0, max_spares=0, disruption_share=1.0
    )
    scaling.serving()
    assert scaling.machine().offering == SPOT.name


def _turn(scaling: Scaling, at: datetime | None = None) -> None:
    Offer.objects.update(priced_at=at or timezone.now())
    for deployment_id in pool.turn(scaling.house, at):
        assert deployment_id == scaling.deployment.id
        scaling.tick()


def _reserve() -> Machine:
    return Machine.objects.exclude(state=MachineState.GONE).get(reserve_place=0)


def _seen(scaling: Scaling) -> PoolInputs:
    state = PoolState.objects.get()
    return pool.observe(scaling.house, list(Offer.objects.order_by("name")), state, timezone.now())


def _keeper(scaling: Scaling) -> stopping.Keeper:
    return stopping.Keeper(scaling.house.config, scaling.house.provider, scaling.house.cell)


def _notice(scaling: Scaling) -> Machine:
    spot = scaling.replica().machine
    records.machine_leaves(spot.id, 120_000)
    scaling.tick()
    return spot


def test_a_reserve_is_bought_once_beside_the_pools_places_and_lies_stopped(scaling: Scaling) -> None:
    _spot_serves(scaling)
    _turn(scaling)
    bought = _reserve()
    assert (bought.launch_plan, bought.pool_slot, bought.launched_for) == ([COVER.name], None, None)
    _turn(scaling)
    scaling.machine_up()
    view = next(v for v in machine_views(scaling.house.config, "c0") if v.id == bought.id.hex)
    assert (view.n_free, view.n_beds) == (0, 0), "nothing is placed on it"
    assert [m.offering for m in _seen(scaling).machines] == [SPOT.name], "nor reckoned with"
    assert (_seen(scaling).view.n_on_demand_ready, _seen(scaling).view.n_stopped) == (0, 0)
    reconcile.reconcile(scaling.house, timezone.now() + timedelta(days=1))
    assert _reserve().state == MachineState.READY, "however long it is empty"
    _turn(scaling)
    reconcile.reconcile(scaling.house)
    assert _reserve().state == MachineState.STOPPED
    assert scaling.provider.machines[bought.provider_ref].state is ProviderState.STOPPED
    assert (_seen(scaling).view.n_on_demand_ready, _seen(scaling).view.n_stopped) == (0, 1)
    for hour in range(1, 4):
        _turn(scaling, timezone.now() + timedelta(hours=hour))
    assert (_reserve().id, _reserve().state) == (bought.id, MachineState.STOPPED), "however long it lies"
    assert scaling.provider.n_launch_calls == 2
    assert any(
        "reserve: the weights are on its disk" in r for d in PoolDecision.objects.all() for r in d.reasons
    )


def test_its_weights_come_before_it_lies_down(scaling: Scaling, monkeypatch: pytest.MonkeyPatch) -> None:
    _spot_serves(scaling)
    _turn(scaling)
    scaling.machine_up()
    there: list[str] = []
    monkeypatch.setattr(prefetch, "filled", lambda ids, cell, now: frozenset(set(ids) & set(there)))
    _turn(scaling)
    assert _reserve().state == MachineState.READY
    there.append(_reserve().id.hex)
    _turn(scaling)
    assert _reserve().state == MachineState.STOPPING


def test_growth_leaves_the_reserve_alone(reserved: Scaling) -> None:
    assert startable(reserved.house.config, "c0", timezone.now()) == ()
    reserved.configure(replicas_per_machine=1)
    reserved.change(min_replicas=2, max_replicas=2)
    reserved.tick()
    assert reserved.provider.n_launch_calls == 3
    assert (reserved.machine().offering, _reserve().state) == (SPOT.name, MachineState.STOPPED)


def test_a_notice_starts_it_and_when_spot_serves_again_it_lies_down(reserved: Scaling) -> None:
    kept = _reserve()
    served = reserved.replica()
    lost = _notice(reserved)
    woken, successor = _reserve(), reserved.replica()
    assert (woken.id, woken.state, woken.pool_slot) == (kept.id, MachineState.RESUMING, None)
    assert (successor.machine_id, reserved.provider.n_launch_calls) == (kept.id, 2), (
        "nothing was bought for it"
    )
    reserved.tick()
    _turn(reserved)
    spot = reserved.machine()
    assert (spot.offering, spot.replaces) == (OTHER.name, kept.id), (
        "what serves in the end is ordered at once"
    )
    _turn(reserved)
    assert Machine.objects.exclude(state=MachineState.GONE).count() == 3

    records.machine_answers(kept.id)
    reserved.report(successor, Reported.READY)
    reserved.tick()
    assert Replica.objects.get(id=served.id).phase == ReplicaPhase.DRAINING
    reserved.report(Replica.objects.get(id=served.id), Reported.STOPPED)
    reconcile.reconcile(reserved.house)
    assert reserved.provider.terminated == [lost.provider_ref]

    reserved.machine_up()
    _turn(reserved)
    assert _reserve().state == MachineState.DRAINING
    last = reserved.replica()
    assert last.machine_id == spot.id
    reserved.report(last, Reported.READY)
    reserved.tick()
    reserved.report(Replica.objects.get(id=successor.id), Reported.STOPPED)
    reconcile.reconcile(reserved.house)
    reconcile.reconcile(reserved.house)
    back = _reserve()
    assert (back.id, back.state, back.given_up_at, back.ends_at) == (
        kept.id,
        MachineState.STOPPED,
        None,
        None,
    )
    assert Machine.objects.get(id=spot.id).replaces is None, "the next time it is stood in for anew"
    assert reserved.provider.n_launch_calls == 3

    reserved.house.cell.redis.flushdb()
    _notice(reserved)
    assert _reserve().state == MachineState.RESUMING, "and again"


def test_a_loss_that_nobody_announced_starts_it_as_well(reserved: Scaling) -> None:
    lost = reserved.replica().machine
    del reserved.provider.machines[lost.provider_ref]
    reconcile.reconcile(reserved.house)
    assert Machine.objects.get(id=lost.id).state == MachineState.GONE
    tick(reserved.deployment.id, reserved.house, timezone.now() + timedelta(seconds=2))
    assert (_reserve().state, reserved.provider.n_launch_calls) == (MachineState.RESUMING, 2)


def test_where_it_has_no_room_the_plan_is_bought(reserved: Scaling) -> None:
    reserved.provider.no_room = True
    _notice(reserved)
    assert (_reserve().state, reserved.machine().offering) == (MachineState.STOPPED, OTHER.name)


def test_one_that_does_not_come_up_is_replaced(reserved: Scaling) -> None:
    kept = _reserve()
    assert stopping.resume_one(_keeper(reserved)) is not None
    late = timezone.now() + timedelta(seconds=reserved.house.config.machine_pending_timeout_s + 1)
    reconcile.reconcile(reserved.house, late)
    assert Machine.objects.get(id=kept.id).state == MachineState.GONE
    _turn(reserved)
    assert (_reserve().state, reserved.provider.n_launch_calls) == (MachineState.PENDING, 3)


def test_an_empty_one_that_was_started_in_vain_lies_down(reserved: Scaling) -> None:
    assert stopping.resume_one(_keeper(reserved)) is not None
    assert stopping.resume_one(_keeper(reserved)) is None
    _turn(reserved)
    assert _reserve().state == MachineState.RESUMING, "it is left to come up"
    records.machine_answers(_reserve().id)
    _turn(reserved)
    assert _reserve().state == MachineState.STOPPING


def test_a_lower_setting_gives_the_surplus_back(reserved: Scaling) -> None:
    kept = _reserve()
    reserved.configure(spot_reserve=0)
    _turn(reserved)
    assert Machine.objects.get(id=kept.id).state == MachineState.GONE
    assert reserved.provider.terminated == [kept.provider_ref]
    assert Machine.objects.exclude(state=MachineState.GONE).count() == 1


def test_two_turns_at_once_do_not_take_one_place_twice(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second has looked before the first has bought, and decides after it has kept its memory."""
    _spot_serves(scaling)
    keep = pooldecisions.keep
    rounds = [0]

    def slow(*args: Any, **kwargs: Any) -> PoolDecision:
        rounds[0] += 1
        if rounds[0] == 1:
            _turn(scaling)
        return keep(*args, **kwargs)

    monkeypatch.setattr(pooldecisions, "keep", slow)
    _turn(scaling)
    assert rounds[0] >= 2
    assert scaling.provider.n_launch_calls == 2


def test_the_command_that_lists_machines_tells_of_it(
    reserved: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "build_house", lambda: reserved.house)
    out = StringIO()
    call_command("quarantine", stdout=out)
    lines = out.getvalue().splitlines()
    told = f"stopped    0 replicas  {COVER.name}  reserve 0  reserve: the weights are on its disk"
    assert (lines[1], lines[2]) == (f"mch_{_reserve().id.hex}  {told}", "reserve: 1 of 1 lie stopped")
    out = StringIO()
    call_command(
        "explain", "decision", str(PoolDecision.objects.filter(kind="pool").earliest("at")), stdout=out
    )
    assert f"buy {COVER.name} for place 0 of the reserve" in out.getvalue()
