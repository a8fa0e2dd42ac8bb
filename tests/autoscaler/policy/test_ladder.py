"""The ladder: twice the best at most without history, the best there is on its own history with it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy import ladder
from autoscaler.policy.ladder import Gaps, Rung, Stakes, Step, cheapest, efficient, envelope, gap_usd, rest

RUNGS = (
    Rung("serving", 1.0, 0.0),
    Rung("asleep", 0.1, 2.0),
    Rung("zygote", 0.03, 10.0),
    Rung("disk", 0.01, 40.0),
    Rung("nothing", 0.0, 180.0),
)
STAKES = Stakes(ttft_target_s=1.0, late_usd=0.0, late_usd_per_s=0.002, waking_usd_per_h=1.0)
_RUNGS = st.lists(st.builds(Rung, st.just("r"), st.floats(0, 10), st.floats(0, 500)), min_size=1, max_size=6)
_STAKES = st.builds(Stakes, st.floats(0, 10), st.floats(0, 1), st.floats(0, 0.1), st.floats(0, 10))


@settings(deadline=None, max_examples=100)
@given(_RUNGS, _STAKES, st.floats(0, 1e6))
def test_without_history_no_gap_costs_more_than_twice_what_knowing_it_would(
    rungs: list[Rung], stakes: Stakes, gap_s: float
) -> None:
    best = min(r.usd_per_h * gap_s / 3600 + stakes.wake_usd(r) for r in rungs)
    steps = rest(rungs, stakes, Gaps()).steps
    assert gap_usd(steps, stakes, gap_s) <= 2 * best * (1 + 1e-9) + 1e-9
    ages = [s.from_s for s in steps]
    assert ages[0] == 0
    assert ages == sorted(set(ages))
    assert [s.rung.usd_per_h for s in steps] == sorted((s.rung.usd_per_h for s in steps), reverse=True)


def test_the_envelope_descends_rung_by_rung() -> None:
    steps = envelope(RUNGS, STAKES)
    assert [s.rung.name for s in steps] == ["serving", "asleep", "zygote", "disk", "nothing"]
    for step, before in zip(steps[1:], steps, strict=False):  # where both lines meet
        lines = [s.rung.usd_per_h * step.from_s / 3600 + STAKES.wake_usd(s.rung) for s in (before, step)]
        assert lines[0] == pytest.approx(lines[1])


def _expected(steps: tuple[Step, ...], gaps: Gaps) -> float:
    """Cost per gap as cheapest() reckons it, forwards."""
    weights = [w + ladder.PRIOR / ladder.N_BINS for w in gaps.weights]
    total, usd, before = sum(weights), 0.0, RUNGS[0]
    left = total
    for i, weight in enumerate(weights):
        rung = next(s.rung for s in reversed(steps) if s.from_s <= ladder.EDGES_S[i])
        usd += left / total * STAKES.climb_usd(before, rung)
        is_last = i == ladder.N_BINS - 1
        hours = (ladder.EDGES_S[i] if is_last else ladder.EDGES_S[i + 1] - ladder.EDGES_S[i]) / 3600
        usd += rung.usd_per_h * hours * (left if is_last else left - weight / 2) / total
        usd += weight / total * STAKES.wake_usd(rung)
        left, before = left - weight, rung
    return usd


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.floats(0.5, 300_000), min_size=8, max_size=20),
    st.lists(
        st.tuples(st.sampled_from(ladder.EDGES_S[1:]), st.sampled_from(RUNGS)),
        max_size=5,
        unique_by=lambda x: x[0],
    ),
)
def test_no_other_schedule_is_cheaper_on_the_history(
    seen: list[float], other: list[tuple[float, Rung]]
) -> None:
    gaps = Gaps()
    for gap_s in seen:
        gaps = gaps.seen(gap_s)
    steps, usd = cheapest(RUNGS, STAKES, gaps)
    assert usd == pytest.approx(_expected(steps, gaps))
    for first in RUNGS:
        rival = (Step(0.0, first), *(Step(a, r) for a, r in sorted(other, key=lambda x: x[0])))
        assert usd <= _expected(rival, gaps) + 1e-9
    assert usd <= min(_expected((Step(0.0, RUNGS[0]), Step(a, RUNGS[-1])), gaps) for a in ladder.EDGES_S[1:])


def _history(gaps_s: list[float]) -> Gaps:
    gaps = Gaps()
    for gap_s in gaps_s:
        gaps = gaps.seen(gap_s)
    return gaps


def test_a_request_every_two_hours_is_met_warm_and_the_rest_of_the_time_is_cheap() -> None:
    dear = replace(STAKES, late_usd_per_s=0.02)
    found = rest(RUNGS, dear, _history([7200.0] * 50))
    assert found.at(7200).wake_s <= 2, found.reason
    assert found.at(1800).usd_per_h <= 0.03, "not kept warm for two hours"
    assert found.expected_usd is not None
    assert found.expected_usd < gap_usd(envelope(RUNGS, dear), dear, 7200)


def test_a_busy_deployment_stays_warm_and_a_forgotten_one_does_not() -> None:
    busy = rest(RUNGS, STAKES, _history([5.0] * 50))
    assert busy.at(7).name == "serving"
    rare = rest(RUNGS, STAKES, _history([200_000.0] * 50))
    assert rare.at(60).usd_per_h <= 0.03
    assert rest(RUNGS, STAKES, _history([5.0] * 7)).expected_usd is None, "too little history"


def test_old_habits_fade() -> None:
    gaps = _history([5.0] * 400)
    for _ in range(400):
        gaps = gaps.seen(50_000.0)
    assert sum(gaps.weights[: ladder.N_BINS // 2]) < 0.15 * gaps.weight
    assert rest(RUNGS, STAKES, gaps).at(600).usd_per_h < 1


def test_a_target_above_the_wake_up_lets_the_spare_sleep() -> None:
    patient = Stakes(ttft_target_s=15.0, late_usd=0.1, late_usd_per_s=0.05, waking_usd_per_h=0.0)
    steps = envelope(efficient(RUNGS), patient)
    assert steps[0].rung.name == "zygote", "nobody is late, so nothing dearer is held at any time"


def test_rungs_that_another_beats_are_left_out() -> None:
    beaten = Rung("beaten", 0.2, 3.0)
    assert efficient((*RUNGS, beaten)) == RUNGS
    for order in itertools.islice(itertools.permutations(RUNGS), 5):
        assert efficient(order) == RUNGS
    with pytest.raises(ValueError, match="rungs"):
        efficient(())
