"""The toy engine's sleep gives memory back, as the kernel counts it, and wakes with the very same weights."""

import asyncio
from pathlib import Path

import pytest

from workers.engine.base import EngineDead, EngineProfile, EngineRequest, ProfileError, SamplingSpec, Sleeper
from workers.engine.toy import ToyEngine
from workers.engine.toy_memory import ToyMemory
from workers.engine.vllm_args import engine_args

MIB = 1 << 20
WEIGHTS, KV = 24 * MIB, 48 * MIB


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(("level", "kept"), [(1, WEIGHTS), (2, 0)])
def test_the_kernel_has_the_memory_back(level: int, kept: int) -> None:
    before = rss()
    memory = ToyMemory(WEIGHTS, KV)
    awake = rss() - before
    assert awake > 0.9 * (WEIGHTS + KV)
    memory.sleep(level)
    assert rss() - before < awake - 0.9 * (WEIGHTS + KV - kept)
    assert (memory.n_taken, memory.n_kept) == (0, kept)
    memory.sleep(level)  # twice is once
    assert memory.wake() and memory.wake()
    assert (memory.n_taken, memory.n_kept) == (WEIGHTS + KV, 0)
    assert rss() - before > 0.9 * (WEIGHTS + KV)


def test_other_weights_are_noticed() -> None:
    memory = ToyMemory(MIB, MIB)
    memory.sleep(1)
    assert memory._kept is not None
    memory._kept = b"x" + memory._kept[1:]
    assert not memory.wake()


async def test_an_engine_that_wakes_with_other_weights_is_dead() -> None:
    engine = ToyEngine(
        EngineProfile(engine="toy", sleep_level=1, toy_weights_bytes=MIB, kv_cache_bytes=MIB, toy_step_ms=0)
    )
    assert isinstance(engine, Sleeper)
    await engine.start()
    prompt = EngineRequest("r", [1, 2, 3], SamplingSpec(max_tokens=8))
    before = [delta.text async for delta in engine.generate(prompt)]
    await engine.sleep()
    with pytest.raises(EngineDead, match="asleep"):
        await anext(engine.generate(prompt))
    await engine.wake()
    async with asyncio.timeout(30):
        assert [delta.text async for delta in engine.generate(prompt)] == before
    await engine.sleep()
    assert engine._memory is not None and engine._memory._kept is not None
    engine._memory._kept = bytes(MIB)
    with pytest.raises(EngineDead, match="other weights"):
        await engine.wake()


def test_vllm_is_asked_for_sleep_mode_only_where_the_profile_wants_it() -> None:
    assert "enable_sleep_mode" not in engine_args(EngineProfile())
    assert engine_args(EngineProfile(sleep_level=1))["enable_sleep_mode"] is True


def test_a_sleep_that_would_lose_adapters_is_refused() -> None:
    with pytest.raises(ProfileError, match="choose 1"):
        EngineProfile(sleep_level=2, max_loras=1)
    assert EngineProfile(sleep_level=1, max_loras=1).sleep_level == 1
