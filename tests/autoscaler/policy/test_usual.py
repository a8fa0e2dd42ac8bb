"""The usual load: a bounded histogram that forgets, whose level lies among what was seen; and the wish that follows."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.codec import from_json, to_json
from autoscaler.policy.replicas import wish
from autoscaler.policy.usual import MAX_BUCKETS, RATIO, UsualMemory, learn, level
from autoscaler.types import Observation, ReplicaPhase, ReplicaView, ScalerMemory, ScalerSpec

LOADS = st.lists(st.floats(0, 5e6), min_size=2, max_size=60)


def seen(loads: list[float], every_s: float = 15.0, memory_s: float = 600.0) -> UsualMemory:
    memory = None
    for n, load in enumerate(loads):
        memory = learn(n * every_s, load, memory_s, memory)
    assert memory is not None
    return memory


@given(LOADS, st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_a_level_lies_among_what_was_seen_and_rises_with_its_share(
    loads: list[float], a: float, b: float
) -> None:
    memory = seen(loads)
    low, high = level(min(a, b), memory, 0.0), level(max(a, b), memory, 0.0)
    assert low is not None and high is not None
    assert low <= high
    assert max(min(loads[1:]), 1) / RATIO <= low
    assert high <= min(max(*loads[1:], 1.0), RATIO ** (MAX_BUCKETS - 1)) * RATIO
    assert len(memory.weights) <= MAX_BUCKETS
    assert from_json(UsualMemory, to_json(memory)) == memory


def test_it_knows_bursts_that_come_again_and_forgets_one_that_came_once() -> None:
    bursty = [100.0 if n % 4 == 0 else 20.0 for n in range(80)]
    once = [100.0] * 4 + [20.0] * 76
    assert level(0.8, seen(bursty), 0.0) == pytest.approx(100, rel=0.03)
    assert level(0.8, seen(once), 0.0) == pytest.approx(20, rel=0.03)


def test_looking_more_often_says_the_same() -> None:
    often = seen([30.0 if n % 300 < 60 else 10.0 for n in range(1200)], 1.0)
    rarely = seen([30.0 if n % 20 < 4 else 10.0 for n in range(80)], 15.0)
    for share in (0.5, 0.7, 0.85):
        assert level(share, often, 0.0) == level(share, rarely, 0.0)


def test_it_cannot_tell_before_enough_was_seen_and_a_pause_is_no_load() -> None:
    assert level(0.5, None, 0.0) is None
    memory = seen([10.0] * 5)
    assert level(0.5, memory, 100.0) is None
    paused = learn(1e6, 50.0, 600.0, memory)
    assert sum(paused.weights) <= 60.0
    assert learn(5.0, 99.0, 600.0, paused) == paused  # backwards in time


SPEC = ScalerSpec(0, 1, 100, 1e9, 10, stable_window_s=15.0, scale_down_delay_s=30.0, usual_s=600.0)


def after(spec: ScalerSpec, loads: list[float], n_replicas: int) -> list[int]:
    """Replicas wanted at each look, so many being there and ready all along."""
    memory, wanted = ScalerMemory(), []
    for n, load in enumerate(loads):
        now_s = n * 15.0
        each, rest = divmod(int(load), n_replicas)
        views = tuple(
            ReplicaView(f"{i}", "m", ReplicaPhase.READY, 0.0, 0.0, 10, each + (i < rest), None, n)
            for i in range(n_replicas)
        )
        found = wish(Observation(now_s, "d", 0, views), spec, memory)
        memory = found.memory
        wanted.append(found.n)
    return wanted


def test_room_stays_for_bursts_that_come_every_few_minutes() -> None:
    """Eighty requests in one quarter of the time, else twenty: a short delay alone would give the room up."""
    loads = [80.0 if n % 12 < 4 else 20.0 for n in range(120)]
    assert min(after(replace(SPEC, usual_s=0.0), loads, 10)[60:]) <= 5
    assert min(after(SPEC, loads, 10)[60:]) >= 9


def test_a_replica_is_given_up_only_when_some_of_it_is_free_beyond_the_usual() -> None:
    """Usual 40, 49 with its deviations: five replicas, and a sixth stays until spare_ratio of it is free."""
    loads = [40.0] * 100
    spec = replace(SPEC, usual_deviations=1.4)
    assert after(replace(spec, spare_ratio=0.0), loads, 6)[-1] == 5
    assert after(replace(spec, spare_ratio=0.3), loads, 6)[-1] == 6
    assert after(replace(spec, spare_ratio=0.3), loads, 5)[-1] == 5, "it is kept, not bought"


@pytest.mark.parametrize(
    ("knob", "value"),
    [("usual_share", 0.0), ("usual_deviations", -1.0), ("spare_ratio", 1.5), ("usual_s", -1.0)],
)
def test_knobs_out_of_range_are_named(knob: str, value: float) -> None:
    with pytest.raises(ValueError, match=knob):
        replace(SPEC, **{knob: value})  # type: ignore[arg-type]
