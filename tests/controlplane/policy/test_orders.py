"""VTC, DLPM and skip-join MLFQ against the rules and examples of their papers."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from controlplane.policy.dlpm import Dlpm
from controlplane.policy.mlfq import SkipJoinMlfq
from controlplane.policy.vtc import Vtc

# -- VTC (arXiv:2401.00588; prices 1 and 2 as in its evaluation)


def serve(vtc: Vtc, n: int, n_prompt: int = 256, n_output: int = 256) -> dict[str, int]:
    """Requests served of each client, `n` in all, each charged when it begins and as it ends."""
    served: dict[str, int] = defaultdict(int)
    for _ in range(n):
        client, _ = vtc.take()
        vtc.charge(client, n_prompt=n_prompt)
        vtc.charge(client, n_output=n_output)
        served[client] += 1
    return served


def test_two_overloaded_clients_are_served_equally_whatever_they_send() -> None:
    """The paper's first experiment: 90 and 180 requests a minute of 256 + 256 tokens, more than there is room for."""
    vtc = Vtc()
    for n in range(90):
        vtc.add("slow", n)
        vtc.add("fast", 1000 + 2 * n)
        vtc.add("fast", 1001 + 2 * n)
    assert serve(vtc, 100) == {"slow": 50, "fast": 50}


def test_a_client_within_its_share_waits_for_nobody_and_the_rest_is_the_others() -> None:
    """Work conservation in the paper's on/off experiment: what one leaves, the other takes."""
    vtc = Vtc()
    served: dict[str, int] = defaultdict(int)
    for minute in range(60):
        vtc.add("light", minute)
        for n in range(9):
            vtc.add("heavy", 1000 + 10 * minute + n)
        for client, n in serve(vtc, 5).items():
            served[client] += n
    assert served == {"light": 60, "heavy": 240}


def test_idleness_earns_no_credit() -> None:
    """Without the lift a client that comes back would be served alone until it had caught up."""
    vtc = Vtc()
    for n in range(300):
        vtc.add("steady", n)
    serve(vtc, 100)
    for n in range(100):
        vtc.add("late", 1000 + n)
    assert vtc.counters["late"] == vtc.counters["steady"]
    assert serve(vtc, 40) == {"late": 20, "steady": 20}


def test_who_comes_to_an_empty_queue_starts_level_with_who_left_last() -> None:
    vtc = Vtc()
    for n in range(10):
        vtc.add("first", n)
    serve(vtc, 10)
    vtc.add("second", 100)
    assert vtc.counters["second"] == vtc.counters["first"] - 256 - 512 + 768


def test_a_lift_never_lowers_a_counter() -> None:
    vtc = Vtc()
    vtc.add("a", 1)
    vtc.charge("b", n_output=10_000)
    vtc.add("b", 2)
    assert vtc.counters == {"a": 0.0, "b": 20_000.0}


def test_a_lift_is_to_the_least_of_those_who_wait() -> None:
    vtc = Vtc()
    for number, (client, served) in enumerate((("low", 100), ("high", 300))):
        vtc.add(client, number)
        vtc.charge(client, n_prompt=served)
    vtc.add("new", 9)
    assert vtc.counters["new"] == 100.0


def test_weights_divide_service_and_an_output_token_costs_two() -> None:
    vtc = Vtc({"gold": 2.0})
    for n in range(100):
        vtc.add("gold", n)
        vtc.add("plain", 1000 + n)
    assert serve(vtc, 90) == {"gold": 60, "plain": 30}
    vtc = Vtc()
    vtc.charge("c", n_prompt=10, n_output=10)
    assert vtc.counters["c"] == 30.0


@pytest.mark.parametrize("seed", range(5))
def test_counters_of_backlogged_clients_stay_within_the_largest_charge(seed: int) -> None:
    """Lemma of the paper, one request at a time: max(w_p L, w_q M) with L, M the largest prompt and answer."""
    chance = random.Random(seed)
    vtc = Vtc()
    lengths = {}
    for n in range(900):
        vtc.add(f"c{n % 3}", n)
        lengths[n] = (chance.randint(1, 500), chance.randint(1, 250))
    for _ in range(200):
        client, request = vtc.take()
        n_prompt, n_output = lengths[request]
        vtc.charge(client, n_prompt=n_prompt, n_output=n_output)
        spread = max(vtc.counters.values()) - min(vtc.counters.values())
        assert spread <= 500 + 2 * 250, f"seed {seed}"


# -- DLPM (arXiv:2501.14312)


def test_the_longest_cached_prefix_goes_first_while_its_client_has_credit() -> None:
    dlpm = Dlpm(quantum=100)
    cached = {1: 0, 2: 50, 3: 80, 4: 10}
    for request, client in ((1, "a"), (2, "a"), (3, "b"), (4, "b")):
        dlpm.add(client, request)
    assert dlpm.take(cached.__getitem__) == ("b", 3), "nobody had credit: both got a quantum"
    dlpm.charge("b", n_prompt=20, n_output=40)  # 100 - 20 - 80: nothing left
    assert dlpm.credits == {"a": 100.0, "b": 0.0}
    assert dlpm.take(cached.__getitem__) == ("a", 2), "b's 4 is shorter cached anyway"
    dlpm.charge("a", n_prompt=10)
    assert dlpm.take(cached.__getitem__) == ("a", 1), "b has no credit, however much it has cached"
    dlpm.charge("a", n_prompt=60)
    assert dlpm.take(cached.__getitem__) == ("b", 4), "only b waits, so it is refilled"
    assert dlpm.credits == {"a": 30.0, "b": 100.0}


def test_refills_come_until_somebody_who_waits_has_credit() -> None:
    dlpm = Dlpm(quantum=100)
    dlpm.add("deep", 1)
    dlpm.charge("deep", n_prompt=250)
    dlpm.add("deeper", 2)
    dlpm.charge("deeper", n_prompt=450)
    assert dlpm.take(lambda r: r) == ("deep", 1)
    assert dlpm.credits == {"deep": 50.0, "deeper": -150.0}


def test_a_larger_quantum_follows_the_cache_longer() -> None:
    """The paper's trade: credits of one client in a row before the other is heard."""

    def in_a_row(quantum: float) -> int:
        dlpm = Dlpm(quantum)
        for n in range(200):
            dlpm.add("cached", n)
            dlpm.add("cold", 1000 + n)
        n = 0
        while True:
            client, _ = dlpm.take(lambda r: 90 if r < 1000 else 0)
            if client == "cold":
                return n
            dlpm.charge(client, n_prompt=10)
            n += 1

    assert (in_a_row(100), in_a_row(500)) == (10, 50)


# -- skip-join MLFQ (arXiv:2305.05920)


def mean_completion(policy: SkipJoinMlfq, jobs: dict[int, tuple[int, int]]) -> float:
    """One at a time, all there at 0: job -> (first iteration, decode steps). A preempted job resumes where it was."""
    now, used, ends = 0, dict.fromkeys(jobs, 0), {}
    for job, (first, _) in jobs.items():
        policy.join(job, first, 0.0)
    while len(policy):
        job = policy.take(float(now))
        first, decode = jobs[job]
        quantum = policy.quantum(job)
        left = first + decode - used[job]
        # The first iteration cannot be cut.
        step = left if quantum is None else min(left, max(int(quantum), first if not used[job] else 1))
        now += step
        used[job] += step
        if used[job] == first + decode:
            ends[job] = now
            policy.end(job)
        else:
            policy.demote(job)
            policy.wait(job, float(now))
    return sum(ends.values()) / len(ends)


def test_skip_join_beats_first_come_first_served_and_the_naive_queue() -> None:
    """The paper's argument for the skip: a long prompt in the first queue holds up all short ones."""
    jobs = {1: (5, 1), 2: (1, 1), 3: (1, 2)}
    skip = mean_completion(SkipJoinMlfq(n_levels=4, quantum=1), jobs)

    class Naive(SkipJoinMlfq):
        def join(self, request: int, first_iteration: float, now_s: float) -> None:
            super().join(request, 0.0, now_s)

    naive = mean_completion(Naive(n_levels=4, quantum=1), jobs)
    shortest, fcfs = (2 + 5 + 11) / 3, (6 + 8 + 11) / 3
    assert naive == (8 + 9 + 11) / 3, "the long prompt and both short ones take turns"
    assert skip == (3 + 5 + 11) / 3
    assert shortest < skip < fcfs < naive


def test_a_request_joins_the_first_level_whose_quantum_covers_its_prompt() -> None:
    policy = SkipJoinMlfq(n_levels=4, quantum=10, ratio=2)
    for request, first in enumerate((1, 10, 11, 20, 21, 40, 41, 500)):
        policy.join(request, first, 0.0)
    assert [policy.level(r) for r in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [policy.quantum(r) for r in (0, 2, 4, 6)] == [10.0, 20.0, 40.0, None]
    assert [policy.take(0.0) for _ in range(8)] == list(range(8))


def test_who_has_used_its_quantum_yields_to_its_level_and_those_above_only() -> None:
    policy = SkipJoinMlfq(n_levels=3, quantum=10)
    policy.join(1, 5, 0.0)
    assert policy.take(0.0) == 1
    assert policy.demote(1) == 1
    policy.join(2, 30, 0.0)  # level 2
    assert not policy.must_yield(1)
    policy.join(3, 15, 0.0)  # level 1
    assert policy.must_yield(1)
    policy.wait(1, 0.0)
    assert [policy.take(0.0) for _ in range(3)] == [3, 1, 2]
    assert policy.demote(2) == 2, "the last level is the last"


def test_who_starves_is_promoted_to_the_first_level() -> None:
    policy = SkipJoinMlfq(n_levels=3, quantum=10, starve_s=60)
    policy.join(1, 100, 0.0)
    policy.join(2, 1, 59.0)
    assert policy.take(59.9) == 2
    policy.join(3, 15, 59.9)
    assert policy.take(60.0) == 1
    assert policy.level(1) == 0


def test_nonsense_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="ratio = 1"):
        SkipJoinMlfq(ratio=1)
    with pytest.raises(ValueError, match="quantum = 0"):
        Dlpm(quantum=0)
    with pytest.raises(ValueError, match="nobody waits"):
        Dlpm().take(lambda r: 0)
    with pytest.raises(IndexError, match="nobody waits"):
        SkipJoinMlfq().take(0.0)
