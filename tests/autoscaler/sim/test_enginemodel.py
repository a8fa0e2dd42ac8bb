"""The simulated engine against one that does every step by hand, and its books under pressure."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.sim.checkers import Conservation, InvariantError
from autoscaler.sim.enginemodel import Engine, EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.queues import fcfs
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.world import World
from controlplane.policy.perfmodel import StepModel, pairs

STEP = StepModel(base_s=0.001, weights_s=0.004, token_s=2e-5, seq_s=1e-5, context_s=1e-7, pair_s=1e-9)


def by_hand(jobs: list[Job], spec: EngineSpec) -> dict[int, tuple[float, float]]:
    """First token and end of each job on one engine without shortage of KV, one step after the other."""
    todo = sorted(jobs, key=lambda j: (j.arrived_s, j.id))
    left = {j.id: j.n_prompt for j in jobs}
    done = {j.id: 0 for j in jobs}
    first: dict[int, float] = {}
    end: dict[int, float] = {}
    running: list[Job] = []
    now_s = 0.0
    while len(end) < len(jobs):
        came = [j for j in todo if j.arrived_s <= now_s and j.id not in end and j not in running]
        running += came[: spec.max_seqs - len(running)]
        if not running:
            now_s = min(j.arrived_s for j in todo if j.id not in end)
            continue
        decoding = [j for j in running if not left[j.id]]
        budget = max(spec.max_batched_tokens - len(decoding), 1)
        chunks: dict[int, int] = {}
        n_pairs = 0.0
        for job in running:
            if left[job.id] and budget:
                n = min(left[job.id], budget)
                n_pairs += pairs(job.n_prompt - left[job.id], n)
                chunks[job.id] = n
                budget -= n
        context = sum(j.n_prompt + done[j.id] for j in decoding)
        now_s += spec.step.step_s(sum(chunks.values()), n_pairs, len(decoding), context)
        for job in decoding:
            done[job.id] += 1
        for job_id, n in chunks.items():
            left[job_id] -= n
            if not left[job_id]:
                done[job_id] = 1
                first[job_id] = now_s
        for job in list(running):
            if done[job.id] >= job.n_output:
                end[job.id] = now_s
                running.remove(job)
    return {job_id: (first[job_id], end[job_id]) for job_id in end}


class Ends:
    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def on_event(self, world: World) -> None:
        pass

    def on_end(self, world: World, job: Job) -> None:
        self.jobs.append(job)


def simulate(jobs: list[Job], spec: EngineSpec, n_replicas: int = 1, slots: int = 1000) -> list[Job]:
    kernel, ends = Kernel(), Ends()
    world = World(kernel, fcfs(), LeastLoad(), (Conservation(every=1), ends))
    for _ in range(n_replicas):
        world.add_replica(spec, slots)
    world.feed(iter(sorted(jobs, key=lambda j: (j.arrived_s, j.id))))
    kernel.run(max_events=200_000)
    return ends.jobs


arrivals = st.lists(
    st.tuples(st.floats(0, 2, allow_nan=False), st.integers(1, 900), st.integers(1, 120)),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(arrivals, st.integers(1, 8), st.integers(8, 512))
def test_strides_end_when_single_steps_would(
    loads: list[tuple[float, int, int]], max_seqs: int, budget: int
) -> None:
    spec = EngineSpec(STEP, kv_tokens=10**9, max_seqs=max_seqs, max_batched_tokens=budget)
    jobs = [Job(n, *load) for n, load in enumerate(loads)]
    expected = by_hand([Job(n, *load) for n, load in enumerate(loads)], spec)
    for job in simulate(jobs, spec):
        first_s, end_s = expected.pop(job.id)
        assert math.isclose(job.first_s, first_s, rel_tol=1e-9, abs_tol=1e-9)
        assert math.isclose(job.ended_s, end_s, rel_tol=1e-9, abs_tol=1e-9)
    assert not expected


@settings(max_examples=100, deadline=None)
@given(arrivals, st.integers(1100, 4000), st.booleans())
def test_books_balance_under_kv_pressure(loads: list[tuple[float, int, int]], kv: int, shared: bool) -> None:
    """Every event checks the engine's books against its requests (Conservation, every=1)."""
    spec = EngineSpec(STEP, kv_tokens=kv, max_seqs=16, max_batched_tokens=256, prefix_caching=shared)
    jobs = [Job(n, *load, prefix=(1, n % 3 + 2)) for n, load in enumerate(loads)]
    done = simulate(jobs, spec, n_replicas=2, slots=6)
    assert sorted(job.id for job in done) == [job.id for job in jobs]


def test_shortage_of_kv_preempts_the_last_admitted_and_loses_nothing() -> None:
    spec = EngineSpec(STEP, kv_tokens=1000, max_seqs=8)
    first, second = Job(0, 0.0, 300, 400), Job(1, 0.0, 300, 400)
    simulate([first, second], spec)
    assert (first.n_preempted, second.n_preempted) == (0, 1)
    assert first.ended_s < second.ended_s
    assert second.n_done == 400


def test_a_shared_prefix_is_computed_once() -> None:
    spec = EngineSpec(STEP, kv_tokens=10**6, prefix_caching=True, max_batched_tokens=100_000)
    kernel = Kernel()
    engine = Engine(spec)
    prefix = tuple(range(8))
    n_prompt = 8 * BLOCK + 10
    engine.submit(Job(0, 0.0, n_prompt, 1, prefix=prefix), kernel.now_s)
    cold_s = engine.next_s
    engine.boundary(cold_s)
    engine.submit(Job(1, 0.0, n_prompt, 1, prefix=(*prefix[:4], 99, 98, 97, 96)), cold_s)
    warm_s = engine.next_s - cold_s
    assert engine.n_hit_tokens == 4 * BLOCK
    expected_s = STEP.step_s(n_prompt - 4 * BLOCK, pairs(4 * BLOCK, n_prompt - 4 * BLOCK), 0, 0)
    assert math.isclose(warm_s, expected_s, rel_tol=1e-9)


def test_a_dead_replica_s_requests_go_on_elsewhere_from_where_they_were() -> None:
    kernel, ends = Kernel(), Ends()
    world = World(kernel, fcfs(), LeastLoad(), (Conservation(every=1), ends))
    spec = EngineSpec(STEP, kv_tokens=10**6)
    doomed = world.add_replica(spec, 4)
    world.feed(iter([Job(0, 0.0, 100, 200)]))
    kernel.at(0.5, world.kill_replica, doomed)
    kernel.at(2.0, world.add_replica, spec, 4)
    kernel.run(max_events=10_000)
    (job,) = ends.jobs
    assert job.n_attempts == 2 and job.n_done == 200
    # What was produced is read again as prompt, not produced again: 100 steps or so are saved.
    alone_s = STEP.prefill_s(100) + STEP.decode_s(199, 1, 101)
    assert job.ended_s < 2.0 + alone_s - 0.3


def test_a_request_that_can_never_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed 100"):
        Engine(EngineSpec(STEP, kv_tokens=100)).submit(Job(0, 0.0, 80, 21), 0.0)


def test_a_lost_request_is_a_violation() -> None:
    kernel = Kernel()
    world = World(kernel, fcfs(), LeastLoad(), (Conservation(),))
    replica = world.add_replica(EngineSpec(STEP, kv_tokens=1000), 4)
    world.feed(iter([Job(0, 0.0, 10, 50), Job(1, 0.01, 10, 50)]))
    kernel.run(until_s=0.005)
    replica.jobs.clear()  # as a bug would
    with pytest.raises(InvariantError, match="arrived"):
        kernel.run()
