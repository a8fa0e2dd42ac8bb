"""The comparison of live and simulated latencies: it finds an engine it was not told, and sees one that differs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import truth
from benchmarks.calibration import Calibrated, calibrate
from benchmarks.replay import Seen
from benchmarks.truth import CASES, Request
from controlplane.policy.perfmodel import StepModel

STEP = StepModel(0.020, 0.0, 20e-6, 0.001, 0.0, 0.0)
WAY_S = 0.006
SLOTS = CASES["toy"].slots


def served(load: list[Request], step: StepModel = STEP, noise_s: float = 0.0005) -> list[Seen]:
    """What clients of such an engine would see, step by step: slots bound late, prompts computed whole, noise."""
    dice = random.Random(5)
    coming = sorted(load, key=lambda one: one.at_s)
    seen = [Seen(one.at_s, "200", one.n_words, one.n_tokens, [], True) for one in coming]
    to_come = list(range(len(coming)))
    queue: list[int] = []
    on_way: list[tuple[float, int]] = []  # when it reaches the engine
    running: list[int] = []
    now_s = 0.0

    def arrive(n_busy: int) -> None:
        while to_come and coming[to_come[0]].at_s <= now_s:
            i = to_come.pop(0)
            if len(on_way) + n_busy < SLOTS and not queue:
                on_way.append((coming[i].at_s + WAY_S, i))
            else:
                queue.append(i)

    while to_come or on_way or running:
        if not running:
            now_s = max(now_s, min(at for at, _ in on_way) if on_way else coming[to_come[0]].at_s + WAY_S)
        arrive(len(running))
        fresh = [i for at, i in on_way if at <= now_s]
        on_way = [(at, i) for at, i in on_way if at > now_s]
        if not fresh and not running:
            continue
        now_s += step.step_s(sum(coming[i].n_words for i in fresh), 0.0, len(running), 0)
        running += fresh
        arrive(len(running))  # while the step ran
        for i in running:
            seen[i].tokens_s.append(now_s + dice.random() * noise_s)
        running = [i for i in running if len(seen[i].tokens_s) < coming[i].n_tokens]
        while queue and len(on_way) + len(running) < SLOTS:
            on_way.append((now_s + WAY_S, queue.pop(0)))
    return seen


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    alone, ramp = truth._calibration_load(CASES["toy"])
    return calibrate(served([*alone, *ramp]), len(alone))


def test_calibration_finds_the_engine_behind_the_clients(calibrated: Calibrated) -> None:
    step = calibrated.step
    assert step.base_s == pytest.approx(STEP.base_s, rel=0.03)
    assert step.seq_s + step.token_s == pytest.approx(STEP.seq_s + STEP.token_s, rel=0.1)
    assert step.token_s == pytest.approx(STEP.token_s, rel=0.05)
    assert calibrated.way_s == pytest.approx(WAY_S, abs=0.0015)


def test_a_load_it_never_saw_is_told_within_the_goals(calibrated: Calibrated) -> None:
    rate = CASES["toy"].utilisation * truth._most_per_s(CASES["toy"], calibrated)
    found = truth.compare(served(truth._load(CASES["toy"], rate, 7, None)), calibrated, SLOTS)
    for name, row in found.items():
        assert abs(row["error"]) <= truth.GOAL[name[-3:]] / 2, (name, row)


def test_an_engine_that_changed_since_is_seen(calibrated: Calibrated) -> None:
    rate = 0.8 * truth._most_per_s(CASES["toy"], calibrated)
    slower = served(truth._load(CASES["toy"], rate, 7, None), replace(STEP, base_s=0.030))
    found = truth.compare(slower, calibrated, SLOTS)
    assert found["itl_p50"]["error"] < -0.15
    goals = truth.summary_of([found], CASES["toy"])["goals"]
    assert [g["reached"] for g in goals if g["figure"] == "itl_p50"] == [False]


def test_a_gap_weighs_as_often_as_it_came_and_noise_widens_both_ways() -> None:
    values, noise = np.array([1.0, 2.0]), (-0.5, 0.5)
    for counts, median in (([1.0, 99.0], 1.5), ([99.0, 1.0], 0.5)):
        spread, weights = truth.with_noise(values, np.array(counts), noise)
        assert truth.weighted_quantile(spread, weights, 0.45) == median
        assert truth.weighted_quantile(spread, weights, 1.0) == 2.5
