"""The model of a replica onto this machine's disk, and the moment from which an engine may begin to load it.

Called by replicas.py for every start. The claim that keeps the files is left with the replica; whoever ends it closes
the claim. Downloads run in threads: the agent's loop never waits for a disk or a store.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from workers.agent.known import Known, ms_since
from workers.modelcache.store import ModelStore, ModelStoreError


async def fetch(store: ModelStore, known: Known, opened: asyncio.Event) -> Path | None:
    """The model's directory; None for the toy engine, which has none unless it is told to serve a stored version:
    then it waits for its files as an engine would, and the drills' machines start as real ones do.

    `opened`: loading may begin. Raises ModelStoreError, OSError.
    """
    spec = known.spec
    is_toy = spec.profile.get("engine") == "toy" and not spec.model_urls
    if is_toy or spec.upstream is not None:
        return None
    started_s, loop = time.monotonic(), asyncio.get_running_loop()

    def on_open(_: Path) -> None:
        loop.call_soon_threadsafe(opened.set)

    try:
        path, known.claim = await asyncio.to_thread(
            store.acquire,
            spec.model_digest,
            spec.model_source,
            None,
            spec.model_urls,
            spec.model_siblings,
            None if spec.profile.get("engine") == "toy" else on_open,  # it has nothing to load
        )
    except ValueError as error:
        raise ModelStoreError("bad_digest", str(error)) from None
    if not known.pid:  # else it went on beside the load
        known.stages_ms["fetch"] = ms_since(started_s)
    return path


async def loadable(
    store: ModelStore, fetching: asyncio.Task[Path | None], opened: asyncio.Event, known: Known
) -> Path | None:
    """The model's directory once it is there, or its weights are coming and all else is there."""
    early = asyncio.create_task(opened.wait())
    await asyncio.wait({fetching, early}, return_when=asyncio.FIRST_COMPLETED)
    early.cancel()
    return store.path(known.spec.model_digest) if not fetching.done() else fetching.result()
