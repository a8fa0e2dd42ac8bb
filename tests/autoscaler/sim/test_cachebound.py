"""Bounds of prefix caching, and the observer that says how even a run was, against cases done by hand."""

from __future__ import annotations

import itertools
import random

from autoscaler.sim.balance import Balance
from autoscaler.sim.cachebound import clairvoyant, infinite, least_recent
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.queues import fcfs
from autoscaler.sim.routers import RoundRobin
from autoscaler.sim.workload import Arrival
from autoscaler.sim.world import World
from controlplane.policy.perfmodel import StepModel


def arrival(*blocks: int, extra: int = 1) -> Arrival:
    return Arrival(0.0, len(blocks) * BLOCK + extra, 1, prefix=(*blocks, -1))


def hits(arrivals: list[Arrival], share: float) -> int:
    """Blocks found, of a share of all prompt tokens."""
    return round(share * sum(a.n_prompt for a in arrivals)) // BLOCK


def test_bounds_of_a_history_done_by_hand() -> None:
    """1-2, 3, 1-2, 3 again: two blocks hold either the pair or the single one."""
    history = [arrival(1, 2), arrival(3), arrival(1, 2), arrival(3)]
    assert hits(history, infinite(history)) == 3
    assert hits(history, least_recent(history, 3)) == 3
    # 3 pushed out 2, the pair's end; the pair then pushed out 3.
    assert hits(history, least_recent(history, 2)) == 1
    assert hits(history, clairvoyant(history, 2)) == 2
    assert least_recent([arrival(7, extra=0)] * 2, 9) == (BLOCK - 1) / (
        2 * BLOCK
    )  # the last token is computed


def test_foresight_is_the_best_that_any_choice_could_be() -> None:
    """Against every possible content of a cache of two blocks, on short random histories of chained prompts."""
    chains = [(1,), (1, 2), (1, 2, 3), (4,), (4, 5)]
    for seed in range(12):
        chance = random.Random(seed)
        history = [arrival(*chance.choice(chains)) for _ in range(7)]
        states = {frozenset[int](): 0}
        for each in history:
            blocks, after = each.prefix[:-1], dict[frozenset[int], int]()
            for held, n in states.items():
                found = len(list(itertools.takewhile(held.__contains__, blocks)))
                for kept in range(3):
                    for new in itertools.combinations(sorted(held | set(blocks)), kept):
                        key = frozenset(new)
                        after[key] = max(after.get(key, -1), n + found)
            states = after
        best = clairvoyant(history, 2)
        assert hits(history, best) == max(states.values()), seed
        assert least_recent(history, 2) <= best <= infinite(history)


def test_balance_is_the_fullest_over_the_mean() -> None:
    """Two replicas in turn: one gets prompts of three blocks, one of one, two answers under way all the time."""
    step = StepModel(base_s=0.01, weights_s=0.0, token_s=1e-9, seq_s=0.0, context_s=0.0, pair_s=0.0)
    balance = Balance(window_s=0.05)
    world = World(Kernel(), fcfs(), RoundRobin(), (balance,))
    for _ in range(2):
        world.add_replica(EngineSpec(step, kv_tokens=100_000), 8)
    sizes = [1, 3, 1, 3, 1, 3]
    world.feed(iter([Job(n, n * 0.001, 1000 * size, 10) for n, size in enumerate(sizes)]))
    world.kernel.run()
    assert balance.work == (3 * 3010) / ((3 * 3010 + 3 * 1010) / 2)
    assert balance.peak_running == 3
    assert 1.0 <= balance.running < 1.4
    assert 1.4 < balance.windows <= 1.5
    assert Balance().work == Balance().running == Balance().windows == 1.0
