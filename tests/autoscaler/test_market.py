"""Machines bought from a market: the plan is fixed in the row, refusals are remembered, prices follow the provider."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from django.utils import timezone

from autoscaler import market, reconcile
from autoscaler.models import Machine, MachineState, Offer, PoolState
from autoscaler.policy.spot import Learned, SpotMemory
from infra.providers.base import Offering, Refusal
from tests.autoscaler.conftest import Scaling

SPOT_A = Offering(
    instance_type="g6.xlarge", zone="z-a", is_spot=True, price_nano_per_h=300_000_000, gpu="l4", n_gpus=1
)
SPOT_B = replace(SPOT_A, zone="z-b", price_nano_per_h=350_000_000)
COVER = replace(SPOT_A, is_spot=False, price_nano_per_h=805_000_000)


@pytest.fixture
def selling(scaling: Scaling) -> Scaling:
    scaling.provider.kinds = [SPOT_B, COVER, SPOT_A]
    return scaling


def _machines() -> list[Machine]:
    return list(Machine.objects.exclude(state=MachineState.GONE).order_by("created_at"))


def test_the_best_offer_is_bought_at_its_price(selling: Scaling) -> None:
    selling.queue("a")
    selling.tick()
    [machine] = _machines()
    assert machine.launch_plan == ["spot/z-a/g6.xlarge", "spot/z-b/g6.xlarge", "on-demand/z-a/g6.xlarge"]
    assert (machine.offering, machine.price_nano_per_h) == ("spot/z-a/g6.xlarge", 300_000_000)


def test_a_zone_without_machines_costs_no_tick_and_is_left_alone_for_a_while(selling: Scaling) -> None:
    selling.provider.exhausted = {SPOT_A.name: "InsufficientInstanceCapacity"}
    selling.configure(max_machines=2)
    selling.queue("a")
    selling.tick()
    assert [m.offering for m in _machines()] == [SPOT_B.name]
    refused = Offer.objects.get(name=SPOT_A.name)
    assert (refused.n_refusals, refused.refusal_code) == (1, "InsufficientInstanceCapacity")
    assert market.plan(selling.provider, selling.house.config, "c0").names[0] == SPOT_B.name  # type: ignore[union-attr]
    later = timezone.now() + timedelta(seconds=61)
    again = market.plan(selling.provider, selling.house.config, "c0", later)
    assert again is not None
    assert SPOT_A.name in again.names


def test_refusals_in_a_row_wait_longer_and_a_machine_forgives_them(selling: Scaling) -> None:
    market.refresh(selling.provider, "c0")
    now = timezone.now()
    for _ in range(3):
        market.note_refusals((Refusal(SPOT_A.name, "x"), Refusal("spot/nowhere/t", "x")), "c0", "fake", now)
    row = Offer.objects.get(name=SPOT_A.name)
    assert row.refused_until == now + timedelta(seconds=240)
    market.note_given(SPOT_A.name, "c0", "fake")
    forgiven = Offer.objects.get(name=SPOT_A.name)
    assert (forgiven.n_refusals, forgiven.refused_until) == (0, None)


def test_nothing_is_asked_while_everything_refuses(selling: Scaling) -> None:
    selling.provider.exhausted = {o.name: "none" for o in selling.provider.kinds}
    selling.queue("a")
    selling.tick()
    n_calls = selling.provider.n_launch_calls
    assert n_calls == 1
    assert Offer.objects.filter(n_refusals=1).count() == 3
    selling.tick()
    assert selling.provider.n_launch_calls == n_calls
    assert _machines() == []


def test_a_lost_answer_is_completed_with_the_same_plan_and_buys_one_machine(selling: Scaling) -> None:
    selling.provider.lose_reply = True
    selling.queue("a")
    with pytest.raises(TimeoutError):
        selling.tick()
    [machine] = _machines()
    assert machine.provider_ref == ""
    selling.provider.kinds = [
        replace(SPOT_A, price_nano_per_h=900_000_000),
        SPOT_B,
    ]  # the market has moved on
    reconcile.reconcile(selling.house, timezone.now() + timedelta(minutes=1))
    [machine] = _machines()
    assert machine.provider_ref
    assert machine.offering == SPOT_A.name
    assert len(selling.provider.machines) == 1


def test_a_machine_that_the_provider_does_not_list_yet_is_waited_for(selling: Scaling) -> None:
    selling.provider.lists_after_s = 60.0
    selling.queue("a")
    selling.tick()
    selling.provider.machines.clear()
    reconcile.reconcile(selling.house, timezone.now() + timedelta(seconds=30))
    assert len(_machines()) == 1
    reconcile.reconcile(selling.house, timezone.now() + timedelta(seconds=90))
    assert _machines() == []


def test_what_is_not_listed_any_more_goes_stale(selling: Scaling) -> None:
    market.refresh(selling.provider, "c0")
    selling.provider.kinds = [COVER]
    later = timezone.now() + market.STALE_AFTER + timedelta(seconds=1)
    market.refresh(selling.provider, "c0", later)
    plan = market.plan(selling.provider, selling.house.config, "c0", later)
    assert plan is not None
    assert plan.names == (COVER.name,)


def test_what_the_policy_learned_is_kept_between_plans(selling: Scaling) -> None:
    memory = SpotMemory(5.0, {"spot/a": Learned(1.5, 2.0, None)}, {"spot/a": 1}, lost_at_s=4.0)
    assert market.memory_from(market.memory_to(memory)) == memory
    assert market.memory_from({"offers": 3}) == SpotMemory()
    selling.queue("a")
    selling.tick()
    state = PoolState.objects.get()
    assert state.version == 1
    assert set(market.memory_from(state.memory).offers) == {SPOT_A.name, SPOT_B.name}
