"""Serving requests end to end: real scripts, a restricted Redis user, the toy engine."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

from tests.workers.serving import Cell, Serving, serving
from tests.workers.waiting import until
from workers import scripts
from workers.config import ServeTuning
from workers.contract import Endpoint, FinishReason
from workers.engine import toy_text
from workers.engine.base import EngineProfile
from workers.redis_client import ResponseError

SLOW = EngineProfile(engine="toy", toy_step_ms=5, max_model_len=512)


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


async def test_streamed_request_is_served_journaled_and_metered(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=12, sampling={"ignore_eos": True})
        await front.deliver(request)
        entries = cell.stream(request)
        assert 2 < len(entries) <= 12  # steps, merged only while a flush was under way
        assert entries[-1].n > 0  # the end leaves with the last token, not after it
        end = cell.end(request)
        assert (end.reason, end.n_completion, end.attempts) == (FinishReason.LENGTH, 12, 1)
        assert end.n_prompt == len(front.engine.tokenize_chat([{"role": "user", "content": "badi hoga"}]))
        ids = [token for entry in cell.journal(request) for token in entry.token_ids]
        assert len(ids) == 12
        assert cell.text(request) == "".join(e.text for e in cell.journal(request)) == toy_text.decode(ids)
        [usage] = cell.usage()
        assert (usage.request_id, usage.n_completion, usage.n_prompt) == (request, 12, end.n_prompt)
        assert (usage.status, usage.replica, usage.machine, usage.price_version) == (200, "r1", "m1", "pv1")
        assert usage.first_token_ms is not None
        [record] = front.spool.pending()
        assert record.confirmed
        assert msgspec.msgpack.decode(record.event)["request_id"] == request
        assert cell.lease(request)[b"state"] == b"done"


async def test_plain_answer_is_flushed_in_portions(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(max_tokens=100, stream=False, sampling={"ignore_eos": True})
        await front.deliver(request)
        entries = cell.stream(request)
        assert sum(entry.n for entry in entries) == 100
        assert 1 < len(entries) <= 4
        streamed = cell.admit(max_tokens=100, sampling={"ignore_eos": True})
        await front.deliver(streamed)
        assert cell.text(streamed) == cell.text(request)


async def test_completion_endpoint_takes_text_and_token_ids(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        ids = toy_text.tokenize("badi hoga badi")
        texts = []
        for prompt in ("badi hoga badi", ["badi hoga badi"], ids):
            payload = msgspec.json.encode({"prompt": prompt})
            request = cell.admit(endpoint=Endpoint.COMPLETIONS, payload=payload)
            await front.deliver(request)
            assert cell.end(request).n_prompt == 3
            texts.append(cell.text(request))
        assert texts[0] and len(set(texts)) == 1


async def test_what_may_have_no_token_ends_when_its_prompt_is_counted(cell: Cell, tmp_path: Path) -> None:
    """As gateways ask for the tokens of a prompt. Replicas of earlier versions do the same."""
    async with serving(cell, tmp_path) as front:
        request = cell.admit("badi hoga", max_tokens=0, n_carried_prompt=2**31 - 1)
        await front.deliver(request)
        end = cell.end(request)
        n_prompt = len(front.engine.tokenize_chat([{"role": "user", "content": "badi hoga"}]))
        assert (end.reason, end.n_prompt, end.n_completion) == (FinishReason.LENGTH, n_prompt, 0)
        [usage] = cell.usage()
        assert (usage.n_prompt, usage.n_completion, usage.status) == (0, 0, 200)
        assert front.engine.stats().n_steps == 0


@pytest.mark.parametrize("inline_bytes", [1_000_000, 0], ids=["on the loop", "in a thread"])
async def test_prompt_over_the_context_is_refused_and_free(
    cell: Cell, tmp_path: Path, inline_bytes: int
) -> None:
    tuning = ServeTuning(inline_prompt_bytes=inline_bytes)
    async with serving(cell, tmp_path, tuning=tuning) as front:
        request = cell.admit("badi " * 600)
        await front.deliver(request)
        [entry] = cell.stream(request)
        assert (entry.n, entry.text, entry.offset) == (0, "", 0)
        assert entry.end is not None and entry.end.error is not None
        error = entry.end.error
        assert (error.status, error.code, error.param) == (400, "context_length_exceeded", "messages")
        assert "512" in error.message and "shorten" in error.message
        [usage] = cell.usage()
        assert (usage.n_prompt, usage.n_completion, usage.status) == (0, 0, 400)
        text = cell.admit(
            endpoint=Endpoint.COMPLETIONS, payload=msgspec.json.encode({"prompt": "badi " * 600})
        )
        await front.deliver(text)
        assert cell.end(text).error.param == "prompt"


async def test_message_that_does_not_fit_the_template_is_a_400(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        payload = msgspec.json.encode({"messages": [{"role": "poet", "content": "x"}]})
        request = cell.admit(payload=payload)
        await front.deliver(request)
        assert cell.end(request).error.param == "messages[0].role"


async def test_end_at_the_hold_is_a_budget_end(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        # 10 nano left at 1 nano a token: admission cuts the hold to 10 of the 40 asked.
        cut = cell.admit(max_tokens=40, money=(10, 1), sampling={"ignore_eos": True})
        await front.deliver(cut)
        end = cell.end(cut)
        assert (end.reason, end.n_completion) == (FinishReason.BUDGET, 10)
        asked = cell.admit(max_tokens=10, sampling={"ignore_eos": True})
        await front.deliver(asked)
        assert cell.end(asked).reason is FinishReason.LENGTH
        bound = cell.admit(max_tokens=10, budget_bound=True, sampling={"ignore_eos": True})
        await front.deliver(bound)
        assert cell.end(bound).reason is FinishReason.BUDGET


async def test_open_ended_request_ends_at_the_context(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(max_tokens=2000, open_ended=True, sampling={"ignore_eos": True})
        await front.deliver(request)
        end = cell.end(request)
        assert (end.reason, end.n_prompt + end.n_completion) == (FinishReason.LENGTH, 512)


async def test_cancel_by_channel_ends_within_a_step_and_bills_what_was_made(
    cell: Cell, tmp_path: Path
) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        n_steps = front.engine.stats().n_steps
        assert cell.cancel(request) == b"bound"
        await task
        assert front.engine.stats().n_steps - n_steps <= 10  # far below the 400 asked; Redis is a hop away
        assert front.engine.stats().n_running == 0
        end = cell.end(request)
        assert end.reason is FinishReason.ABORT
        assert 0 < end.n_completion == sum(entry.n for entry in cell.stream(request)) < 400
        [usage] = cell.usage()
        assert (usage.n_completion, usage.status) == (end.n_completion, 499)
        assert task.cancelling() == 0  # a cancellation left behind would break the next timeout of that task


async def test_cancel_does_not_wait_for_the_next_token(cell: Cell, tmp_path: Path) -> None:
    frozen = EngineProfile(engine="toy", toy_step_ms=60_000, max_model_len=512)
    async with serving(cell, tmp_path, profile=frozen) as front:
        request = cell.admit()
        task = front.deliver(request)
        await until(lambda: front.engine.stats().n_running, "a step under way")
        cell.cancel(request)
        await task
        assert cell.end(request).reason is FinishReason.ABORT


async def test_cancel_told_only_by_the_flush_ends_it_too(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        cell.r.hset(cell.keys.machine("m1").lease(request), mapping={"cancel": 1, "open": ""})
        await task
        assert cell.end(request).reason is FinishReason.ABORT


async def test_request_cancelled_before_its_claim_costs_nothing(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit()
        cell.cancel(request)
        await front.deliver(request)
        end = cell.end(request)
        assert (end.reason, end.n_prompt, end.n_completion) == (FinishReason.ABORT, 0, 0)


async def test_request_cancelled_between_two_attempts_bills_the_first(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as first:
        request = cell.admit(max_tokens=150, sampling={"ignore_eos": True})
        first.deliver(request)
        await until(lambda: len(cell.journal(request)) >= 2, "something in the journal")
        cell.withdraw("r1")
    async with serving(cell, tmp_path, replica="r2", machine="m2") as second:
        n_made = sum(len(entry.token_ids) for entry in cell.journal(request, "m2"))
        cell.cancel(request)
        await second.deliver(request, 2)
        end = cell.end(request)
        assert (end.reason, end.n_completion) == (FinishReason.ABORT, n_made)
        assert end.n_prompt > 0


async def test_stale_epoch_stops_without_a_word(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        cell.withdraw("r1")  # control believes r1 dead; it is not
        await task
        assert front.engine.stats().n_running == 0
        assert cell.end(request) is None
        assert cell.usage() == [] and len(front.spool) == 0


async def test_duplicate_delivery_is_dropped(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=30, sampling={"ignore_eos": True})
        first = front.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        await front.deliver(request)  # while it runs
        assert not first.done()
        await first
        await front.deliver(request)  # after its end
        assert sum(entry.n for entry in cell.stream(request)) == 30
        assert len(cell.usage()) == 1


async def test_requests_delivered_together_are_claimed_in_one_call(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        cell.enrol("r1", slots=128)
        requests = [cell.admit(f"text {i}", max_tokens=12, sampling={"ignore_eos": True}) for i in range(70)]
        calls: list[int] = []
        evalsha = front.client.evalsha

        def watched(script: Any, keys: Any, args: Any) -> Any:
            if script is scripts.CLAIM:
                calls.append((len(args) - 3) // 2)
            return evalsha(script, keys, args)

        front.client.evalsha = watched  # type: ignore[method-assign]
        await asyncio.gather(*(front.deliver(r) for r in requests), front.deliver("f" * 32))
        assert calls == [64, 7]
        assert all(cell.end(r).n_completion == 12 for r in requests)


@pytest.mark.parametrize("n_passes", range(5))
async def test_a_job_cancelled_while_it_claims_leaves_no_claim(
    cell: Cell, tmp_path: Path, n_passes: int
) -> None:
    async with serving(cell, tmp_path) as front:
        request, other = (cell.admit(text, max_tokens=12, sampling={"ignore_eos": True}) for text in "ab")
        cancelled, served = front.deliver(request), front.deliver(other)
        for _ in range(n_passes):
            await asyncio.sleep(0)
        cancelled.cancel("stopping")
        await asyncio.gather(cancelled, return_exceptions=True)
        await served
        await until(lambda: cell.lease(request)[b"state"] != b"claimed", "the lease to be let go")
        await front.deliver(request)
        assert cell.end(request).n_completion == 12


async def test_usage_is_on_disk_before_redis_hears_of_the_end(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(max_tokens=12, stream=False, sampling={"ignore_eos": True})
        evalsha = front.client.evalsha
        on_disk: list[bool] = []

        def watched(script: Any, keys: Any, args: Any) -> Any:
            if script is scripts.FLUSH:
                on_disk.append(request.encode() in front.spool.path.read_bytes())
            return evalsha(script, keys, args)

        front.client.evalsha = watched  # type: ignore[method-assign]
        await front.deliver(request)
        assert on_disk == [True]


async def test_request_of_another_machine_is_out_of_reach(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        cell.add_machine("m2")
        cell.enrol("r2", "m2")
        foreign = cell.admit(candidates=("r2",))
        await front.deliver(foreign)  # the claim looks under its own prefix and finds nothing
        assert cell.lease(foreign, "m2")[b"state"] == b"bound"
        for command in (
            ("GET", cell.keys.machine("m2").body(foreign)),
            ("HGETALL", cell.keys.request(foreign)),
        ):
            with pytest.raises(ResponseError, match="NOPERM"):
                await front.client.call(*command)
        with pytest.raises(ResponseError, match=r"NOPERM|No Permission|can't access"):
            prefix = cell.keys.machine("m2").prefix
            await front.client.evalsha(scripts.CLAIM, (), [prefix, 0, foreign, 1, "r1"])


@pytest.mark.parametrize("stream", [True, False])
async def test_request_resumed_elsewhere_continues_the_same_text(
    cell: Cell, tmp_path: Path, stream: bool
) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as first:
        request = cell.admit(max_tokens=150, stream=stream, sampling={"ignore_eos": True})
        first.deliver(request)
        await until(lambda: len(cell.journal(request)) >= 2, "something in the journal")
        cell.withdraw("r1")
    async with serving(cell, tmp_path, replica="r2", machine="m2") as second:
        assert cell.epoch(request) == 2
        n_inherited = sum(len(entry.token_ids) for entry in cell.journal(request, "m2"))
        assert 0 < n_inherited < 150
        await second.deliver(request, 2)
        undisturbed = cell.admit(max_tokens=150, candidates=("r2",), sampling={"ignore_eos": True})
        await second.deliver(undisturbed)
        assert cell.text(request) == cell.text(undisturbed)
        end = cell.end(request)
        assert (end.n_completion, end.attempts) == (150, 2)
        usage = {event.request_id: event for event in cell.usage("m2")}[request]
        assert (usage.n_completion, usage.attempts) == (150, 2)


async def test_drained_request_is_handed_back_unharmed(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=400, stream=False, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: front.server.n_tokens_total, "the first token")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        made = sum(len(entry.token_ids) for entry in cell.journal(request))
        assert made > 0  # what the engine told is in the journal, although no portion was full
        assert cell.lease(request)[b"state"] == b"bound"
        assert cell.end(request) is None and cell.usage() == []
        cell.withdraw("r1")
        assert cell.r.hget(cell.keys.request(request), "crashes") is None


async def lose_next_answer(front: Serving) -> None:
    """Let Redis execute what is in flight, and cut the connection before its answer is read."""
    async with asyncio.timeout(15):
        while not front.client.n_in_flight:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # it is in the socket
    time.sleep(0.1)  # the loop reads nothing meanwhile
    assert front.client.n_in_flight
    front.client._conn.abort()  # type: ignore[union-attr]


async def test_lost_answer_to_a_claim_does_not_strand_the_request(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(max_tokens=12, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await lose_next_answer(front)
        assert cell.lease(request)[b"state"] == b"claimed"  # it was executed
        await task
        assert cell.end(request).n_completion == 12


async def test_lost_answer_to_the_end_keeps_the_usage(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(max_tokens=12, stream=False, sampling={"ignore_eos": True})
        task = front.deliver(request)
        while not len(front.spool):  # the end is begun, and leaves with this very pass of the loop
            await asyncio.sleep(0)
        await lose_next_answer(front)
        assert cell.lease(request)[b"state"] == b"done"
        await task
        [record] = front.spool.pending()
        assert record.confirmed
        assert len(cell.usage()) == 1


async def test_end_that_is_refused_leaves_no_usage(cell: Cell, tmp_path: Path) -> None:
    slower = EngineProfile(engine="toy", toy_step_ms=40, max_model_len=512)
    async with serving(cell, tmp_path, profile=slower) as front:
        request = cell.admit(max_tokens=30, stream=False, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: front.server.n_tokens_total >= 1, "its first token")
        cell.r.hset(
            cell.keys.machine("m1").lease(request), mapping={"epoch": 2, "open": ""}
        )  # served elsewhere by now
        await task
        assert cell.end(request) is None and cell.usage() == []
        assert len(front.spool) == 0


async def test_prompt_refused_by_the_engine_is_free(cell: Cell, tmp_path: Path) -> None:
    # 1 MiB of cache holds 1,024 tokens: less than the context, which only the engine knows.
    small = EngineProfile(engine="toy", toy_step_ms=0, max_model_len=4096, kv_cache_bytes=1 << 20)
    async with serving(cell, tmp_path, profile=small) as front:
        request = cell.admit("badi " * 1500)
        await front.deliver(request)
        assert cell.end(request).error.code == "context_length_exceeded"
        assert (cell.end(request).n_prompt, cell.usage()[0].n_prompt) == (0, 0)


async def test_redis_connection_lost_midway_costs_no_token(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        requests = [cell.admit(f"badi {i}", max_tokens=60, sampling={"ignore_eos": True}) for i in range(4)]
        tasks = [front.deliver(request) for request in requests]
        for _ in range(4):
            n = front.server.n_tokens_total
            await until(lambda n=n: front.server.n_tokens_total > n + 20, "tokens")
            if front.client._conn is not None:
                front.client._conn.abort()
        await asyncio.gather(*tasks)
        assert front.publisher.n_failed_flushes > 0
        for request in requests:
            ids = [token for entry in cell.journal(request) for token in entry.token_ids]
            assert len(ids) == 60
            assert cell.journal(request)[-1].end is not None
        assert len(cell.usage()) == 4
        assert all(record.confirmed for record in front.spool.pending())


async def test_gap_in_the_journal_is_healed_by_claiming_again(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=60, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: len(cell.journal(request)) >= 5, "tokens")
        # As if Redis came back from a log that lacks the last step.
        keys = cell.keys.machine("m1")
        with cell.r.pipeline() as pipe:
            pipe.rpop(keys.journal(request))
            pipe.hincrby(keys.lease(request), "n", -1)
            pipe.execute()
        await task
        undisturbed = cell.admit(max_tokens=60, sampling={"ignore_eos": True})
        await front.deliver(undisturbed)
        ids = [token for entry in cell.journal(request) for token in entry.token_ids]
        assert ids == [token for entry in cell.journal(undisturbed) for token in entry.token_ids]


async def test_engine_death_leaves_the_request_to_be_resumed(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, profile=SLOW) as front:
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: cell.stream(request), "the first token")
        front.engine._die("test")
        await task
        assert len(front.deaths) == 1
        assert cell.end(request) is None and cell.usage() == []
        assert cell.lease(request)[b"state"] == b"claimed"  # a death: it counts against the request


async def test_fault_of_the_worker_ends_the_request_with_an_error(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(cell, tmp_path) as front:

        def broken(_request: object) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(front.engine, "generate", broken)
        request = cell.admit()
        await front.deliver(request)
        assert cell.end(request).error.code == "internal_error"
        assert front.server.n_running == 0


async def test_project_that_keeps_nothing_leaves_no_journal(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        request = cell.admit(zero_retention=True)
        await front.deliver(request)
        await front.client.call("PING")
        keys = cell.keys.machine("m1")
        assert 0 < cell.r.pttl(keys.journal(request)) <= 30_000
        assert not cell.r.exists(keys.body(request))


async def test_full_spool_takes_nothing_new(cell: Cell, tmp_path: Path) -> None:
    tuning = ServeTuning(spool_max_bytes=1, beat_s=0.01)
    async with serving(cell, tmp_path, tuning=tuning) as front:
        first, second = cell.admit(), cell.admit()
        await front.deliver(first)
        assert front.spool.full
        task = front.deliver(second)
        await asyncio.sleep(0.05)
        assert cell.lease(second)[b"state"] == b"bound"
        cell.r.rpush(cell.keys.machine("m1").ack("r1"), first)
        await front.accounting.tick()
        await task
        assert cell.end(second) is not None


async def test_machine_user_may_not_touch_trusted_keys(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path):
        url = cell.add_machine("m1")
        with redis.Redis.from_url(url) as machine, pytest.raises(redis.exceptions.NoPermissionError):
            machine.get(cell.keys.body("x"))
