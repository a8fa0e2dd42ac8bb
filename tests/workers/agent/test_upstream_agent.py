"""An agent for endpoints elsewhere enrols with a key of its own; its replica calls with what was sealed to that key."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.workers.agents import agent_on, spec
from tests.workers.endpoints import Call, endpoint
from tests.workers.serving import Cell
from tests.workers.waiting import wait_until
from workers.contract import ReplicaPhase, UpstreamSecret
from workers.sealed import public_of, seal_for


@pytest.fixture
def cell(redis_url: str) -> Iterator[Cell]:
    made = Cell(redis_url)
    yield made
    made.close()


def test_a_front_of_its_own_calls_the_endpoint_with_the_sealed_key(cell: Cell, tmp_path: Path) -> None:
    async def well(call: Call) -> None:
        await call.words("badi", " hoga", n_prompt=5)

    started, stop = threading.Event(), threading.Event()
    found: list[object] = []

    async def serve() -> None:
        async with endpoint(well) as there:
            found.append(there)
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    there = found[0]
    try:
        with agent_on(cell, tmp_path, engine="upstream") as agent:
            credentials = agent.var / "credentials.json"
            wait_until(credentials.exists, "enrolment")
            key = json.loads(credentials.read_bytes())["box_key"]
            told = there.spec()  # type: ignore[attr-defined]
            told.sealed = seal_for(public_of(key), msgspec.json.encode(UpstreamSecret("sk-theirs")))
            agent.desire(spec(profile={}, upstream=told))
            agent.await_phase("r1", ReplicaPhase.READY)
            cell.enrol("r1")
            request = cell.admit()
            wait_until(lambda: cell.end(request) is not None, "the answer")
            assert cell.text(request) == "badi hoga"
            assert (cell.end(request).n_prompt, cell.end(request).n_completion) == (5, 2)
            [call] = there.calls  # type: ignore[attr-defined]
            assert call.headers["authorization"] == "Bearer sk-theirs"
            assert "sk-theirs" not in agent.logs()
    finally:
        stop.set()
        thread.join(10)
