"""A machine that tells one story as far as it may, and what the tests of coming back look at."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from controlplane.gateway.directory import LimitsRow
from tests.controlplane.gateway.harness import (
    CHAT,
    KEYS,
    Events,
    Job,
    Machine,
    Running,
    text_of,
    until,
)
from workers import scripts
from workers.contract import FinishReason

WORDS = [f"w{i} " for i in range(8)]
STORY = "".join(WORDS)
STREAM = {**CHAT, "stream": True}
AS_STREAMED = httpx.Request("POST", "http://x", json=STREAM).content  # the bytes that `Running.stream` sends
BUDGET = LimitsRow(budget_nano=1_000_000)  # one nano-dollar a prompt token, two a completion token


class Teller:
    """Tells the same story on every attempt, as far as it may; a cancelled job ends as a replica's does."""

    def __init__(self, machine: Machine) -> None:
        self.may_tell = 0
        self.machine = machine
        machine.behaviour = self.tell

    async def tell(self, job: Job) -> None:
        while job.offset < len(WORDS):
            while job.offset >= self.may_tell and not job.cancelled.is_set():
                await asyncio.sleep(0.002)
            if job.cancelled.is_set() or await job.emit(WORDS[job.offset]) == "c":
                await job.finish(reason=FinishReason.ABORT)
                return
        await job.finish()

    @property
    def jobs(self) -> list[Job]:
        return self.machine.jobs


async def read(events: Events, n: int) -> str:
    """Text of the next `n` events that have any."""
    text = ""
    while n:
        piece = text_of([await events.next()])
        text += piece
        n -= bool(piece)
    return text


def key_of(gw: Running, key: str | None = None) -> str:
    from controlplane.tenants import api_keys

    lookup = api_keys.lookup_of(key or gw.key)
    assert lookup
    return gw.directory.records[lookup].key.id


async def state_of(gw: Running, request: str) -> bytes:
    return (await gw.record(request)).get(b"state", b"")


async def settle(gw: Running, request: str) -> None:
    await gw.redis.evalsha(scripts.SETTLE.sha, 0, KEYS.prefix, 1, request, 0, 0, 0, 60_000)


def is_done(gw: Running, request: str) -> Callable[[], Any]:
    async def done() -> bool:
        return await state_of(gw, request) == b"done"

    return done


async def charged(gw: Running) -> int:
    """What the key was charged, once nothing is held any more; its slot and its concurrency are free."""
    limits: dict[bytes, bytes] = {}

    async def is_settled() -> bool:
        nonlocal limits
        limits = await gw.limit("key", key_of(gw))
        return limits[b"held"] == b"0"

    await until(is_settled)
    assert int(limits[b"conc"]) == 0
    assert int(await gw.redis.hget(KEYS.replica("r1"), "used")) == 0
    return int(limits[b"spent"])
