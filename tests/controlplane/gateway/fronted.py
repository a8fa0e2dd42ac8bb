"""A gateway in front of a real replica front with the toy engine: every script and both clients, no processes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import redis.asyncio as aioredis

from tests.controlplane.gateway.harness import DEPLOYMENT, FakeDirectory, Running, running
from tests.workers.serving import Cell, Serving, now_ms, serving
from workers import scripts
from workers.config import ServeTuning
from workers.engine.base import EngineProfile


@asynccontextmanager
async def fronted(
    redis_url: str,
    var: Path,
    *,
    step_ms: float = 2.0,
    slots: int = 64,
    tuning: ServeTuning | None = None,
    directory: FakeDirectory | None = None,
) -> AsyncIterator[tuple[Running, Serving]]:
    """The gateway and the replica that takes its requests, both in this loop."""
    cell = Cell(redis_url)
    profile = EngineProfile(engine="toy", toy_step_ms=step_ms, max_model_len=2048, max_num_seqs=slots)
    try:
        async with (
            running(redis_url, directory) as gateway,
            serving(cell, var, profile=profile, tuning=tuning, enrol=False) as front,
        ):
            cell.run(scripts.ENROL, cell.keys.prefix, now_ms(), "r1", "m1", DEPLOYMENT, slots)
            consuming = asyncio.create_task(_consume(redis_url, front))
            try:
                yield gateway, front
            finally:
                consuming.cancel()
                await asyncio.gather(consuming, return_exceptions=True)
    finally:
        cell.close()


async def _consume(redis_url: str, front: Serving) -> None:
    """What Celery does: hand each message to the replica."""
    keys = front.config.keys
    async with aioredis.Redis.from_url(redis_url) as client:
        while True:
            found = await client.brpop([keys.prefix + keys.queue_name(front.config.replica)], timeout=1)
            if found:
                request, epoch = json.loads(json.loads(found[1])["body"])[0]
                front.deliver(request, epoch)
