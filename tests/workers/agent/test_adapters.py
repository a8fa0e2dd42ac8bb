"""Adapters come to the disk before they are asked for, and leave it when they are retired."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.workers.adapter_files import write_adapter
from tests.workers.serving import Cell
from workers.agent.adapters import AdapterFiles
from workers.config import AgentConfig
from workers.contract import AdapterSpec
from workers.modelcache.adapter import import_adapter
from workers.modelcache.eviction import Held, Use
from workers.modelcache.store import ModelStore
from workers.redis_client import Client


@pytest.mark.parametrize("is_own", [True, False])
async def test_announced_ones_come_and_retired_ones_go(cell: Cell, tmp_path: Path, is_own: bool) -> None:
    origin = ModelStore(tmp_path / "origin")
    var = tmp_path / "machine"
    cache = (var if is_own else tmp_path) / "cache"
    config = AgentConfig(machine="m1", enrol_url="http://x", var_dir=var, model_cache=cache)
    keys = cell.keys.machine("m1")
    client = Client(cell.add_machine("m1"), name="agent", may_load_scripts=False)
    await client.connect()
    files, store = AdapterFiles(config, client, keys), ModelStore(cache)
    try:
        await files.tick()
        digests = {}
        for seed, name in enumerate(("a", "b")):
            made = import_adapter(write_adapter(tmp_path / name, seed=seed), origin, base=None, max_rank=16)
            spec = AdapterSpec(deployment="d1", digest=made.digest, source=origin.root.as_uri(), n_bytes=1)
            cell.r.hset(keys.adapters, name, msgspec.json.encode(spec))
            digests[name] = made.digest
        cell.r.hset(keys.adapters, "bad", msgspec.json.encode(_absent(origin)))
        await files.tick()
        assert set(store.digests()) == set(digests.values())
        claim = store.claim(digests["b"])
        cell.r.delete(keys.adapters)
        await files.tick()
        assert store.digests() == sorted([digests["b"]] if is_own else digests.values())
        assert files.n_removed == is_own  # in use stays; a cache that others share is left to its owner
        claim.close()
        await files.tick()
        assert store.digests() == ([] if is_own else sorted(digests.values())), "nobody uses it any more"
    finally:
        await client.close(drain_s=0.1)


async def test_what_somebody_else_evicts_meanwhile_does_not_end_the_agent(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    var, keys = tmp_path / "machine", cell.keys.machine("m1")
    config = AgentConfig(machine="m1", enrol_url="http://x", var_dir=var, model_cache=var / "c")
    client = Client(cell.add_machine("m1"), name="agent", may_load_scripts=False)
    await client.connect()
    gone = Held("0" * 64, 1, Use(), in_use=False)
    monkeypatch.setattr(ModelStore, "held", lambda _: [gone])
    try:
        cell.r.hset(keys.adapters, "a", "of a newer control")
        files = AdapterFiles(config, client, keys)
        await files.tick()
        assert files.n_removed == 0
    finally:
        await client.close(drain_s=0.1)


async def test_nothing_is_evicted_to_make_room(cell: Cell, tmp_path: Path) -> None:
    origin, var = ModelStore(tmp_path / "origin"), tmp_path / "machine"
    made = import_adapter(write_adapter(tmp_path / "a"), origin, base=None, max_rank=16)
    config = AgentConfig(
        machine="m1", enrol_url="http://x", var_dir=var, model_cache=var / "c", model_cache_bytes=100
    )
    client = Client(cell.add_machine("m1"), name="agent", may_load_scripts=False)
    await client.connect()
    try:
        spec: Any = AdapterSpec(deployment="d1", digest=made.digest, source=origin.root.as_uri(), n_bytes=101)
        cell.r.hset(cell.keys.machine("m1").adapters, "a", msgspec.json.encode(spec))
        files = AdapterFiles(config, client, cell.keys.machine("m1"))
        await files.tick()
        assert (ModelStore(var / "c").digests(), files.n_fetched) == ([], 0)
    finally:
        await client.close(drain_s=0.1)


def _absent(origin: ModelStore) -> AdapterSpec:
    return AdapterSpec(deployment="d1", digest="0" * 64, source=origin.root.as_uri())
