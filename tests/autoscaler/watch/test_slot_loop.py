"""Slots protect latency: the closed loop of queue, watcher and engine, against settings that do not move."""

import pytest

from tests.autoscaler.watch.slot_loop import Loop, Seen
from workers.engine.base import EngineProfile

TARGET_MS = 100
# 10 ms and 3 more per sequence: thirty keep to 100 ms.
SLOW = EngineProfile(engine="toy", max_num_seqs=64, toy_step_ms=10, toy_seq_ms=3)
# The cache holds twenty contexts of some 64 tokens at most.
SMALL = EngineProfile(
    engine="toy", max_num_seqs=64, toy_step_ms=10, toy_seq_ms=0.1, kv_cache_bytes=1280 << 10
)


async def measured(
    redis_url: str, profile: EngineProfile, slots: int, itl_ms: int, seconds: float = 60.0, **load: int
) -> tuple[Seen, Loop]:
    """A minute of full load; figures of its second half."""
    loop = Loop(redis_url, profile, itl_ms, slots, **{"n_clients": 72, **load})
    try:
        await loop.run(seconds)
        return loop.seen(seconds / 2), loop
    finally:
        await loop.close()
        loop.cell.r.flushall()


@pytest.mark.parametrize("begin", [64, 2])
async def test_gaps_stay_within_the_promise_at_nearly_the_best_throughput(redis_url: str, begin: int) -> None:
    adaptive, loop = await measured(redis_url, SLOW, begin, TARGET_MS)
    best, _ = await measured(redis_url, SLOW, 29, 0, seconds=20)
    too_high, _ = await measured(redis_url, SLOW, 64, 0, seconds=20)
    assert too_high.itl_p95_ms > 1.9 * TARGET_MS
    assert best.itl_p95_ms <= TARGET_MS
    assert adaptive.itl_p95_ms <= TARGET_MS, loop.history[::4]
    assert adaptive.tokens_per_s >= 0.85 * best.tokens_per_s, loop.history[::4]
    assert adaptive.engine_queue <= 0.1


async def test_the_engines_own_queue_stays_near_empty_when_its_cache_is_small(redis_url: str) -> None:
    too_high, _ = await measured(redis_url, SMALL, 64, 0, seconds=20, n_tokens=50)
    best, _ = await measured(redis_url, SMALL, 20, 0, seconds=20, n_tokens=50)
    adaptive, loop = await measured(redis_url, SMALL, 64, TARGET_MS, n_tokens=50)
    assert too_high.engine_queue >= 20
    assert adaptive.engine_queue <= 1.0, loop.history[::4]
    assert best.engine_queue <= 1.0
    assert adaptive.tokens_per_s >= 0.85 * best.tokens_per_s


async def test_a_light_load_keeps_all_slots(redis_url: str) -> None:
    _, loop = await measured(redis_url, SLOW, 64, TARGET_MS, seconds=15, n_clients=8)
    assert set(loop.history) == {64}
