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


async def test_tokens_soon_after_a_flush_gather_and_leave_as_one_entry(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_spacing_s=0.2)) as front:
        [output] = await claimed(cell, front)
        for token in range(10):
            output.add([token], f"{token} ")
            if token == 0:
                await settled(output)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await settled(output)
        entries = cell.stream(output.request_id)
        assert [entry.n for entry in entries] == [1, 9]
        assert cell.text(output.request_id) == "0 1 2 3 4 5 6 7 8 9 "


async def test_an_end_does_not_wait_for_the_flush_before_it(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_spacing_s=30.0)) as front:
        first, streaming, ending = await claimed(cell, front, 3)
        cell.r.execute_command("CLIENT", "PAUSE", 200)
        first.add([1], "a")
        await asyncio.sleep(0)
        streaming.add([1], "b")
        await asyncio.sleep(0)
        assert (first.n_unanswered, streaming.n_unanswered) == (1, 0), "tokens wait a moment after a flush"
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
            assert 1 < largest <= tuning.flush_depth_far


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
    async with serving(cell, tmp_path, tuning=ServeTuning(max_pending_tokens=10)) as front:
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


class Line:
    """What lies between a replica and Redis, and may be cut."""

    def __init__(self, cell: Cell) -> None:
        address = urlsplit(cell.url)
        self._upstream = (str(address.hostname), int(address.port or 0))
        self._cell = cell
        self.is_cut = False
        self.proxy = DelayProxy(lambda: ("127.0.0.1", 1) if self.is_cut else self._upstream, 0)

    def hold(self) -> None:
        """From now on nothing arrives."""
        self.proxy.delay_ms = 60_000

    def cut(self, front: Serving) -> None:
        """The connection breaks; what was held never arrives, and no other one is to be had until `mend`."""
        self.is_cut = True
        self.proxy.delay_ms = 0
        self._cell.r.client_kill_filter(user=front.config.keys.redis_user)

    def mend(self) -> None:
        self.is_cut = False


async def test_many_flushes_are_sent_again_in_order_however_often_that_fails(
    cell: Cell, tmp_path: Path
) -> None:
    line = Line(cell)
    with line.proxy as proxy:
        async with serving(cell, tmp_path, redis_port=proxy.port) as front:
            [output] = await claimed(cell, front)
            line.hold()
            for token in range(7):  # no multiple of what is sent again at a time
                output.add([token], f"{token} ")
                await until(lambda sent=token + 1: output.n_unanswered == sent, "a flush of its own")
            line.cut(front)
            await until(lambda: front.publisher.n_failed_flushes > 7, "tries in vain")
            output.add([7], "7 ")
            line.mend()
            await settled(output)
            assert output.closed_by is None, "refused as a gap"
            assert cell.text(output.request_id) == "0 1 2 3 4 5 6 7 "


async def test_nothing_overtakes_a_flush_that_waits_for_its_script(cell: Cell, tmp_path: Path) -> None:
    """A Redis that begins again knows no scripts, and machines may not load them: gateways do, a moment later."""
    line = Line(cell)
    with line.proxy as proxy:
        async with serving(cell, tmp_path, redis_port=proxy.port) as front:
            [output] = await claimed(cell, front)
            line.hold()
            for token in range(7):
                output.add([token], f"{token} ")
                await until(lambda sent=token + 1: output.n_unanswered == sent, "a flush of its own")
            line.cut(front)
            await until(lambda: front.publisher.n_failed_flushes >= 7, "all lost")
            cell.r.script_flush()
            cell.r.config_resetstat()
            line.mend()
            # What is sent again waits inside the client, 20 ms at a time.
            await until(
                lambda: cell.r.info("commandstats").get("cmdstat_evalsha"), "a script it does not know"
            )
            for script in (*scripts.TRUSTED_SCRIPTS, *scripts.MACHINE_SCRIPTS):
                cell.r.script_load(script.source)
            await settled(output)
            assert output.closed_by is None, "refused as a gap"
            assert cell.text(output.request_id) == "0 1 2 3 4 5 6 "


async def test_what_is_sent_again_does_not_wait_for_the_spacing(cell: Cell, tmp_path: Path) -> None:
    line = Line(cell)
    with line.proxy as proxy:
        tuning = ServeTuning(flush_spacing_s=3600.0)
        async with serving(cell, tmp_path, redis_port=proxy.port, tuning=tuning) as front:
            streaming, ending = await claimed(cell, front, 2)
            line.hold()
            streaming.add([1], "a")
            await until(lambda: streaming.n_unanswered, "a flush of tokens")
            ended = ending.finish(End(FinishReason.STOP, 1, 0, 0), b"usage")
            await until(lambda: ending.n_unanswered, "a flush with an end")
            line.cut(front)
            await until(lambda: front.publisher.n_failed_flushes >= 2, "both lost")
            line.mend()
            await settled(streaming, ending)
            assert await ended
            assert cell.text(streaming.request_id) == "a"


async def test_no_timer_shortens_the_wait_before_the_next_try(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tries 4 ms apart would be no patience at all with a Redis that refuses for a moment."""
    monkeypatch.setattr("workers.publisher._RETRY_S", 3600.0)
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_spacing_s=0.1)) as front:
        output, other = await claimed(cell, front, 2)
        user = front.config.keys.redis_user
        cell.r.execute_command("ACL", "SETUSER", user, "-evalsha")
        lane = output.lane
        output.add([1], "a")
        await asyncio.sleep(0)
        other.add([1], "b")
        await asyncio.sleep(0)
        assert (output.n_unanswered, lane._spacing) == (1, True), "which is due when the spacing has passed"
        await until(lambda: front.publisher.n_failed_flushes, "a refusal")
        await until(lambda: not lane._spacing, "the timer of the spacing")
        other.add([2], "c")
        other.finish(End(FinishReason.STOP, 1, 0, 2), b"usage")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (lane._n_in_flight, other.n_unanswered, front.publisher.n_failed_flushes) == (0, 0, 1)
        cell.r.execute_command("ACL", "SETUSER", user, "+evalsha")


async def test_what_waits_for_the_spacing_moves_with_its_output(cell: Cell, tmp_path: Path) -> None:
    async with serving(cell, tmp_path, tuning=ServeTuning(flush_spacing_s=0.5)) as front:
        moving, staying = await claimed(cell, front, 2)
        for output in (moving, staying):
            output.add([1], "a")
        await settled(moving, staying)
        old = moving.lane
        moving.add([2], "b")
        await asyncio.sleep(0)
        assert (old._spacing, moving.n_unanswered) == (True, 0)
        front.publisher.move(moving, "g2", moving.stream)
        front.publisher.close(staying)
        await settled(moving)
        front.publisher.close(moving)
        assert front.publisher._lanes == {}
        assert cell.text(moving.request_id) == "ab"
        again = front.publisher.open(staying.request_id, 1, GATEWAY, staying.stream, 1)
        assert again.lane is not old
        again.add([2], "b")
        await until(lambda: not old._spacing, "a timer of a lane that is forgotten")
        await settled(again)
        assert (old._n_in_flight, cell.text(staying.request_id)) == (0, "ab")
