"""The comparison of live and simulated latencies: it finds an engine it was not told, and sees one that differs."""

from __future__ import annotations

import asyncio
import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import replay, truth
from benchmarks.calibration import WARM_UP, Calibrated, calibrate
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
    seen = [Seen(one.at_s, "200", one.n_words, [], True) for one in coming]
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


QUICK = StepModel(0.003, 0.0, 20e-6, 0.0005, 0.0, 0.0)


def flushed(seen: list[Seen], flush_s: float) -> list[Seen]:
    """The same where a flush keeps the next one back so long: what is made meanwhile comes with it."""

    def pieces(made_s: list[float]) -> list[float]:
        found = [made_s[0]]
        for i, at_s in enumerate(made_s):
            if at_s >= found[-1] + flush_s or i == len(made_s) - 1:
                found += [at_s] * (i + 1 - len(found))
        return found

    return [replace(one, tokens_s=pieces(one.tokens_s)) for one in seen]


def test_steps_are_found_although_clients_read_several_tokens_at_once() -> None:
    """What a client reads is not what the engine steps: by reads this one would be three times as slow, and its answers
    a third as long."""
    case = CASES["vllm"]
    alone, ramp = truth._calibration_load(case)
    found = calibrate(flushed(served([*alone, *ramp], QUICK, 0.0), 0.008), len(alone))
    assert found.step.base_s == pytest.approx(QUICK.base_s, rel=0.1)
    assert found.step.seq_s + found.step.token_s == pytest.approx(QUICK.seq_s + QUICK.token_s, rel=0.2)
    assert found.flush_s == pytest.approx(0.008, rel=0.2)
    seen = flushed(served(truth._load(case, 15.0, 7, None), QUICK, 0.0), 0.008)
    told = truth.compare(seen, found, SLOTS)
    for name in ("ttft_p50", "itl_p50", "tpot_p50", "tpot_p99"):
        assert abs(told[name]["error"]) <= 0.1, (name, told[name])


def test_what_a_working_engine_adds_to_a_first_token_is_learned_from_those_that_met_one() -> None:
    alone, ramp = truth._calibration_load(CASES["toy"])

    def slowed(seen: list[Seen]) -> list[Seen]:
        met = [any(o is not s and o.sent_s < s.sent_s < o.tokens_s[-1] for o in seen) for s in seen]
        return [
            replace(one, tokens_s=[at_s + 0.1 * is_met for at_s in one.tokens_s])
            for one, is_met in zip(seen, met, strict=True)
        ]

    halves = [slowed(served([*alone, *ramp])) for _ in range(2)]
    whole, n_alone = truth.joined(halves[0], halves[1], len(alone))
    assert len(whole) == 2 * len(halves[0]) - WARM_UP
    found = calibrate(whole, n_alone)
    seen = slowed(served(truth._load(CASES["toy"], 2.0, 7, None)))
    blind, told = (
        truth.compare(seen, f, SLOTS) for f in (found, truth.with_work(found, whole[n_alone:], SLOTS))
    )
    assert blind["ttft_p50"]["error"] < -0.3
    assert abs(told["ttft_p50"]["error"]) < 0.1
    assert abs(told["ttft_p99"]["error"]) < 0.15


async def test_tokens_are_counted_by_event_ids_and_not_by_events() -> None:
    reader, seen = asyncio.StreamReader(), Seen(0.0)
    reader.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    answer = asyncio.create_task(replay._answer(reader, seen, 0.0))
    for data in (
        b'40\r\nid: req_1.1\ndata: {"choices":[{"delta":{"content":"a"}}]}\n\n\r\n',
        b'40\r\nid: req_1.4\ndata: {"choices":[{"delta":{"content":"bcd"}}]}\n\n\r\n',
        b'40\r\nid: req_1.6\ndata: {"choices":[{"delta":{"content":""}}]}\n\n\r\n'
        b'40\r\nid: req_1.7.1\ndata: {"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\n\r\n0\r\n\r\n',
    ):
        await asyncio.sleep(0.002)
        reader.feed_data(data)
    await asyncio.wait_for(answer, 5)
    assert (seen.n_prompt, seen.is_whole) == (5, True)
    assert [len(list(group)) for _, group in itertools.groupby(seen.tokens_s)] == [1, 3, 3]
