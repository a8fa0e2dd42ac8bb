"""The canary's judge: intervals that hold at all times, and what it does to simulated streams of requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from controlplane.policy.canary import (
    Action,
    Arm,
    Evidence,
    Limits,
    interval,
    judge,
    pairs,
    takes,
    threshold,
)

LIMITS = Limits(alpha=0.05, tolerance=0.05, min_requests=50, step_max_s=86400)
N_STEPS = 3


class Stream:
    """One step of a rollout: `share` of the requests go to the canary, each with its own chances."""

    def __init__(self, seed: int, share: float, *, errors: float, misses: float, slow: float) -> None:
        self.random = random.Random(seed)
        self.share, self.errors, self.misses, self.slow = share, errors, misses, slow
        self.evidence = Evidence()

    def run(self, n_most: int, limits: Limits = LIMITS) -> tuple[Action, int]:
        """(what was decided, canary requests until then), looking after every fourth request of the canary."""
        for _ in range(n_most):
            self._request()
            if self.evidence.canary.n % 4 == 0:
                verdict = judge(self.evidence, limits, n_steps=N_STEPS, in_step_s=0)
                if verdict.action is not Action.WAIT:
                    return verdict.action, self.evidence.canary.n
        return Action.WAIT, self.evidence.canary.n

    def _request(self) -> None:
        """One of the canary, and as many of the stable arm as go with it."""
        e, r = self.evidence, self.random
        stable = e.stable
        for _ in range(round(1 / self.share) - 1):
            stable = _one(stable, r, 0.01, 0.03)
        slower = r.random() < 0.35 if self.slow == 1 else r.gauss(self.slow, 0.3) > r.gauss(1, 0.3) * 1.15
        self.evidence = replace(
            e,
            canary=_one(e.canary, r, self.errors, self.misses),
            stable=stable,
            n_pairs=e.n_pairs + 1,
            n_slower=e.n_slower + slower,
        )


def _one(arm: Arm, r: random.Random, errors: float, misses: float) -> Arm:
    failed = r.random() < errors
    return Arm(arm.n + 1, arm.n_errors + failed, arm.n_missed + (not failed and r.random() < misses))


def outcomes(n_runs: int, make: Callable[[int], Stream], n_most: int = 600) -> list[tuple[Action, int]]:
    return [make(seed).run(n_most) for seed in range(n_runs)]


@pytest.mark.parametrize(
    ("n_runs", "n_most"),
    [(16, 400), pytest.param(200, 800, marks=[pytest.mark.full, pytest.mark.timeout(300)])],
)
def test_an_equal_canary_is_rolled_back_no_oftener_than_alpha_however_often_one_looks(
    n_runs: int, n_most: int
) -> None:
    found = outcomes(n_runs, lambda seed: Stream(seed, 0.1, errors=0.01, misses=0.03, slow=1), n_most)
    n_back = sum(action is Action.BACK for action, _ in found)
    went_on = sorted(n for action, n in found if action is Action.NEXT)
    print(f"false rollbacks {n_back} of {n_runs}; went on {len(went_on)}, first after {went_on[0]} requests")
    assert n_back / n_runs <= LIMITS.alpha
    assert went_on


@pytest.mark.parametrize(
    ("kind", "errors", "misses", "slow", "within"),
    [
        ("errors 20 %", 0.20, 0.03, 1.0, 60),
        ("misses 40 %", 0.01, 0.40, 1.0, 60),
        ("twice as slow", 0.01, 0.03, 2.0, 60),
        ("errors 12 %", 0.12, 0.03, 1.0, 200),
    ],
)
def test_a_worse_canary_is_rolled_back_soon(
    kind: str, errors: float, misses: float, slow: float, within: int
) -> None:
    n_runs = 15
    found = outcomes(n_runs, lambda seed: Stream(seed, 0.1, errors=errors, misses=misses, slow=slow))
    delays = sorted(n for action, n in found if action is Action.BACK)
    wrong = sum(action is Action.NEXT for action, _ in found)
    print(f"{kind}: rolled back {len(delays)} of {n_runs}, median after {delays[len(delays) // 2]} requests")
    assert wrong / n_runs <= LIMITS.alpha
    assert delays[len(delays) // 2] <= within


def test_an_interval_holds_the_truth_at_all_times_at_once() -> None:
    n_broken = 0
    for seed in range(60):
        r, k = random.Random(seed), 0
        for n in range(1, 121):
            k += r.random() < 0.1
            low, high = interval(k, n, 0.1)
            if not low <= 0.1 <= high:
                n_broken += 1
                break
    print(f"broken at some time {n_broken} of 60, allowed 10 %")
    assert n_broken <= 0.1 * 60


@pytest.mark.parametrize(("k", "n"), [(0, 0), (0, 10), (10, 10), (3, 100), (50, 100), (1, 1)])
def test_an_interval_is_ordered_within_bounds_and_narrows(k: int, n: int) -> None:
    low, high = interval(k, n, 0.01)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= k / n <= high
        wider = interval(k, n, 0.0001)
        assert wider[0] <= low and high <= wider[1]


def test_nothing_is_decided_before_the_minimum_and_time_decides_at_the_end() -> None:
    few = Evidence(Arm(10), Arm(200), 10, 2)
    assert judge(few, LIMITS, n_steps=1, in_step_s=5).action is Action.WAIT
    late = judge(few, replace(LIMITS, step_max_s=60), n_steps=1, in_step_s=61)
    assert (late.action, "too few" in late.reason) == (Action.BACK, True)
    some = Evidence(Arm(60), Arm(1000), 60, 25)
    weak = judge(some, replace(LIMITS, step_max_s=60), n_steps=1, in_step_s=61)
    assert (weak.action, weak.is_weak) == (Action.NEXT, True)
    looks_worse = Evidence(Arm(60, 0, 6), Arm(1000, 0, 10), 60, 25)
    assert (
        judge(looks_worse, replace(LIMITS, step_max_s=60, alpha=1e-6), n_steps=1, in_step_s=61).action
        is Action.BACK
    )


def test_a_pause_holds_the_share_but_not_a_rollback() -> None:
    fine = Evidence(Arm(5000), Arm(5000), 5000, 1000)
    assert judge(fine, LIMITS, n_steps=1, in_step_s=1).action is Action.NEXT
    assert judge(fine, LIMITS, n_steps=1, in_step_s=1, paused=True).action is Action.WAIT
    bad = Evidence(Arm(100, 50), Arm(1000), 50, 10)
    assert judge(bad, LIMITS, n_steps=1, in_step_s=1, paused=True).action is Action.BACK


def test_processes_that_fail_decide_alone() -> None:
    assert judge(Evidence(n_deaths=1), LIMITS, n_steps=1, in_step_s=1).action is Action.WAIT
    assert judge(Evidence(n_deaths=2), LIMITS, n_steps=1, in_step_s=1).action is Action.BACK


def test_pairs_are_neighbours_and_each_stable_request_is_used_once() -> None:
    stable = [(1.0, 10.0), (2.0, 100.0)]
    assert pairs([(0.5, 50.0)], stable, 1.1) == (0, 0)
    assert pairs([(1.5, 50.0), (2.5, 50.0), (2.6, 50.0)], stable, 1.1) == (2, 1)


def test_a_share_is_a_bound_and_every_attempt_of_a_request_decides_alike() -> None:
    from controlplane.ids import new_id

    ids = [new_id().hex for _ in range(20_000)]
    taken = sum(takes(each, 50_000) for each in ids) / len(ids)
    assert 0.042 < taken < 0.058
    assert not any(takes(each, 0) for each in ids)
    assert all(takes(each, 1_000_000) for each in ids)
    assert threshold(1) == 0


@pytest.mark.parametrize(
    ("name", "value"), [("alpha", 0.5), ("tolerance", 0), ("min_requests", 0), ("slower_ratio", 0.9)]
)
def test_a_limit_out_of_range_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Limits(**{name: value})  # type: ignore[arg-type]
