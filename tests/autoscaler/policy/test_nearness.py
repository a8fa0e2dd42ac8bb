"""Replicas go where they serve soonest: weights at hand, links that are busy, boots, and several at once."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.policy import alternatives
from autoscaler.policy.decide import decide
from autoscaler.policy.nearness import nearness
from autoscaler.policy.placement import place
from autoscaler.policy.pool import Pool
from autoscaler.types import (
    Loading,
    MachineState,
    MachineView,
    Observation,
    ScalerMemory,
    StartReplica,
)
from tests.autoscaler.policy.scene import T0, machine, spec

GB = 1e9
LOADING = Loading(
    size_bytes=16_000_000_000,
    ram_bps=10 * GB,
    disk_bps=2 * GB,
    nic_bps=1 * GB,
    store_bps=1 * GB,
    init_s=5.0,
    boot_s=60.0,
)


def observed(*machines: MachineView, loading: Loading | None = LOADING, n_queued: int = 1) -> Observation:
    return Observation(T0, "d1", n_queued, machines=machines, n_machines=len(machines), loading=loading)


def where(*machines: MachineView, n: int = 1, **change: Any) -> list[str]:
    return list(place(n, observed(*machines, **change), spec()).machine_ids)


EMPTY = machine("a", 4)  # would be first: free, ready, and least by id


def test_of_two_machines_the_one_with_the_weights_is_chosen() -> None:
    assert where(EMPTY, machine("b", 1, on_disk=True)) == ["b"]
    assert where(EMPTY, machine("b", 1, on_disk=True), loading=None) == ["a"], (
        "where nothing is to be loaded: the freer"
    )
    assert where(machine("b", 2, on_disk=True), machine("c", 1, in_ram=True, on_disk=True)) == ["c"]


@pytest.mark.parametrize(
    ("own", "tier", "seconds"),
    [
        ({"in_ram": True, "on_disk": True}, "ram", 1.6 + 5),
        ({"on_disk": True}, "disk", 8 + 5),
        ({"on_disk": True, "disk_bytes": 4 * GB}, "disk", 2 + 8 + 5),
        ({}, "store", 16 + 5),
        ({"nic_bytes": 3 * GB}, "store", 3 + 16 + 5),
        ({"state": MachineState.PENDING}, "store", 60 + 16 + 5),
    ],
)
def test_seconds_are_queue_and_size_over_bandwidth_and_the_rest(
    own: dict[str, Any], tier: str, seconds: float
) -> None:
    found = nearness(observed(machine("a", 4, **own)))["a"]
    assert (found.start.tier, found.seconds) == (tier, pytest.approx(seconds))


def test_a_queue_before_the_disk_can_cost_more_than_the_network() -> None:
    assert where(EMPTY, machine("b", 4, on_disk=True, disk_bytes=15 * GB)) == ["b"]
    assert where(EMPTY, machine("b", 4, on_disk=True, disk_bytes=60 * GB)) == ["a"]


def test_a_sibling_sends_only_where_it_is_said_to() -> None:
    holder = {"on_disk": True, "in_ram": True}
    slow_store = Loading(16_000_000_000, 10 * GB, 2 * GB, 1 * GB, 0.1 * GB)
    for sends, tier in ((True, "sibling"), (False, "store")):
        seen = observed(EMPTY, machine("b", 0, sends=sends, **holder), loading=slow_store)
        assert nearness(seen)["a"].start.tier == tier


def test_several_at_once_spread_over_what_links_allow() -> None:
    machines = (machine("a", 4, on_disk=True), machine("b", 4, on_disk=True))
    assert sorted(where(*machines, n=2)) == ["a", "b"], "the second would wait for the first one's reading"
    near = place(3, observed(*machines), spec()).near
    assert [round(n.seconds) for n in near] == [13, 13, 21]


def test_a_machine_that_boots_with_nothing_waits_behind_one_that_fetches() -> None:
    assert where(machine("a", 4, state=MachineState.PENDING), machine("b", 1, nic_bytes=30 * GB)) == ["b"]
    assert where(machine("a", 4, state=MachineState.PENDING), machine("b", 1, nic_bytes=90 * GB)) == ["a"]


def test_differences_below_a_tenth_of_a_second_are_none() -> None:
    assert where(machine("a", 1, nic_bytes=0), machine("b", 2, nic_bytes=1e7)) == ["b"], "the freer one"


def test_the_decision_keeps_what_was_weighed() -> None:
    seen = observed(EMPTY, machine("b", 1, on_disk=True))
    decision = decide(seen, spec(), ScalerMemory())
    (start,) = [c for c in decision.commands if isinstance(c, StartReplica)]
    assert (start.machine_id, start.source, start.start_s) == ("b", "disk", 13.0)
    assert any("weights from disk 13.0 s" in reason for reason in decision.reasons)
    told = {a.subject: a for a in alternatives.of_decision(seen, spec(), decision) if a.question == "machine"}
    assert told["b"].chosen and "13.0 s to serve there with the weights from disk" in told["b"].why
    assert not told["a"].chosen and "21.0 s to serve there with the weights from store" in told["a"].why


def test_a_pool_shows_the_nearest_and_who_could_send_to_them() -> None:
    machines = [machine(f"m{i:03}", 4, ends_at_s=None) for i in range(200)]
    machines[150] = machine("m150", 1, on_disk=True)
    machines[180] = machine("m180", 0, on_disk=True, in_ram=True, sends=True)
    view = Pool(machines).view((), 1, LOADING)
    assert {"m150", "m180"} <= {m.id for m in view} and len(view) < 10
    for loading in (LOADING, None):
        whole = observed(*machines, loading=loading)
        few = observed(*Pool(machines).view((), 3, loading), loading=loading)
        assert place(3, few, spec()).machine_ids == place(3, whole, spec()).machine_ids
