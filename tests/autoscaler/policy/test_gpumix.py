"""The choice of GPU kinds: never dearer than one kind, never beyond what a kind can do, exact if checkable."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.gpumix import cheapest
from autoscaler.policy.gpumix import (
    Fleet,
    Kind,
    Promise,
    bucket_of,
    buckets,
    describe,
    greedy,
    load,
    loads,
    single,
)
from controlplane.policy.capacity import Mix, capacity
from controlplane.policy.perfmodel import StepModel

FAST = Kind("fast", 4.0, StepModel(0.004, 0.006, 2e-5, 1e-5, 1e-8, 1e-9), 400_000)
SLOW = Kind("slow", 1.0, StepModel(0.010, 0.030, 2e-4, 1e-5, 5e-8, 1e-8), 60_000)
PROMISE = Promise(0.06, 2.0)
SIZES = [(100, 100)] * 60 + [(300, 400)] * 30 + [(6000, 50)] * 10


def needed(plan: Fleet, kinds: list[Kind], table: list[list[float]]) -> dict[str, float]:
    """Replicas by kind that the plan's shares keep busy."""
    found = dict.fromkeys((k.name for k in kinds), 0.0)
    for row, shares in zip(table, plan.shares, strict=True):
        assert sum(shares.values()) == pytest.approx(1.0)
        for at, kind in enumerate(kinds):
            if shares.get(kind.name, 0) > 0:
                found[kind.name] += shares[kind.name] * row[at]
    return found


def test_buckets_hold_every_request_at_its_rate() -> None:
    found = buckets(SIZES, 20.0)
    assert sum(b.requests_per_s for b in found) == pytest.approx(20.0)
    assert [b.requests_per_s for b in found] == pytest.approx([12.0, 6.0, 2.0])
    assert [(b.n_prompt, b.n_output) for b in found] == [(100, 100), (300, 400), (6000, 50)]
    assert all(b.key == bucket_of(round(b.n_prompt), round(b.n_output)) for b in found)
    with pytest.raises(ValueError, match="0 sizes"):
        buckets([], 1.0)


def test_the_load_is_the_rate_over_what_a_replica_does_in_time() -> None:
    bucket = buckets([(100, 100)], 30.0)[0]
    most = capacity(FAST.step, FAST.kv_tokens, Mix(100, 100), PROMISE.itl_s, 256).requests_per_s
    assert load(FAST, bucket, PROMISE) == pytest.approx(30.0 / (most * PROMISE.utilisation))


def test_a_kind_that_cannot_keep_the_promise_gets_none_of_it() -> None:
    long, small = buckets([(6000, 50)], 1.0)[0], buckets([(100, 100)], 1.0)[0]
    assert SLOW.step.prefill_s(6000) > PROMISE.prompt_share * PROMISE.ttft_s
    assert math.isinf(load(SLOW, long, Promise(0.5, 2.0)))
    assert math.isfinite(load(SLOW, long, Promise(0.5, 20.0)))
    assert math.isfinite(load(SLOW, small, PROMISE))
    assert math.isinf(load(SLOW, small, Promise(0.03, 2.0)))  # a step alone takes 40 ms
    tiny = Kind("tiny", 1.0, FAST.step, 5_000)
    assert math.isinf(load(tiny, long, PROMISE))  # 6,050 tokens of KV


def test_a_mix_beats_one_kind_where_each_is_best_at_something() -> None:
    kinds = [FAST, SLOW]
    table = loads(kinds, buckets(SIZES, 30.0), PROMISE)
    mixed, alone = cheapest(kinds, table), single(kinds, table)
    assert mixed is not None and alone is not None
    assert set(alone.replicas) == {"fast"}
    assert set(mixed.replicas) == {"fast", "slow"}
    assert mixed.usd_per_h < alone.usd_per_h
    assert mixed.usd_per_h >= mixed.bound_usd_per_h > 0


costs = st.floats(0.2, 8.0)
rows = st.lists(st.one_of(st.floats(0.01, 3.0), st.just(math.inf)), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.tuples(costs, costs, costs), st.lists(rows, min_size=1, max_size=4))
def test_the_solver_finds_the_cheapest_and_nobody_is_overloaded(
    usd: tuple[float, float, float], table: list[list[float]]
) -> None:
    kinds = [Kind(name, price, FAST.step, 1000) for name, price in zip("abc", usd, strict=True)]
    plan = cheapest(kinds, table)
    if any(all(math.isinf(v) for v in row) for row in table):
        assert plan is None
        return
    assert plan is not None
    for name, busy in needed(plan, kinds, table).items():
        assert busy <= plan.replicas.get(name, 0) + 1e-5
    by_hand = greedy(kinds, table)
    assert by_hand is not None and plan.usd_per_h <= by_hand.usd_per_h + 1e-9
    alone = single(kinds, table)
    assert alone is None or plan.usd_per_h <= alone.usd_per_h + 1e-9
    if len(table) == 1:  # one bucket: every number of each kind can be looked at
        per_replica = [1 / v if math.isfinite(v) else 0.0 for v in table[0]]
        cheapest_usd = (
            min(
                sum(n * p for n, p in zip(counts, usd, strict=True))
                for counts in itertools.product(range(5), repeat=3)
                if sum(n * done for n, done in zip(counts, per_replica, strict=True)) >= 1 - 1e-9
            )
            if max(per_replica) > 0.3
            else None
        )
        if cheapest_usd is not None:
            assert plan.usd_per_h == pytest.approx(cheapest_usd, rel=1e-4)


def test_no_more_replicas_than_there_are() -> None:
    scarce = Kind("fast", 4.0, FAST.step, FAST.kv_tokens, n_most=1)
    table = loads([scarce, SLOW], buckets(SIZES, 30.0), PROMISE)
    found = cheapest([scarce, SLOW], table)
    assert found is not None and found.replicas["fast"] == 1
    assert describe([scarce], [[2.5]], [{"fast": 1.0}]) is None
    none_left = Kind("fast", 4.0, FAST.step, FAST.kv_tokens, n_most=0)
    assert cheapest([none_left, SLOW], loads([none_left, SLOW], buckets(SIZES, 30.0), PROMISE)) is None


def test_settings_outside_their_range_are_named() -> None:
    with pytest.raises(ValueError, match="utilisation"):
        Promise(0.1, 1.0, 1.5)
    with pytest.raises(ValueError, match="usd_per_h"):
        Kind("free", 0.0, FAST.step, 10)
    with pytest.raises(ValueError, match="time_limit_s"):
        cheapest([FAST], [[1.0]], time_limit_s=0)
    with pytest.raises(ValueError, match="11 kinds"):
        greedy([Kind(str(n), 1.0, FAST.step, 10) for n in range(11)], [[1.0] * 11])
