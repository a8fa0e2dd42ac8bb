"""The simulator's queues: each order where it differs from the others, quanta in the engine, all books kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.sim.checkers import Conservation
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.orders import DlpmOrder, MlfqOrder, VtcOrder
from autoscaler.sim.queues import Fair, Queue, earliest_deadline, fcfs, priority, shortest_predicted
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.world import World
from controlplane.policy.ordering import QueueOrder
from controlplane.policy.perfmodel import StepModel

STEP = StepModel(base_s=0.001, weights_s=0.009, token_s=1e-5, seq_s=0.0, context_s=0.0, pair_s=0.0)
SPEC = EngineSpec(STEP, kv_tokens=20_000, max_seqs=16, prefix_caching=True)
QUEUES: dict[str, Callable[[], Queue]] = {
    "fair": Fair,
    "fair-shortest": lambda: Fair(order=QueueOrder.SJF),
    "fcfs": fcfs,
    "priority": priority,
    "edf": lambda: earliest_deadline(lambda job: 1.0 + job.band),
    "shortest": shortest_predicted,
    "mlfq": lambda: MlfqOrder(quantum=8, starve_s=5),
    "vtc": VtcOrder,
    "dlpm": lambda: DlpmOrder(quantum=100),
}


def simulate(queue: Queue, jobs: list[Job], *, slots: int = 1, spec: EngineSpec = SPEC) -> World:
    kernel = Kernel()
    world = World(kernel, queue, LeastLoad(), (Conservation(every=1),))
    world.add_replica(spec, slots)
    world.feed(iter(jobs))
    kernel.run(max_events=100_000)
    assert world.n_ended == len(jobs)
    return world


def order_of_first_tokens(queue: Queue, jobs: list[Job]) -> list[int]:
    simulate(queue, jobs)
    return [job.id for job in sorted(jobs, key=lambda j: j.first_s)]


def job(number: int, n_output: int, *, tenant: str = "t", band: int = 0, at_s: float = 0.0) -> Job:
    return Job(number, at_s, 64, n_output, (tenant, tenant, tenant), band=band)


def test_each_line_keeps_its_order() -> None:
    """The first finds a free slot; the others wait together."""

    def served(queue: Queue, bands: tuple[int, int, int, int] = (0, 0, 2, 1)) -> list[int]:
        lengths = (50, 90, 10, 40)
        return order_of_first_tokens(queue, [job(n, lengths[n], band=bands[n]) for n in range(4)])

    assert served(fcfs()) == [0, 1, 2, 3]
    assert served(priority()) == [0, 1, 3, 2]
    assert served(shortest_predicted()) == [0, 2, 3, 1]
    assert served(earliest_deadline(lambda j: 10 - j.band)) == [0, 2, 3, 1]
    assert served(Fair(order=QueueOrder.SJF)) == [0, 1, 3, 2], "bands come before lengths"
    assert served(Fair(order=QueueOrder.SJF), (0, 0, 0, 0)) == [0, 2, 3, 1]
    assert served(Fair(), (0, 0, 0, 0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("queue", [VtcOrder, lambda: DlpmOrder(500), Fair])
def test_a_flood_of_one_tenant_does_not_hold_up_another(queue: Callable[[], Queue]) -> None:
    flood = [job(n, 40, tenant="flood") for n in range(20)]
    simulate(queue(), [*flood, late := job(20, 40, tenant="other", at_s=0.1)])
    assert sum(f.first_s < late.first_s for f in flood) <= 12
    simulate(fcfs(), [*(job(n, 40) for n in range(20)), last := job(20, 40, at_s=0.1)])
    assert last.first_s > 20 * 40 * 0.009


def test_dlpm_takes_what_is_cached_first() -> None:
    prefix = tuple(range(4))
    first = Job(0, 0.0, 2100, 5, ("a", "a", "a"), prefix=prefix)
    cold = Job(1, 0.01, 2100, 5, ("a", "a", "a"), prefix=(9, 8, 7, 6))
    warm = Job(2, 0.02, 2100, 5, ("a", "a", "a"), prefix=prefix)
    assert order_of_first_tokens(DlpmOrder(), [first, cold, warm]) == [0, 2, 1]


def test_vtc_charges_what_is_produced_as_it_is_produced() -> None:
    """The long answer under way weighs before it ends: the other's second goes before its owner's second."""
    queue = VtcOrder()
    jobs = [
        job(0, 400, tenant="long"),
        job(1, 20, tenant="short", at_s=0.1),
        job(2, 20, tenant="short", at_s=0.11),
        job(3, 5, tenant="long", at_s=0.12),
    ]
    simulate(queue, jobs, slots=2)
    assert jobs[2].first_s < jobs[3].first_s
    assert queue.policy.counters["long"] == 64 * 2 + 2 * 405


def test_the_fair_queue_charges_an_answer_beyond_its_prediction_while_it_runs() -> None:
    queue, kernel = Fair(), Kernel()
    world = World(kernel, queue, LeastLoad())
    world.add_replica(SPEC, 1)
    long = Job(0, 0.0, 64, 900, ("a", "a", "a"), n_predicted=5)
    world.feed(iter([long, *(job(n, 5, tenant="b", at_s=n * 0.5) for n in range(1, 10))]))
    kernel.run(until_s=4.6)
    assert queue.queue.requests["0"].charged == 10 * 64 + 20 * 400, "what it had put out at the last second"


def test_what_was_lost_goes_before_what_is_shorter() -> None:
    kernel = Kernel()
    world = World(kernel, shortest_predicted(), LeastLoad())
    doomed = world.add_replica(SPEC, 1)
    jobs = [job(0, 80), job(1, 5, at_s=0.05)]
    world.feed(iter(jobs))
    kernel.run(until_s=0.2)
    world.kill_replica(doomed)
    world.add_replica(SPEC, 1)
    kernel.run(max_events=1000)
    assert jobs[0].ended_s < jobs[1].ended_s


def test_mlfq_puts_a_long_answer_aside_and_it_computes_again() -> None:
    long, short = job(0, 60), job(1, 6, at_s=0.05)
    world = simulate(MlfqOrder(quantum=8), [long, short])
    assert world.n_put_aside == 1
    assert short.ended_s < long.ended_s
    assert long.n_attempts == 2
    alone = job(0, 60)
    assert simulate(MlfqOrder(quantum=8), [alone]).n_put_aside == 0, "nobody else: it goes on"
    assert long.ended_s > alone.ended_s + (short.ended_s - short.first_s)


@given(
    st.lists(
        st.tuples(
            st.floats(0, 3), st.integers(1, 700), st.integers(1, 60), st.integers(0, 2), st.integers(0, 3)
        ),
        min_size=1,
        max_size=25,
    ),
    st.sampled_from(sorted(QUEUES)),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_every_order_serves_everything_and_keeps_the_books(
    asked: list[tuple[float, int, int, int, int]], name: str, slots: int
) -> None:
    jobs = [
        Job(
            n,
            at,
            n_prompt,
            n_output,
            (f"t{t}",) * 3,
            n_predicted=5,
            band=band,
            prefix=(t,) * (n_prompt // 512),
        )
        for n, (at, n_prompt, n_output, t, band) in enumerate(sorted(asked))
    ]
    world = simulate(QUEUES[name](), jobs, slots=slots)
    assert not len(world.queue)


def test_what_a_lost_replica_ran_is_served_first_and_once_whatever_the_order() -> None:
    for name, make in QUEUES.items():
        kernel = Kernel()
        world = World(kernel, make(), LeastLoad(), (Conservation(every=1),))
        doomed = world.add_replica(SPEC, 2)
        world.feed(iter([job(n, 60, tenant=f"t{n % 3}") for n in range(8)]))
        kernel.run(until_s=0.3)
        n_ended = world.n_ended
        world.kill_replica(doomed)
        world.add_replica(SPEC, 2)
        kernel.run(max_events=100_000)
        assert world.n_ended == 8 > n_ended, name
