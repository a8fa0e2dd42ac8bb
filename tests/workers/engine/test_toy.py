"""The toy engine: deterministic text, and the scheduling rules of a real continuous-batching engine."""

import asyncio
import os
import signal
import struct
import zlib
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

import pytest

from tests.workers.engine.reading import Answer, read
from workers.contract import FinishReason
from workers.engine import toy_text
from workers.engine.base import (
    Delta,
    EngineDead,
    EngineInputError,
    EngineProfile,
    EngineRequest,
    SamplingSpec,
)
from workers.engine.steps import gaps_of, quantile_ms
from workers.engine.toy import KV_BYTES_PER_TOKEN, SIGNAL_DIE, SIGNAL_HANG, ToyEngine


@asynccontextmanager
async def running(**knobs: object) -> AsyncIterator[ToyEngine]:
    engine = ToyEngine(EngineProfile.from_json({"engine": "toy", "toy_step_ms": 0.0, **knobs}))
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def a_request(
    engine: ToyEngine, text: str = "hello", prior: list[int] | None = None, **sampling
) -> EngineRequest:
    ids = engine.tokenize_chat([{"role": "user", "content": text}])
    return EngineRequest(
        text, ids, SamplingSpec(**{"max_tokens": 1000, **sampling}), prior_token_ids=prior or []
    )


async def test_the_same_prompt_gives_the_same_text_and_others_differ() -> None:
    async with running() as engine:
        answers = [await read(engine, a_request(engine, text)) for text in ("a", "a", "b", "c")]
    assert answers[0] == answers[1]
    assert len({a.text for a in answers}) == 3
    assert all(toy_text.decode(a.token_ids) == a.text for a in answers)


async def test_it_ends_by_itself_with_eos_unless_told_otherwise() -> None:
    async with running() as engine:
        natural = await read(engine, a_request(engine))
        forced = await read(engine, a_request(engine, ignore_eos=True, max_tokens=300))
        cut = await read(engine, a_request(engine, max_tokens=5))
    assert natural.finish is FinishReason.STOP
    assert 16 <= len(natural.token_ids) <= 200
    assert natural.token_ids[-1] == toy_text.EOS
    assert (len(forced.token_ids), forced.finish) == (300, FinishReason.LENGTH)
    assert (len(cut.token_ids), cut.finish) == (5, FinishReason.LENGTH)
    assert natural.text.startswith(cut.text)


async def test_a_resumed_request_continues_at_every_cut() -> None:
    async with running() as engine:
        whole = await read(engine, a_request(engine))
        stop = (whole.text.split()[-2] + " ",)
        for sampling in ({}, {"stop": stop}, {"seed": 7, "temperature": 1.0}):
            whole = await read(engine, a_request(engine, **sampling))
            for cut in range(1, len(whole.token_ids) + 1):
                request = a_request(engine, prior=whole.token_ids[:cut], **sampling)
                rest = await read(engine, request)
                assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
                assert whole.texts_after(cut) == rest.text
                assert rest.finish is whole.finish


async def test_max_tokens_counts_the_tokens_of_earlier_attempts() -> None:
    async with running() as engine:
        whole = await read(engine, a_request(engine, ignore_eos=True, max_tokens=20))
        rest = await read(
            engine, a_request(engine, ignore_eos=True, max_tokens=20, prior=whole.token_ids[:15])
        )
        none = await read(engine, a_request(engine, ignore_eos=True, max_tokens=20, prior=whole.token_ids))
    assert len(rest.token_ids) == 5
    assert (none.token_ids, none.finish) == ([], FinishReason.LENGTH)


async def test_a_stop_string_ends_the_text_before_it() -> None:
    async with running() as engine:
        whole = await read(engine, a_request(engine))
        words = whole.text.split()
        stop = f"{words[5]} {words[6]}"
        answer = await read(engine, a_request(engine, stop=(stop,)))
    assert answer.finish is FinishReason.STOP
    assert answer.text == whole.text.partition(stop)[0]
    assert len(answer.token_ids) == 7


async def test_the_batch_never_exceeds_its_slots_and_all_are_served() -> None:
    async with running(max_num_seqs=4) as engine:
        seen = []
        step = engine.step

        def watched() -> None:
            step()
            seen.append(engine.stats().n_running)

        engine.step = watched  # type: ignore[method-assign]
        answers = await asyncio.gather(*(read(engine, a_request(engine, f"r{i}")) for i in range(20)))
    assert max(seen) == 4
    assert len({a.text for a in answers}) == 20


@pytest.mark.parametrize("stop", [(), ("zz never zz",)])
async def test_steps_taken_at_once_make_what_single_steps_make(stop: tuple[str, ...]) -> None:
    """Unwatched sequences of different lengths, some beginning late, in too few blocks for all: counted per step."""

    async def answers(min_delta_tokens: int) -> tuple[list[str], int]:
        async with running(max_num_seqs=6, kv_cache_bytes=1 << 20) as engine:
            requests = [
                replace(
                    a_request(engine, f"r{i}", max_tokens=30 + 40 * i, ignore_eos=i % 2 == 0, stop=stop),
                    min_delta_tokens=min_delta_tokens,
                )
                for i in range(9)
            ]
            found = await asyncio.gather(*(read(engine, r) for r in requests))
            assert engine.stats().kv_used_ratio == 0.0
            return [f"{a.token_ids} {a.text} {a.finish}" for a in found], engine.stats().n_steps

    watched, n_watched = await answers(1)
    unwatched, n_unwatched = await answers(100)
    assert unwatched == watched
    assert abs(n_watched - n_unwatched) <= 32 * 9  # arrivals may wait for what is under way


async def test_sequences_share_steps() -> None:
    """Eight sequences of 50 tokens need some 50 steps, not 400."""
    async with running(max_num_seqs=8) as engine:
        requests = [a_request(engine, f"r{i}", ignore_eos=True, max_tokens=50) for i in range(8)]
        await asyncio.gather(*(read(engine, r) for r in requests))
        assert 50 <= engine.stats().n_steps <= 55


async def test_a_long_prompt_is_prefilled_in_chunks_while_others_decode() -> None:
    async with running(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=512) as engine:
        short = a_request(engine, ignore_eos=True, max_tokens=60)
        long = EngineRequest("long", list(range(20, 420)), SamplingSpec(max_tokens=1))
        first = asyncio.create_task(read(engine, short))
        await until_running(engine, 1)
        n_before = engine.stats().n_steps
        answer = await read(engine, long)
        n_steps = engine.stats().n_steps - n_before
        assert (await first).n_tokens == 60
    assert answer.n_tokens == 1
    # 15 tokens a step, because the decoding sequence takes one of the 16.
    assert 27 <= n_steps <= 30


async def test_a_short_prompt_finds_room_beside_a_long_one_where_one_may_not_fill_a_step() -> None:
    steps = {}
    for threshold in (0, 8):
        async with running(
            max_num_seqs=4, max_num_batched_tokens=16, max_model_len=512, toy_step_ms=2.0,
            long_prefill_token_threshold=threshold,
        ) as engine:  # fmt: skip
            long = asyncio.create_task(
                read(engine, EngineRequest("long", list(range(20, 420)), SamplingSpec(max_tokens=1)))
            )
            await until_running(engine, 1)
            n_before = engine.stats().n_steps
            await read(engine, EngineRequest("short", [21, 22, 23], SamplingSpec(max_tokens=1)))
            steps[threshold] = engine.stats().n_steps - n_before
            assert long.done() == (threshold == 0)
            await long
    assert steps[8] <= 3 < 20 < steps[0]


async def test_when_blocks_run_out_the_last_admitted_gives_way_and_nobody_loses_a_token() -> None:
    async with running(max_num_seqs=32, kv_cache_bytes=1 << 20) as roomy:
        requests = [a_request(roomy, f"r{i}", ignore_eos=True, max_tokens=100) for i in range(32)]
        expected = [await read(roomy, r) for r in requests]
    async with running(max_num_seqs=32, kv_cache_bytes=1 << 20, block_size=64) as engine:
        assert engine.n_blocks == (1 << 20) // KV_BYTES_PER_TOKEN // 64  # 16 blocks for 32 sequences of 2
        answers = await asyncio.gather(*(read(engine, r) for r in requests))
        assert engine.stats().n_preemptions > 0
        assert engine.stats().kv_used_ratio == 0
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


async def test_who_was_admitted_first_is_not_the_one_that_gives_way() -> None:
    async with running(kv_cache_bytes=1 << 20, block_size=512, max_model_len=4096) as engine:
        assert engine.kv_tokens == 1024
        assert engine.n_blocks == 2
        first = asyncio.create_task(read(engine, a_request(engine, "a", ignore_eos=True, max_tokens=800)))
        await until_running(engine, 1)
        second = asyncio.create_task(read(engine, a_request(engine, "b", ignore_eos=True, max_tokens=800)))
        await first
        assert engine.stats().n_steps < 810  # it ran through
        assert engine.stats().n_preemptions == 1
        await second


async def test_lower_priority_numbers_run_first() -> None:
    async with running(max_num_seqs=1) as engine:
        order: list[str] = []

        async def serve(name: str, priority: int) -> None:
            ids = engine.tokenize(name)
            request = EngineRequest(
                name, ids, SamplingSpec(max_tokens=20, ignore_eos=True), priority=priority
            )
            await read(engine, request)
            order.append(name)

        tasks = [asyncio.create_task(serve("first", 0))]
        await until_running(engine, 1)
        tasks += [asyncio.create_task(serve("low", 5)), asyncio.create_task(serve("high", 1))]
        await asyncio.gather(*tasks)
    assert order == ["first", "high", "low"]


@pytest.mark.parametrize("way", ["cancel", "aclose", "break"])
async def test_leaving_a_stream_frees_its_slot_and_blocks_at_once(way: str) -> None:
    async with running() as engine:
        request = a_request(engine, ignore_eos=True, max_tokens=100_000, text="x")
        started = asyncio.Event()

        async def consume() -> None:
            async with aclosing(engine.generate(request)) as deltas:
                async for _ in deltas:
                    started.set()
                    if way == "break":
                        break

        if way == "aclose":
            deltas = engine.generate(request)
            await anext(deltas)
            assert engine.stats().n_running == 1
            await deltas.aclose()
        else:
            task = asyncio.create_task(consume())
            await started.wait()
            if way == "cancel":
                assert engine.stats().n_running == 1
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        assert engine.stats().n_running == 0
        assert engine.stats().kv_used_ratio == 0


async def test_cancelling_a_waiting_request_forgets_it() -> None:
    async with running(max_num_seqs=1) as engine:
        first = asyncio.create_task(read(engine, a_request(engine, "a", ignore_eos=True, max_tokens=500)))
        await until_running(engine, 1)
        waiting = [asyncio.create_task(read(engine, a_request(engine, f"w{i}"))) for i in range(3)]
        while engine.stats().n_waiting < 3:
            await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.gather(waiting[1], return_exceptions=True)
        assert engine.stats().n_waiting == 2
        await asyncio.gather(first, waiting[0], waiting[2])


@pytest.mark.parametrize(
    ("messages", "code", "param"),
    [
        ([], "empty_messages", "messages"),
        ([{"role": "wizard", "content": "x"}], "invalid_role", "messages[0].role"),
        ([{"role": "user", "content": 3}], "invalid_content", "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            "unsupported_content",
            "messages[0].content[0]",
        ),
    ],
)
def test_messages_it_cannot_read_are_refused_by_name(messages, code: str, param: str) -> None:
    with pytest.raises(EngineInputError) as caught:
        ToyEngine(EngineProfile(engine="toy")).tokenize_chat(messages)
    assert (caught.value.code, caught.value.param) == (code, param)


async def test_prompts_that_leave_no_room_are_refused() -> None:
    async with running(max_model_len=32) as engine:
        fits = await read(engine, EngineRequest("f", [20] * 31, SamplingSpec(max_tokens=9, ignore_eos=True)))
        assert (fits.n_tokens, fits.finish) == (1, FinishReason.LENGTH)
        for ids, code in (([20] * 32, "context_length_exceeded"), ([], "empty_prompt")):
            with pytest.raises(EngineInputError) as caught:
                await read(engine, EngineRequest("x", ids, SamplingSpec(max_tokens=1)))
            assert caught.value.code == code


async def test_stopping_fails_what_runs_and_everything_after() -> None:
    async with running() as engine:
        request = a_request(engine, ignore_eos=True, max_tokens=100_000)
        task = asyncio.create_task(read(engine, request))
        await until_running(engine, 1)
        await engine.check_health()
        await engine.stop()
        with pytest.raises(EngineDead):
            await task
        with pytest.raises(EngineDead):
            await engine.check_health()
        with pytest.raises(EngineDead):
            await read(engine, request)


async def test_a_hung_engine_has_work_and_steps_no_more() -> None:
    async with running(toy_faults=True) as engine:
        task = asyncio.create_task(read(engine, a_request(engine, "please <hang> now")))
        while not engine._hung:
            await asyncio.sleep(0)
        before = engine.stats()
        for _ in range(100):
            await asyncio.sleep(0)
        after = engine.stats()
        assert after.n_running + after.n_waiting > 0
        assert after.n_steps - before.n_steps <= 1
        await engine.check_health()
        task.cancel()


async def test_signals_stand_for_a_core_that_dies_or_hangs() -> None:
    before = {signum: signal.getsignal(signum) for signum in (SIGNAL_DIE, SIGNAL_HANG)}
    try:
        async with running(toy_faults=True) as engine:
            task = asyncio.create_task(read(engine, a_request(engine, ignore_eos=True, max_tokens=100_000)))
            await until_running(engine, 1)
            os.kill(os.getpid(), SIGNAL_DIE)
            with pytest.raises(EngineDead):
                await task
            with pytest.raises(EngineDead):
                await engine.check_health()
        async with running(toy_faults=True) as engine:
            os.kill(os.getpid(), SIGNAL_HANG)
            assert engine._hung
            await engine.check_health()  # as a real core that hangs: only the watchdog can tell
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


async def test_signals_are_taken_only_where_faults_are_asked_for() -> None:
    before = signal.getsignal(SIGNAL_DIE)
    async with running():
        assert signal.getsignal(SIGNAL_DIE) is before


async def test_fault_words_are_ordinary_text_unless_asked_for() -> None:
    async with running() as engine:
        assert (await read(engine, a_request(engine, "<die> <hang>"))).finish is FinishReason.STOP


async def test_an_idle_engine_owes_no_step() -> None:
    """The watchdog's clock starts when work arrives, not at the last step before a long idleness."""
    now_s = 100.0
    engine = ToyEngine(EngineProfile(engine="toy", toy_step_ms=60_000.0), now_s=lambda: now_s)
    await engine.start()
    now_s = 900.0
    task = asyncio.create_task(read(engine, a_request(engine)))
    while not engine.stats().n_running:
        await asyncio.sleep(0)
    assert engine.stats().n_steps == 0
    assert engine.stats().last_step_at_s == 900.0
    await engine.stop()
    await asyncio.gather(task, return_exceptions=True)


async def test_logprobs_cover_every_token() -> None:
    async with running() as engine:
        answer: Answer = await read(engine, a_request(engine, logprobs=2, max_tokens=5))
    assert [lp.token_id for lp in answer.logprobs] == answer.token_ids
    assert all(len(lp.top) == 2 and lp.top[0][0] == lp.token_id for lp in answer.logprobs)


async def until_running(engine: ToyEngine, n: int) -> None:
    for _ in range(10_000):
        if engine.stats().n_running >= n:
            return
        await asyncio.sleep(0)
    raise AssertionError(f"never had {n} sequences running")


async def test_a_plain_answer_comes_in_few_deltas_and_with_the_same_tokens() -> None:
    """The hint saves wake-ups; first token and end are not held back by it."""

    async def deltas(min_delta_tokens: int) -> list[Delta]:
        sampling = SamplingSpec(max_tokens=50, ignore_eos=True)
        request = EngineRequest("r", [5, 6, 7], sampling, min_delta_tokens=min_delta_tokens)
        async with running() as engine:
            return [delta async for delta in engine.generate(request)]

    plain, streamed = await deltas(20), await deltas(1)
    assert [len(delta.token_ids) for delta in plain] == [1, 20, 20, 9]
    assert len(streamed) == 50
    assert [t for d in plain for t in d.token_ids] == [t for d in streamed for t in d.token_ids]
    assert "".join(d.text for d in plain) == "".join(d.text for d in streamed)


async def test_a_step_takes_longer_with_more_sequences_and_with_prompts() -> None:
    engine = ToyEngine(
        EngineProfile(engine="toy", toy_step_ms=5, toy_seq_ms=2, toy_prefill_ms=100, max_num_seqs=8)
    )
    assert engine._begin_s() == pytest.approx(0.005)
    engine.step()
    for n in range(3):
        engine._admit(a_request(engine, f"word {n} " * 20, ignore_eos=True))
    n_prompt = sum(entry[1].n_prompt for entry in engine._waiting)
    # The prompts, but for the token that each gives as any running sequence does.
    assert engine._begin_s() == pytest.approx(0.005 + 3 * 0.002 + (n_prompt - 3) * 0.1 / 1000)
    assert [seq.n_out for seq in engine._running] == [0, 0, 0]
    engine.step()
    assert [seq.n_out for seq in engine._running] == [1, 1, 1]
    assert engine._begin_s() == pytest.approx(0.005 + 3 * 0.002)


async def test_the_first_step_after_idleness_takes_its_time() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await real_sleep(0)

    real_sleep = asyncio.sleep
    async with running(toy_step_ms=50) as engine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "sleep", sleep)
            for _ in range(2):
                await read(engine, a_request(engine, max_tokens=1))
    assert slept == pytest.approx([0.05, 0.05], abs=0.02)


async def test_who_comes_while_a_step_is_under_way_waits_for_the_next() -> None:
    engine = ToyEngine(EngineProfile(engine="toy", toy_step_ms=5, max_num_seqs=2))
    first, second, third = (engine._admit(a_request(engine, f"word {n}", ignore_eos=True)) for n in range(3))
    engine._begin_s()
    fourth = engine._admit(a_request(engine, "word 3", ignore_eos=True))
    engine.step()
    assert [seq.n_out for seq in (first, second, third, fourth)] == [1, 1, 0, 0]
    # One had no slot; the one that came meanwhile was nobody's to seat.
    assert engine.take_steps().n_waiting == 1.0
    assert engine.stats().n_waiting == 2


async def test_with_a_pace_a_preempted_prompt_is_paid_for_again() -> None:
    engine = ToyEngine(
        EngineProfile(engine="toy", toy_step_ms=5, toy_prefill_ms=1000, kv_cache_bytes=1 << 20, block_size=16)
    )
    for n in range(2):
        engine._admit(a_request(engine, f"word {n} " * 200, ignore_eos=True, max_tokens=1000))
    longest_s = 0.0  # of the steps after a preemption
    for _ in range(3000):
        pace_s = engine._begin_s()
        longest_s = max(longest_s, pace_s if engine._n_preemptions else 0.0)
        engine.step()
        if not engine._running and not engine._waiting:
            break
    assert engine._n_preemptions
    assert longest_s > 0.005 + 200 * 1.0 / 1000


async def test_steps_are_told_with_what_ran_and_what_waited() -> None:
    now_s = [0.0]
    engine = ToyEngine(EngineProfile(engine="toy", max_num_seqs=2), now_s=lambda: now_s[0])
    for n in range(3):
        engine._admit(a_request(engine, f"word {n}", ignore_eos=True))
    for _ in range(11):
        now_s[0] += 0.02
        engine.step()
    steps = engine.take_steps()
    # The first step only admits; two run in the ten after it, and one waits all the time.
    assert (steps.n_steps, steps.n_tokens, steps.n_waiting) == (11, 20, 1.0)
    assert quantile_ms(gaps_of(steps.buckets), 0.5) == pytest.approx(20.0, rel=0.025)
    assert engine.take_steps().n_steps == 0


@pytest.mark.parametrize("stop", [(), ("zz",)], ids=["countable", "with a stop string"])
async def test_single_tokens_stay_single_however_slowly_they_are_read(stop: tuple[str, ...]) -> None:
    """An answer whose money may end after any token. A late reader is otherwise given several at once."""
    async with running(toy_step_ms=0) as engine:
        whole = await read(engine, a_request(engine, stop=stop))
        sizes, ids, text = [], [], ""
        request = replace(a_request(engine, stop=stop), single_tokens=True)
        async with aclosing(engine.generate(request)) as deltas:
            async for delta in deltas:
                sizes.append(len(delta.token_ids))
                ids += delta.token_ids
                text += delta.text
                for _ in range(5):
                    await asyncio.sleep(0)
    assert max(sizes) == 1
    assert (ids, text) == (whole.token_ids, whole.text)


def test_a_long_prompt_comes_with_the_seed_that_its_tokens_have() -> None:
    """So that attempts agree wherever it was tokenised, by this version or another."""
    ids = toy_text.tokenize_chat([{"role": "user", "content": "word " * 4000}])
    assert isinstance(ids, toy_text.LongPrompt)
    for seed in (None, 7):
        assert toy_text.seed_of(ids, seed) == toy_text.seed_of(list(ids), seed)
    assert toy_text.seed_of([9, 4000, 17], None) == zlib.crc32(struct.pack("<3I", 9, 4000, 17))
