"""Replicas that are being started, as capacity ahead: its properties, and what counting them is worth."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.coming import MAX_STARTS, Coming, drained_s, drains_in_s, of, parse, text
from controlplane.policy.fairness import FairQueue
from controlplane.policy.flows import ANY_MS, Flow, Request
from controlplane.policy.outlook import Gate
from controlplane.policy.pace import Speed
from controlplane.policy.promises import CLASSES
from tests.controlplane.policy.test_outlook import INTERACTIVE, warm

_starts = st.lists(st.builds(Coming, st.integers(1, 64), st.floats(0, 100)), max_size=6).map(
    lambda found: tuple(sorted(found, key=lambda c: c.in_s))
)


@given(st.floats(0, 1000), st.integers(1, 64), _starts)
def test_what_drains_in_a_time_takes_that_time(wait_s: float, slots: int, coming: tuple[Coming, ...]) -> None:
    assert drains_in_s(drained_s(wait_s, slots, coming), slots, coming) == pytest.approx(wait_s, abs=1e-6)


@given(st.floats(0, 1000), st.integers(0, 64), _starts, st.integers(1, 64), st.floats(0, 100))
def test_another_start_never_makes_it_later(
    work_s: float, slots: int, coming: tuple[Coming, ...], more: int, in_s: float
) -> None:
    wider = tuple(sorted((*coming, Coming(more, in_s)), key=lambda c: c.in_s))
    if slots or coming:
        assert drains_in_s(work_s, slots, wider) <= drains_in_s(work_s, slots, coming) + 1e-6
    assert drained_s(work_s, slots, wider) >= drained_s(work_s, slots, coming)


def test_without_starts_it_is_what_it_was() -> None:
    assert drains_in_s(12.0, 4, ()) == 3.0
    assert drains_in_s(12.0, 0, ()) == 12.0, "as if there were one"
    assert drained_s(-1.0, 4, ()) == -4.0


def test_with_nothing_ready_a_request_waits_for_the_start() -> None:
    assert drains_in_s(4.0, 0, (Coming(8, 20.0),)) == 20.5
    assert drains_in_s(40.0, 2, (Coming(8, 10.0),)) == 12.0


def test_a_start_that_is_late_is_taken_to_need_as_long_again() -> None:
    (soon,), (late,) = of(((4, 30_000),), 10_000), of(((4, 30_000),), 90_000)
    assert (soon.in_s, late.in_s) == (20.0, 60.0)
    assert [c.slots for c in of(((1, 50), (2, 40)), 0)] == [2, 1], "soonest first"


def test_what_is_told_is_read_again_and_nonsense_is_nothing() -> None:
    assert parse(text([(8, 5_000), (4, 1_000)]).encode()) == ((4, 1_000), (8, 5_000))
    assert len(parse(text([(1, i + 1) for i in range(1_000)]).encode())) == MAX_STARTS
    for nonsense in (None, b"", b"x", b"1", b"1:2:3", b"-1:5", b"0:5", b"4:-5", b"\xff:1", b"4:" + b"9" * 30):
        assert parse(nonsense) == ()
    assert Speed.parse(Speed(0.05, 1e-4, 0.02).text.encode()) == Speed(0.05, 1e-4, 0.02)
    for nonsense in (None, b"", b"a b c", b"1 2", b"nan 0 0", b"-1 0 0", b"1e9 0 0"):
        assert Speed.parse(nonsense) is None


def test_a_start_within_the_target_lets_more_wait_and_one_beyond_it_does_not() -> None:
    gate = warm()
    (alone,) = (gate.terms("o", INTERACTIVE, 10, 10, slots=4),)
    for in_s, is_more in ((0.2, True), (5.0, False)):
        coming = (Coming(4, in_s),)
        found = gate.terms("o", INTERACTIVE, 10, 10, slots=4, coming=coming)
        assert (found.most_ahead_ms > alone.most_ahead_ms) == is_more
        assert (found.most_own_ms > alone.most_own_ms) == is_more
    record, ahead_ms = gate.record("o", INTERACTIVE), alone.most_ahead_ms + 40_000
    assert record.late(alone, ahead_ms, 4) == pytest.approx(10, rel=0.05)
    assert record.late(alone, ahead_ms, 4, (Coming(12, 2.0),)) == pytest.approx(4, rel=0.05)


def test_a_pace_that_was_said_beforehand_is_where_learning_begins() -> None:
    gate = Gate()
    gate.presume(Speed(0.4, 1e-3, 0.1))
    assert gate.pace.slot_s(1_000, 100) == pytest.approx(0.4 + 1.0 + 10)
    assert gate.terms("o", INTERACTIVE, 10, 10, slots=4).most_ahead_ms == ANY_MS, (
        "and nobody is refused by it"
    )
    for _ in range(100):
        gate.pace.saw_answer(100, 11, 0.2)
    assert gate.pace.step_s == pytest.approx(0.02, rel=0.05)


STANDARD = CLASSES[1]


def served(told: bool, seed: int = 3) -> tuple[int, int]:
    """A replica of 8 slots is asked for twice of what it serves, and a second one starts at 10 s and is ready at 14 s:
    of the requests that came meanwhile, those that had their first word in time (5 s), and those refused."""
    rng, gate, queue = random.Random(seed), warm(0.05, 1e-4, 0.02), FairQueue(bound=5_000)
    queue.enrol("a", 8, 0)
    began_s, ready_s, slots = 10.0, 14.0, 8
    events: list[tuple[float, int, str]] = [(ready_s, 0, "")]
    at_s, came = 0.0, dict[str, float]()
    while at_s < 20:
        at_s += rng.expovariate(16 / 2.1)  # an answer takes 2.1 s on average
        came[name := f"q{len(came)}"] = at_s
        heapq.heappush(events, (at_s, 2, name))
    n_good = n_refused = 0
    while events:
        now_s, kind, name = heapq.heappop(events)
        now_ms = int(now_s * 1000)
        if kind == 0:
            slots, bound = 16, queue.enrol("b", 8, now_ms)
        elif kind == 1:
            bound = queue.settle(name, now_ms, n_prompt=100, n_cached=0, n_output=100)
        else:
            starts = ((8, int(ready_s * 1000)),) if told and began_s <= now_s < ready_s else ()
            coming = of(starts, now_ms)
            terms = gate.terms("o", STANDARD, 100, 100, slots=slots, coming=coming)
            request = Request(name, Flow(0, "o", "p", "k"), now_ms, 100, 100, slot_ms=terms.slot_ms)
            verdict, bound = queue.admit(request, now_ms, ["a", "b"], most_ahead_ms=terms.most_ahead_ms)
            if verdict == "late":
                n_refused += began_s <= now_s < ready_s
        for request_id, _ in bound:
            in_time = now_s + 0.06 - came[request_id] <= 5.0
            n_good += in_time and began_s <= came[request_id] < ready_s
            heapq.heappush(events, (now_s + 0.06 + max(2, rng.expovariate(1 / 100)) * 0.02, 1, request_id))
    return n_good, n_refused


def test_while_a_replica_starts_more_are_admitted_and_served_in_time() -> None:
    counted, blind = (
        [sum(c) for c in zip(*(served(told, seed) for seed in range(8)), strict=True)]
        for told in (True, False)
    )
    print(f"in time and refused while it started: {counted} with its ETA, {blind} without")
    assert counted[0] > 1.3 * blind[0]
    assert counted[1] < 0.6 * blind[1]
