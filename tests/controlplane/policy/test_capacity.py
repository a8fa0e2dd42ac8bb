"""Capacity of a replica: bounds, monotony, and agreement with the simulated engine."""

from __future__ import annotations

import pytest

from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.queues import fcfs
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.world import World
from controlplane.policy.capacity import Mix, capacity, itl_s
from controlplane.policy.gpus import gpu
from controlplane.policy.perfmodel import ModelShape, kv_tokens, roofline

LLAMA_8B = ModelShape("llama-3.1-8b", 8.03e9, 32, 8, 128, 32)
STEP = roofline(LLAMA_8B, gpu("a10g"))
KV = kv_tokens(LLAMA_8B, gpu("a10g"))
MIX = Mix(1000, 200)


def test_the_promise_or_the_memory_limits_whichever_comes_first() -> None:
    tight = capacity(STEP, KV, MIX, itl_target_s=0.06)
    loose = capacity(STEP, KV, MIX, itl_target_s=10.0)
    assert (tight.bound_by, loose.bound_by) == ("itl", "kv")
    assert tight.slots < loose.slots <= KV / 1200
    assert tight.itl_s <= 0.06 < itl_s(STEP, MIX, tight.slots + 1)
    assert capacity(STEP, 10**9, MIX, itl_target_s=10.0, ceiling=16).bound_by == "ceiling"


def test_an_impossible_promise_still_leaves_one_slot() -> None:
    assert capacity(STEP, KV, MIX, itl_target_s=1e-6).slots == 1


def test_longer_requests_leave_fewer_slots() -> None:
    slots = [capacity(STEP, KV, Mix(n, 200), 0.2).slots for n in (200, 800, 3200)]
    assert slots == sorted(slots, reverse=True) and slots[0] > slots[-1]


def test_a_saturated_engine_does_what_was_predicted() -> None:
    """A closed loop of as many requests as there are slots, on the simulated engine: rate within 10 %."""
    found = capacity(STEP, KV, MIX, itl_target_s=0.15)
    kernel = Kernel()
    world = World(kernel, fcfs(), LeastLoad())
    world.add_replica(EngineSpec(STEP, KV), found.slots)
    world.feed(Job(n, n * 1e-6, 1000, 200) for n in range(found.slots * 30))
    kernel.run()
    assert world.n_ended / kernel.now_s == pytest.approx(found.requests_per_s, rel=0.1)
