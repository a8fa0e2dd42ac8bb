"""The pool's own turn on real rows: back to spot without a pause, spares kept, every turn kept and replayable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from io import StringIO

import pytest
from django.core.management import call_command
from django.utils import timezone

from autoscaler import market, pool, reconcile
from autoscaler.models import (
    Machine,
    MachineState,
    Offer,
    PoolDecision,
    PoolDecisionKind,
    PoolState,
    Replica,
    ReplicaPhase,
)
from infra.providers.base import Offering
from tests.autoscaler.conftest import Scaling
from workers.contract import ReplicaPhase as Reported

SPOT = Offering(
    instance_type="g6.xlarge", zone="z-a", is_spot=True, price_nano_per_h=300_000_000, gpu="l4", n_gpus=1
)
COVER = replace(SPOT, is_spot=False, price_nano_per_h=805_000_000)


def _alive() -> list[Machine]:
    return list(Machine.objects.exclude(state=MachineState.GONE).order_by("created_at"))


@pytest.fixture
def covered(scaling: Scaling) -> Scaling:
    """One replica serves on an on-demand machine, because spot had none."""
    scaling.provider.kinds = [SPOT, COVER]
    scaling.provider.exhausted = {SPOT.name: "InsufficientInstanceCapacity"}
    # A notice that comes in time: no spare is worth its price.
    scaling.configure(max_machines=2, machine_boot_s=120.0, disruption_share=1.0)
    scaling.serving()
    assert scaling.machine().offering == COVER.name
    return scaling


def test_when_spot_is_back_it_takes_over_and_on_demand_is_given_back(covered: Scaling) -> None:
    [old] = _alive()
    served = covered.replica()
    assert pool.turn(covered.house) == set()
    assert _alive() == [old], "spot refused a moment ago"

    covered.provider.exhausted = {}
    Offer.objects.update(refused_until=timezone.now() - timedelta(seconds=1))
    assert pool.turn(covered.house) == set()
    new = covered.machine()
    assert (new.offering, new.replaces, new.launched_for) == (SPOT.name, old.id, None)
    assert pool.turn(covered.house) == set()
    assert len(_alive()) == 2, "one replacement is enough"

    covered.machine_up()
    assert pool.turn(covered.house) == {covered.deployment.id}
    given_up = Machine.objects.get(id=old.id)
    assert given_up.state == MachineState.DRAINING
    assert given_up.given_up_at is not None
    # A turn that comes before the deployment's tick leaves the empty replacement alone, and sees that somebody serves.
    assert pool.turn(covered.house) == set()
    assert covered.machine().state == MachineState.READY
    assert market.pool_memory_from(PoolState.objects.get().pool_memory).rest.idle_since_s is None
    covered.tick()
    successor = covered.replica()
    assert successor.machine_id == new.id
    assert Replica.objects.get(id=served.id).phase == ReplicaPhase.READY, "it serves until the successor does"
    covered.report(successor, Reported.READY)
    covered.tick()
    assert Replica.objects.get(id=served.id).phase == ReplicaPhase.DRAINING
    covered.report(served, Reported.STOPPED)
    assert reconcile.reconcile(covered.house).n_released == 1
    assert covered.provider.terminated == [old.provider_ref]
    assert [m.id for m in _alive()] == [new.id]
    assert pool.turn(covered.house) == set()
    assert [m.id for m in _alive()] == [new.id], "and there it rests"


def test_turns_are_kept_with_what_they_weighed_and_replay(covered: Scaling) -> None:
    covered.provider.exhausted = {}
    Offer.objects.update(refused_until=None)
    pool.turn(covered.house)
    covered.machine_up()
    pool.turn(covered.house)
    buys, gives = PoolDecision.objects.filter(kind=PoolDecisionKind.POOL).order_by("at")
    for row, told in (
        (buys, f"order   buy {SPOT.name} to stand in for mch_"),
        (gives, "order   give up mch_"),
    ):
        out = StringIO()
        call_command("explain", "decision", str(row), stdout=out)
        assert told in out.getvalue()
        assert "which machine to give up" in out.getvalue()
        assert "by the same policy: the same result" in out.getvalue()
    assert "its replacement" in gives.outcome["give_up"][0]["why"]


def test_somebody_elses_turn_at_the_same_time_does_nothing_twice(
    covered: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered.provider.exhausted = {}
    Offer.objects.update(refused_until=None)
    plan: Callable[..., object] = pool.plan_pool

    def meanwhile(inputs: object) -> object:
        monkeypatch.setattr(pool, "plan_pool", plan)
        pool.turn(covered.house)
        return plan(inputs)

    monkeypatch.setattr(pool, "plan_pool", meanwhile)
    pool.turn(covered.house)
    assert len(_alive()) == 2
    assert PoolDecision.objects.filter(kind=PoolDecisionKind.POOL).count() == 1


def test_a_crash_after_the_turn_was_written_down_buys_one_machine_all_the_same(
    covered: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered.provider.exhausted = {}
    Offer.objects.update(refused_until=None)
    with monkeypatch.context() as patch:
        patch.setattr(pool.launch, "launch", _dies)
        with pytest.raises(RuntimeError, match="pulled"):
            pool.turn(covered.house)
    assert PoolDecision.objects.filter(kind=PoolDecisionKind.POOL).count() == 1
    assert len(_alive()) == 1
    pool.turn(covered.house)
    pool.turn(covered.house)
    assert len(_alive()) == 2
    # The machine was bought and the answer lost: found again by its token, and not bought a second time.
    Machine.objects.filter(replaces__isnull=False).update(
        provider_ref="", created_at=timezone.now() - timedelta(minutes=1)
    )
    reconcile.reconcile(covered.house)
    pool.turn(covered.house)
    assert len(covered.provider.machines) == len(_alive()) == 2


def _dies(*_: object, **__: object) -> None:
    raise RuntimeError("the plug was pulled")


def test_a_spare_is_bought_and_outlives_the_time_that_empty_machines_are_kept(scaling: Scaling) -> None:
    scaling.provider.kinds = [SPOT, replace(SPOT, zone="z-b"), COVER]
    scaling.configure(max_machines=3, machine_keep_warm_s=0.0)
    scaling.serving()
    pool.turn(scaling.house)
    spare = scaling.machine()
    assert spare.replaces is None
    assert market.kept_warm(scaling.house.config, "c0", "fake") == (1, 0.0)
    scaling.machine_up()
    reconcile.reconcile(scaling.house)
    assert len(_alive()) == 2
    PoolState.objects.update(pool_memory={})
    reconcile.reconcile(scaling.house)
    assert [m.id for m in _alive()] == [m.id for m in _alive() if m.id != spare.id]


def test_a_machine_without_work_is_kept_as_long_as_the_ladder_says(scaling: Scaling) -> None:
    scaling.provider.kinds = [COVER]
    scaling.configure(machine_keep_warm_s=0.0)
    served = scaling.serving()
    pool.turn(scaling.house)
    scaling.change(min_replicas=0)
    Replica.objects.filter(id=served.id).update(phase=ReplicaPhase.STOPPED, stopped_at=timezone.now())
    pool.turn(scaling.house)
    assert market.kept_warm(scaling.house.config, "c0", "fake") == (1, 0.0)
    reconcile.reconcile(scaling.house)
    assert len(_alive()) == 1, "an hour of it costs less than the next request's wait"
    later = timezone.now() + timedelta(hours=3)
    market.refresh(scaling.provider, "c0", later)
    pool.turn(scaling.house, later)
    reconcile.reconcile(scaling.house, later)
    assert _alive() == []
    # Work, and then none again: the gap is remembered.
    scaling.queue("later")
    scaling.tick()
    pool.turn(scaling.house, later)
    memory = market.pool_memory_from(PoolState.objects.get().pool_memory)
    assert (memory.rest.rung, round(memory.rest.gaps.weight)) == ("", 1)


def test_a_pool_without_a_market_has_nothing_to_weigh(scaling: Scaling) -> None:
    scaling.serving()
    assert pool.turn(scaling.house) == set()
    assert not PoolState.objects.exists()
