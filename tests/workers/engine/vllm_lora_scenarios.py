"""LoRA on real vLLM, run inside a child of the zygote: what an engine with adapters answers, and one with merged
weights. Used by test_vllm_lora.py, which compares them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.workers.engine.reading import read
from workers.engine.base import AdapterRefused, EngineProfile, EngineRequest, SamplingSpec
from workers.engine.vllm import VllmEngine

PROFILE = EngineProfile(max_model_len=512, max_num_seqs=16, kv_cache_bytes=64 << 20, block_size=32)
TEXTS = ("What is a journal?", "One two three", "Where do the numbers come from, and who compares them?", "a")
N_TOKENS = 32


def merged(argument: dict[str, Any]) -> None:
    """Entry: greedy answers of a plain model."""

    async def work(engine: VllmEngine) -> dict[str, Any]:
        return {"answers": [await ids_of(engine, text) for text in TEXTS]}

    _run(argument, PROFILE, work)


def adapters(argument: dict[str, Any]) -> None:
    """Entry: base and both adapters, alone, all at once, resumed, with cached prefixes; and what loading does."""
    _run(argument, replace(PROFILE, max_loras=2, max_lora_rank=8), _adapters)


async def _adapters(engine: VllmEngine) -> dict[str, Any]:
    directory = Path(engine._llm.model_config.model).parent
    told: dict[str, Any] = {"base": [await ids_of(engine, text) for text in TEXTS]}
    began_s = time.monotonic()
    await engine.load_adapter("one", directory / "one")
    running = [asyncio.create_task(ids_of(engine, TEXTS[0], name)) for name in ("", "one")]
    await asyncio.sleep(0.02)  # wherever they are by now: what they answer must not depend on it
    await engine.load_adapter("two", directory / "two")
    told["loaded_beside"] = [await each for each in running]
    told["load_ms"] = (time.monotonic() - began_s) * 500
    try:
        await engine.load_adapter("three", directory / "one")
        told["third"] = ""
    except AdapterRefused as error:
        told["third"] = str(error)
    for name in ("one", "two"):
        told[name] = [await ids_of(engine, text, name) for text in TEXTS]
    names = ("", "one", "two")
    at_once = await asyncio.gather(*(ids_of(engine, text, name) for text in TEXTS for name in names))
    told["at_once"] = {name or "base": at_once[i::3] for i, name in enumerate(names)}

    # A prompt of several cache blocks, under one salt: what one adapter has cached is nothing to the other.
    long = "the price of an answer is known " * 12
    told["cached"] = [
        [name, (await read(engine, a_request(engine, long, name))).n_cached]
        for name in ("one", "one", "two", "", "two", "")
    ]
    whole = told["one"][0]
    rest = await read(engine, a_request(engine, TEXTS[0], "one", prior=whole[:10]))
    told["resumed"] = [*whole[:10], *rest.token_ids]

    await engine.unload_adapter("one")
    await engine.unload_adapter("one")
    broken = directory / "broken"
    try:
        await engine.load_adapter("broken", broken)
        told["broken"] = ""
    except AdapterRefused as error:
        told["broken"] = str(error)
    await engine.load_adapter("again", directory / "one")
    told["again"] = [await ids_of(engine, text, "again") for text in TEXTS]
    told["two_after"] = [await ids_of(engine, text, "two") for text in TEXTS]
    told["base_after"] = [await ids_of(engine, text) for text in TEXTS]
    return told


def a_request(
    engine: VllmEngine, text: str, adapter: str = "", prior: list[int] | None = None
) -> EngineRequest:
    ids = engine.tokenize_chat([{"role": "user", "content": text}])
    spec = SamplingSpec(max_tokens=N_TOKENS, temperature=0.0, ignore_eos=True)
    a_request.n = getattr(a_request, "n", 0) + 1  # type: ignore[attr-defined]
    number = a_request.n  # type: ignore[attr-defined]
    return EngineRequest(
        f"t{number}", ids, spec, prior_token_ids=prior or [], cache_salt="org", adapter=adapter
    )


async def ids_of(engine: VllmEngine, text: str, adapter: str = "") -> list[int]:
    return list((await read(engine, a_request(engine, text, adapter))).token_ids)


def _run(
    argument: dict[str, Any],
    profile: EngineProfile,
    work: Callable[[VllmEngine], Coroutine[Any, Any, dict[str, Any]]],
) -> None:
    engine = VllmEngine(profile, Path(argument["model_dir"]))
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    asyncio.run_coroutine_threadsafe(engine.start(), loop).result(120)
    told = asyncio.run_coroutine_threadsafe(asyncio.wait_for(work(engine), 120), loop).result(130)
    Path(argument["file"]).write_text(json.dumps(told))
