"""A replica on the real engine that begins to load while its weights are still being fetched."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path

import pytest

from tests.workers.agents import agent_on, spec
from tests.workers.modelcache.ranges import RangeServer
from tests.workers.serving import Cell
from tests.workers.waiting import wait_until
from workers.contract import ReplicaPhase
from workers.engine.base import EngineProfile
from workers.modelcache import importers
from workers.modelcache.importers import import_directory
from workers.modelcache.pieces import PIECES_NAME, pieces_of
from workers.modelcache.store import ModelStore
from workers.modelcache.tiny import make_tiny_model

READY, FAILED = ReplicaPhase.READY, ReplicaPhase.FAILED


@pytest.mark.engine
def test_a_replica_loads_what_has_come_and_one_with_wrong_bytes_never_serves(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importers, "pieces_of", partial(pieces_of, piece_bytes=1 << 18))
    model = import_directory(
        make_tiny_model(tmp_path / "tiny"), ModelStore(tmp_path / "origin"), licence="Apache-2.0"
    )
    assert (model.path / PIECES_NAME).exists()
    files = {f"/{path.name}": path.read_bytes() for path in model.path.iterdir()}
    server, gate, held = RangeServer(files), threading.Event(), threading.Event()
    middle = len(files["/model.safetensors"]) // 2

    def mishap(path: str, start: int) -> str | None:
        if path != "/model.safetensors" or start < middle:
            return None
        held.set()
        gate.wait(90)
        return wrong

    server.mishap, wrong = mishap, "damage"
    profile = EngineProfile(engine="vllm", max_model_len=1024, kv_cache_bytes=64 << 20).to_json()
    told = {
        "profile": profile,
        "model_digest": model.digest,
        "model_source": "s3://models/tiny",
        "model_urls": {path[1:]: [f"{server.url}{path}"] for path in files},
    }
    with agent_on(cell, tmp_path, engine="vllm") as agent:
        wait_until(lambda: (beat := agent.heartbeat()) and beat.phase is READY, "the zygote", 90)
        agent.desire(spec("r1", **told))
        assert held.wait(30)
        log = agent.var / "log" / "r1.log"
        wait_until(log.exists, "its process, though half of the weights are missing", 30)
        gate.set()
        wait_until(lambda: (s := agent.status("r1")) and s.phase is FAILED, "its end", 60)
        status = agent.status("r1")
        assert status is not None and status.code == "bad_weights", status
        assert all(event.phase is not READY for event in agent.hear())
        assert not (agent.model_cache / model.digest / "manifest.json").exists()

        gate.clear()
        held.clear()
        wrong = None  # type: ignore[assignment]
        server.asked.clear()
        agent.desire(spec("r2", **told))
        assert held.wait(30)
        log = agent.var / "log" / "r2.log"
        wait_until(log.exists, "its process", 30)
        gate.set()
        status = agent.await_phase("r2", READY, deadline_s=60)
        print(f"stages: {status.stages_ms}")
        again = [start for path, start, _ in server.asked if path == "/model.safetensors"]
        assert min(again) >= middle - (1 << 18), "what was right had stayed"
        cell.enrol("r2")
        first = cell.admit(max_tokens=16)
        wait_until(lambda: cell.end(first), "the answer", 60)
        assert cell.end(first).n_completion >= 1
        wait_until((agent.model_cache / model.digest / "manifest.json").exists, "the version", 30)
    server.close()
