"""Frames by offset: gaps are filled from the journal, repetitions dropped, other machines ignored, slow
clients held."""

import asyncio
import json
import socket
from typing import Any

import pytest

from controlplane.gateway.stream import Stream
from tests.controlplane.gateway.harness import (
    CHAT,
    KEYS,
    PEPPER,
    FakeDirectory,
    Job,
    Machine,
    Running,
    running,
    text_of,
    until,
)
from workers import scripts
from workers.contract import End, FinishReason, FrameEntry, encode

assert PEPPER


def counting(n: int) -> str:
    return "".join(f"{i} " for i in range(n))


@pytest.mark.parametrize("lost", [{0}, {1}, {3, 4, 5}, {8}, {0, 2, 4, 6, 8}, set(range(9))], ids=str)
@pytest.mark.parametrize("streaming", [False, True])
async def test_gap_before_a_frame_is_read_from_the_journal_at_once(
    redis_url: str, lost: set[int], streaming: bool
) -> None:
    """The stall check is far off: the next frame alone shows that something is missing."""

    async def lose(job: Job) -> None:
        for i in range(9):
            await job.emit(f"{i} ", lost=i in lost)
        await job.finish()

    async with running(redis_url, stall_s=60) as gw:
        machine = Machine(redis_url)
        machine.behaviour = lose
        await machine.start()
        if streaming:
            async with gw.stream(CHAT) as events:
                assert text_of(await events.rest()) == counting(9)
        else:
            body = (await gw.post(CHAT)).json()
            assert body["choices"][0]["message"]["content"] == counting(9)
            assert body["usage"]["completion_tokens"] == 9
        await machine.stop()


async def test_repeated_frames_change_nothing(gw: Running, machine: Machine) -> None:
    async def repeat(job: Job) -> None:
        for i in range(3):
            offset = job.offset
            await job.emit(f"{i} ")
            for _ in range(2):
                frame = b"\x91" + encode(FrameEntry(job.stream, 0, offset, 1, f"{i} "))
                await machine.redis.publish(machine.keys.gateway_channel(job.gateway), frame)
        await job.finish()

    machine.behaviour = repeat
    async with gw.stream(CHAT) as events:
        assert text_of(await events.rest()) == counting(3)
    assert gw.gateway.inbox.n_repeated >= 2


async def test_another_machine_cannot_speak_for_a_request(gw: Running, machine: Machine) -> None:
    go = asyncio.Event()

    async def wait(job: Job) -> None:
        await job.emit("mine ")
        await go.wait()
        await job.emit("mine")
        await job.finish()

    machine.behaviour = wait
    foreign = KEYS.machine("m2").gateway_channel(gw.gateway.id)
    async with gw.stream(CHAT) as events:
        await events.next()
        await events.next()
        number = machine.jobs[0].stream
        end = End(FinishReason.STOP, 1, 0, 2)
        inbox = gw.gateway.inbox
        await until(lambda: not inbox.streams[number].catching_up)
        n_before = inbox.n_catch_ups

        async def asked_where_it_runs() -> bool:
            for last in (None, end):
                frame = b"\x91" + encode(FrameEntry(number, 0, 1, 1, "forged", last))
                await gw.redis.publish(foreign, frame)
            return inbox.n_catch_ups >= n_before + 3

        await until(asked_where_it_runs)
        assert inbox.n_foreign
        go.set()
        assert text_of(await events.rest()) == "mine"


@pytest.mark.parametrize("is_disturbed", [False, True])
async def test_frames_that_overtake_their_admissions_answer_need_no_journal(
    gw: Running, machine: Machine, monkeypatch: pytest.MonkeyPatch, is_disturbed: bool
) -> None:
    """Unless another machine spoke meanwhile: then the record says where the request runs."""
    dispatcher, inbox = gw.gateway.dispatcher, gw.gateway.inbox
    real = dispatcher._try_admit

    async def late(stream: Stream, *rest: Any) -> list[Any]:
        if is_disturbed:
            frame = b"\x91" + encode(FrameEntry(stream.number, 0, 0, 1, "lie "))
            inbox.on_frame(KEYS.machine("other").gateway_channel(gw.gateway.id).encode(), frame)
        verdict = await real(stream, *rest)
        await until(lambda: any(entry.end is not None for entry in stream.held_back))
        return verdict

    async def count(job: Job) -> None:
        for i in range(3):
            await job.emit(f"{i} ")
        await job.finish()

    monkeypatch.setattr(dispatcher, "_try_admit", late)
    machine.behaviour = count
    body = (await gw.post(CHAT)).json()
    assert body["choices"][0]["message"]["content"] == counting(3)
    assert inbox.n_catch_ups == is_disturbed


async def test_frames_that_are_no_frames_are_counted_and_ignored(gw: Running, machine: Machine) -> None:
    channel = machine.keys.gateway_channel(gw.gateway.id)
    for junk in (
        b"",
        b"junk",
        b"\x91\x91\x01",
        b"\xdd\xff\xff\xff\xff",
        encode(End(FinishReason.STOP, 1, 0, 1)),
    ):
        await gw.redis.publish(channel, junk)
    await until(lambda: gw.gateway.inbox.n_bad_frames == 5)
    assert (await gw.post(CHAT)).status_code == 200


async def test_queued_request_is_followed_to_whichever_machine_gets_it(gw: Running, redis_url: str) -> None:
    """The admission says nothing of the machine: the first frame makes the gateway ask."""
    sending = asyncio.ensure_future(gw.post(CHAT))
    await until(lambda: gw.redis.exists(KEYS.queue("d" * 32)))
    late = Machine(redis_url, "m7", "r7")
    await late.start()
    assert (await sending).json()["choices"][0]["message"]["content"] == "one two three"
    await late.stop()


async def test_resumed_request_goes_on_where_it_stopped(
    gw: Running, machine: Machine, redis_url: str
) -> None:
    """A replica dies in the middle; another machine goes on from the journal and the client sees one text."""
    other = Machine(redis_url, "m2", "r2")

    async def die(job: Job) -> None:
        await job.emit("one ")
        await job.emit("two ", lost=True)

    async def resume(job: Job) -> None:
        assert job.offset == 2
        assert len(job.journal) == 2
        await job.emit("three")
        await job.finish()

    machine.behaviour, other.behaviour = die, resume
    async with gw.stream(CHAT) as events:
        await events.next()
        await events.next()
        job = machine.jobs[0]
        await until(lambda: job.offset == 2)
        assert (await machine.withdraw())[0] == 1
        await other.start()
        chunks = await events.rest()
    assert text_of(chunks) == "two three"
    assert chunks[-2]["corral"] == {"attempts": 2}
    assert await job.emit("late") == "s", "the old holder is fenced out"
    await other.stop()


async def test_client_that_reads_slowly_gets_everything_without_unbounded_memory(redis_url: str) -> None:
    """Beyond its buffer a stream is paused; what it missed comes from the journal."""
    n = 300
    async with running(redis_url, stream_buffer=8) as gw:
        machine = Machine(redis_url)
        await machine.start()

        async def rush(job: Job) -> None:
            for i in range(n):
                await job.emit(f"{i} " + "x" * 50_000)
            await job.finish()

        machine.behaviour = rush
        largest = 0
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        sock.connect(("127.0.0.1", int(gw.url.rsplit(":", 1)[1])))
        reader, writer = await asyncio.open_connection(sock=sock, limit=1 << 26)
        body = json.dumps({**CHAT, "stream": True}).encode()
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
            b"authorization: Bearer " + gw.key.encode() + b"\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        transport = writer.transport
        transport.pause_reading()

        def watch() -> bool:
            nonlocal largest
            streams = gw.gateway.inbox.streams.values()
            largest = max([largest, *(len(s.pieces) for s in streams)])
            return bool(machine.jobs) and machine.jobs[0].offset == n

        await until(watch, 30)
        transport.resume_reading()
        raw = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        assert largest <= 8
        assert gw.gateway.inbox.n_catch_ups >= 2
        got = [
            json.loads(line[6:])["choices"][0]["delta"].get("content", "").split(" ")[0]
            for line in raw.decode().splitlines()
            if line.startswith("data: {")
        ]
        assert got == ["", *map(str, range(n)), ""]
        await machine.stop()


async def test_stalled_stream_finds_what_pubsub_never_told(gw: Running, machine: Machine) -> None:
    """Not one frame arrives; the periodic look at the journal delivers."""

    async def mute(job: Job) -> None:
        await job.emit("silent", lost=True)
        await job.finish(lost=True)

    machine.behaviour = mute
    async with gw.stream(CHAT) as events:
        assert text_of(await events.rest()) == "silent"
    assert gw.gateway.watch.n_stalls >= 1


async def test_end_settled_by_somebody_else_is_still_found(gw: Running, machine: Machine) -> None:
    """Intake was faster than every frame: the record no longer names a replica, the journal is still
    found."""

    async def settled_elsewhere(job: Job) -> None:
        await job.emit("kept", lost=True)
        await job.finish(lost=True)
        await machine.redis.evalsha(scripts.SETTLE.sha, 0, KEYS.prefix, 1, job.id, 1, 1, 1, 60_000, 0)

    machine.behaviour = settled_elsewhere
    assert (await gw.post(CHAT)).json()["choices"][0]["message"]["content"] == "kept"


async def test_record_that_is_gone_is_a_retryable_error(gw: Running, machine: Machine) -> None:
    async def lose_everything(job: Job) -> None:
        await machine.redis.delete(KEYS.request(job.id), machine.keys.lease(job.id))

    machine.behaviour = lose_everything
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "request_lost")
    assert "retry-after" in response.headers


async def test_unreadable_journal_ends_the_request(gw: Running, machine: Machine) -> None:
    async def spoil(job: Job) -> None:
        await machine.redis.rpush(machine.keys.journal(job.id), b"junk")
        await job.emit("x", lost=True)

    machine.behaviour = spoil
    response = await gw.post(CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "journal_unreadable")


def test_fake_directory_is_one() -> None:
    from controlplane.gateway.directory import KeyDirectory

    directory: KeyDirectory = FakeDirectory()
    assert directory
