"""What an agent tells control of its model cache, under its machine's own Redis user."""

from __future__ import annotations

import asyncio
import http.client
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from tests.workers.agents import agent_on, spec
from tests.workers.modelcache.ranges import RangeServer
from tests.workers.modelcache.test_share import origin  # noqa: F401 - a fixture
from tests.workers.serving import Cell
from workers.agent.shelf import Shelf
from workers.config import AgentConfig
from workers.contract import ModelShelf, ReplicaPhase
from workers.modelcache.manifest import MANIFEST_NAME, Manifest
from workers.modelcache.share import Share, version_url
from workers.modelcache.store import ModelStore
from workers.modelcache.ticket import query
from workers.redis_client import Client


def test_the_agent_tells_control_what_it_holds_and_where(
    origin: tuple[ModelStore, Manifest],  # noqa: F811
    cell: Cell,
    tmp_path: Path,
) -> None:
    store, manifest = origin
    keys = cell.keys.machine("m1")
    url = cell.add_machine("m1")
    config = AgentConfig(
        machine="m1",
        enrol_url="http://x",
        var_dir=tmp_path,
        model_cache=store.root,
        model_share=("127.0.0.1", 0),
    )

    async def told() -> ModelShelf:
        client = Client(url, name="agent")
        await client.connect()
        running = asyncio.create_task(Shelf(config, client, keys).run())
        async with asyncio.timeout(10):
            while not (payload := cell.r.get(keys.models)):
                await asyncio.sleep(0.01)
        assert 0 < cell.r.pttl(keys.models) <= 15_000
        shelf = msgspec.json.decode(payload, type=ModelShelf)
        path = f"/models/{manifest.digest}/config.json?{query(shelf.key, manifest.digest, int(time.time() + 60))}"

        def ask() -> int:
            connection = http.client.HTTPConnection(urlsplit(shelf.url).netloc, timeout=10)
            connection.request("GET", path, headers={"Range": "bytes=0-1"})
            return connection.getresponse().status

        assert await asyncio.to_thread(ask) == 206
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await client.close()
        return shelf

    shelf = asyncio.run(told())
    assert shelf.digests == (manifest.digest,)


def test_a_replica_starts_with_what_a_sibling_has_and_the_ticket_is_kept_nowhere(
    origin: tuple[ModelStore, Manifest],  # noqa: F811
    cell: Cell,
    tmp_path: Path,
) -> None:
    store, manifest = origin
    bucket = RangeServer({f"/{MANIFEST_NAME}": manifest.to_bytes()})  # and nothing else
    share = Share(store, "127.0.0.1", 0)
    share.start()
    ticket = query(share.key, manifest.digest, int(time.time() + 60))
    names = (MANIFEST_NAME, *(entry.name for entry in manifest.files))
    with agent_on(cell, tmp_path) as agent:
        agent.desire(
            spec(
                model_digest=manifest.digest,
                model_source="s3://models/x",
                model_urls={name: [f"{bucket.url}/{name}"] for name in names},
                model_siblings=[version_url(share.url, manifest.digest, ticket)],
            )
        )
        agent.await_phase("r1", ReplicaPhase.READY)
        assert share.n_sent_bytes == manifest.size_bytes
        ModelStore(agent.model_cache).verify(manifest.digest)
        written = [p for p in agent.var.rglob("*") if p.is_file() and p.suffix in (".json", ".log")]
        assert not [p for p in written if b"ticket=" in p.read_bytes()]
    share.close()
    bucket.close()
