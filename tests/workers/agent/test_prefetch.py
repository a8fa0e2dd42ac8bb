"""What an agent fetches before anybody needs it: when it is idle, into free room, once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from tests.workers.modelcache.ranges import RangeServer
from tests.workers.modelcache.test_eviction import _version
from tests.workers.modelcache.test_remote import _manifest
from tests.workers.serving import Cell
from tests.workers.waiting import until
from workers.agent import prefetch
from workers.agent.prefetch import Prefetch
from workers.config import AgentConfig
from workers.contract import PrefetchSpec
from workers.keys import MachineKeys
from workers.modelcache.manifest import MANIFEST_NAME
from workers.modelcache.store import ModelStore
from workers.redis_client import Client

FILES = {"model.safetensors": b"w" * 2000, "config.json": b"{}"}
DIGEST = _manifest(FILES).digest


@pytest.fixture
def server() -> Iterator[RangeServer]:
    made = RangeServer({f"/{name}": data for name, data in FILES.items()})
    made.files[f"/{MANIFEST_NAME}"] = _manifest(FILES).to_bytes()
    yield made
    made.close()


def _run(
    cell: Cell,
    config: AgentConfig,
    is_fetching: Callable[[], bool],
    then: Callable[[MachineKeys], Awaitable[None]],
) -> None:
    url, keys = cell.add_machine("m1"), cell.keys.machine("m1")

    async def live() -> None:
        client = Client(url, name="agent")
        await client.connect()
        task = asyncio.create_task(Prefetch(config, client, keys, is_fetching).run())
        try:
            await then(keys)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await client.close()

    asyncio.run(live())


def _ask(cell: Cell, server: RangeServer, keys: MachineKeys) -> None:
    urls = {name: [f"{server.url}/{name}"] for name in (*FILES, MANIFEST_NAME)}
    spec = PrefetchSpec(digest=DIGEST, source="s3://b", urls=urls)
    cell.r.hset(keys.prefetch, DIGEST, msgspec.json.encode(spec))


def _config(tmp_path: Path, budget: int | None = None) -> AgentConfig:
    return AgentConfig(
        machine="m1", enrol_url="http://x", var_dir=tmp_path, model_cache=tmp_path / "m", model_cache_bytes=budget
    )  # fmt: skip


def test_a_version_is_there_before_it_is_needed_but_replicas_come_first(
    cell: Cell, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "POLL_S", 0.02)
    config, busy, looked = _config(tmp_path), True, 0

    def is_fetching() -> bool:
        nonlocal looked
        looked += 1
        return busy

    async def then(keys: MachineKeys) -> None:
        nonlocal busy
        _ask(cell, server, keys)
        await until(lambda: looked > 3, "it looks")
        assert not server.asked
        busy = False
        await until(lambda: not cell.r.exists(keys.prefetch), "it is done with")
        ModelStore(config.model_cache).verify(DIGEST)
        n_asked = len(server.asked)
        _ask(cell, server, keys)  # again
        await until(lambda: not cell.r.exists(keys.prefetch), "it is there")
        assert len(server.asked) == n_asked

    _run(cell, config, is_fetching, then)


def test_nothing_leaves_for_a_prefetch_and_a_failure_is_not_repeated_at_once(
    cell: Cell, server: RangeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "POLL_S", 0.02)
    config = _config(tmp_path, budget=2500)
    store = ModelStore(config.model_cache)
    held = _version(store, 1, 1000)

    async def then(keys: MachineKeys) -> None:
        for n in range(2):
            _ask(cell, server, keys)
            await until(lambda: not cell.r.exists(keys.prefetch), "it is let go")
            assert [path for path, _, _ in server.asked] == [f"/{MANIFEST_NAME}"], n
        assert store.digests() == [held]

    _run(cell, config, lambda: False, then)
