"""Flushes to a real Redis: merging, pipelining, bounds, and what happens when it refuses or is away."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from benchmarks.delayproxy import DelayProxy
from infra.local.redis import EmbeddedRedis
from tests.workers.serving import GATEWAY, Cell, Serving, now_ms, serving
from tests.workers.waiting import until
from workers import scripts
from workers.config import ServeTuning
from workers.contract import End, FinishReason, FlushVerdict
from workers.engine.base import EngineProfile
from workers.output import Output


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


async def claimed(cell: Cell, front: Serving, n: int = 1, hold: int = 10_000) -> list[Output]:
    """Outputs of `n` claimed requests."""
    outputs = []
    for _ in range(n):
        request = cell.admit(max_tokens=hold)
        args = [front.config.keys.prefix, now_ms(), request, 1, "r1"]
        answer = await front.client.evalsha(scripts.CLAIM, (), args)
        assert answer[0] == b"ok"
        outputs.append(front.publisher.open(request, 1, GATEWAY, int(answer[3]), 0))
    return outputs


async def settled(*outputs: Output) -> None:
    await until(lambda: not any(output.n_unanswered or output.ids for output in outputs), "all flushes")


async def test_streams_of_one_step_share_one_frame(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        outputs = await claimed(cell, front, 40)  # more than 15: another msgpack header
        for output in outputs:
            output.add([7], "x")
        await settled(*outputs)
        cell.listen()
        assert (cell.n_frames, len(cell.frames), front.publisher.n_flushes) == (1, 40, 1)


async def test_tokens_that_gather_while_flushes_are_under_way_leave_as_one_entry(
    cell: Cell, tmp_path: Path
) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_depth=2)) as front:
        [output] = await claimed(cell, front)
        cell.r.execute_command("CLIENT", "PAUSE", 200)
        for token in range(10):
            output.add([token], f"{token} ")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await settled(output)
        entries = cell.stream(output.request_id)
        assert [entry.n for entry in entries] == [1, 1, 8]
        assert cell.text(output.request_id) == "0 1 2 3 4 5 6 7 8 9 "


async def test_an_end_does_not_wait_for_the_flush_before_it(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_spacing_s=30.0)) as front:
        first, streaming, ending = await claimed(cell, front, 3)
        cell.r.execute_command("CLIENT", "PAUSE", 200)
        first.add([1], "a")
        await asyncio.sleep(0)
        streaming.add([1], "b")
        await asyncio.sleep(0)
        assert (first.n_unanswered, streaming.n_unanswered) == (1, 0), "tokens wait for the flush under way"
        ending.add([1], "c")
        ended = ending.finish(End(FinishReason.STOP, 1, 0, 1), b"usage")
        await asyncio.sleep(0)
        assert (streaming.n_unanswered, ending.n_unanswered) == (1, 1), "and leave with an end at the latest"
        assert await ended
        await settled(first, streaming, ending)
        for output in (first, streaming, ending):
            front.publisher.close(output)
        assert first.lane.idle
        assert first.lane.n_ending == 0


async def test_far_redis_delays_every_token_alike(cell: Cell, tmp_path: Path) -> None:
    """A round trip of 80 ms, a token every 5 ms: each leaves by itself and waits for no answer to another."""
    address = urlsplit(cell.url)
    with DelayProxy(lambda: (str(address.hostname), int(address.port or 0)), 40) as proxy:
        async with serving(cell, tmp_path, redis_port=proxy.port) as front:
            [output] = await claimed(cell, front)
            largest = 0
            for token in range(60):
                output.add([token], f"{token} ")
                await asyncio.sleep(0.005)
                largest = max(largest, output.n_unanswered)
            await settled(output)
            sizes = [entry.n for entry in cell.stream(output.request_id)]
            assert sum(sizes) == 60
            # Three at a time would have made some 12 entries of 5 tokens each.
            assert len(sizes) > 30, sizes
            tuning = front.config.tuning
            assert tuning.flush_depth < largest <= tuning.flush_depth_far


async def test_text_without_tokens_waits_for_the_next_entry(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        [output] = await claimed(cell, front)
        output.add([], "held ")
        output.add([1], "back")
        await settled(output)
        output.add([], " tail")
        assert await output.finish(End(FinishReason.STOP, 1, 0, 1), b"usage")
        assert [(entry.n, entry.text) for entry in cell.stream(output.request_id)] == [
            (1, "held back"),
            (0, " tail"),
        ]


async def test_flush_is_bounded_in_entries(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_max_entries=4)) as front:
        outputs = await claimed(cell, front, 10)
        for output in outputs:
            output.add([1], "x")
        await settled(*outputs)
        assert front.publisher.n_flushes == 3


async def test_full_lane_holds_its_producers_back(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(max_pending_tokens=10, flush_depth=1)) as front:
        [output] = await claimed(cell, front)
        cell.r.execute_command("CLIENT", "PAUSE", 150)
        output.add([1] * 11, "x")
        assert output.lane.full
        waiting = asyncio.create_task(output.lane.room())
        await asyncio.sleep(0.02)
        assert not waiting.done()
        await waiting
        assert output.lane.n_pending == 0


async def test_held_back_generation_goes_on_and_loses_nothing(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(max_pending_tokens=20)) as front:
        request = cell.admit(max_tokens=300, sampling={"ignore_eos": True})
        cell.r.execute_command("CLIENT", "PAUSE", 150)
        await front.deliver(request)
        assert sum(entry.n for entry in cell.stream(request)) == 300


async def test_lanes_of_gone_gateways_are_forgotten(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path) as front:
        [output] = await claimed(cell, front)
        output.add([1], "x")
        await settled(output)
        front.publisher.close(output)
        assert front.publisher._lanes == {}


async def test_refused_flushes_are_given_up_after_a_bounded_number_of_tries(
    cell: Cell, tmp_path: Path
) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(max_refusals=3)) as front:
        [output] = await claimed(cell, front)
        verdicts: list[FlushVerdict] = []
        refused: list[str] = []
        front.publisher.on_refused = refused.append
        output.on_verdict = verdicts.append
        user = front.config.keys.redis_user
        cell.r.execute_command("ACL", "SETUSER", user, "-evalsha")
        output.add([1], "x")
        await until(lambda: output.closed_by, "the end of patience")
        assert (verdicts, refused) == ([FlushVerdict.STALE], ["NOPERM"])
        assert front.publisher.n_failed_flushes == 3
        assert output.lane.n_pending == 0
        cell.r.execute_command("ACL", "SETUSER", user, "+evalsha")


async def test_full_redis_is_waited_for(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(max_refusals=1)) as front:
        [output] = await claimed(cell, front)
        cell.r.config_set("maxmemory", 1)
        try:
            output.add([1], "x")
            await until(lambda: front.publisher.n_failed_flushes >= 3, "several tries")
        finally:
            cell.r.config_set("maxmemory", 0)
        await settled(output)
        assert cell.text(output.request_id) == "x"


async def test_stream_goes_on_across_a_restart_of_redis_with_its_log(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    try:
        cell = Cell(server.url())
        slow = EngineProfile(engine="toy", toy_step_ms=5, max_model_len=512)
        cell.add_machine("m1")
        async with serving(cell, tmp_path / "var", profile=slow) as front:
            cell.r.execute_command("ACL", "SAVE")
            request = cell.admit(max_tokens=300, sampling={"ignore_eos": True})
            task = front.deliver(request)
            await until(lambda: len(cell.journal(request)) > 5, "tokens")
            await asyncio.to_thread(server.stop)
            await asyncio.to_thread(server.start)
            await asyncio.to_thread(server.wait_ready)
            cell = Cell(server.url())
            await task
            ids = [token for entry in cell.journal(request) for token in entry.token_ids]
            assert len(ids) == 300 and cell.journal(request)[-1].end is not None
            assert len(cell.usage()) == 1
            assert front.publisher.n_failed_flushes > 0
    finally:
        server.destroy()


async def test_stream_of_an_emptied_redis_stops_without_a_word(cell: Cell, tmp_path: Path) -> None:
    slow = EngineProfile(engine="toy", toy_step_ms=5, max_model_len=512)
    async with serving(cell, tmp_path, profile=slow) as front:
        request = cell.admit(max_tokens=400, sampling={"ignore_eos": True})
        task = front.deliver(request)
        await until(lambda: cell.journal(request), "tokens")
        cell.r.flushall()
        await task
        assert front.engine.stats().n_running == 0
        assert len(front.spool) == 0 and cell.usage() == []
