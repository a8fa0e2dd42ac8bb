"""Admission by prediction: its properties, what it learns, and what it does to an overloaded queue in virtual time."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.policy.fairness import FairQueue
from controlplane.policy.flows import ANY_MS, TOKEN, Flow, Request
from controlplane.policy.outlook import (
    FLOOR,
    MAX_RECORDS,
    MIN_SEEN,
    PROBE_EVERY,
    Gate,
    Track,
    attainment,
    share_of_target,
)
from controlplane.policy.pace import Pace
from controlplane.policy.perfbias import Bias
from controlplane.policy.promises import CLASSES, Promise
from controlplane.policy.waitingflows import BESIDE

INTERACTIVE, STANDARD, BATCH, FLEX = CLASSES
_bias = st.builds(lambda p50, spread: Bias(p50, p50 + spread, 100), st.floats(-2, 2), st.floats(0.01, 2))


def warm(base_s: float = 0.05, token_s: float = 1e-4, step_s: float = 0.02) -> Gate:
    """A gate that has seen enough, at this pace exactly."""
    gate = Gate(Pace(base_s, token_s, step_s))
    for _ in range(MIN_SEEN):
        gate.pace.saw_first(100, base_s + token_s * 100)
        gate.pace.saw_answer(100, 51, 50 * step_s)
    return gate


# -- properties


@given(_bias, st.floats(0.01, 1000), st.floats(0.01, 1000))
def test_the_share_of_a_target_is_where_attainment_meets_the_floor(
    bias: Bias, target_s: float, other_s: float
) -> None:
    at_s = target_s * share_of_target(bias)
    assert attainment(target_s, at_s, bias) == pytest.approx(FLOOR, abs=1e-6)
    assert (attainment(target_s, other_s, bias) >= FLOOR) == (other_s <= at_s) or other_s == pytest.approx(
        at_s
    )


@given(_bias, st.floats(0.01, 100), st.floats(0, 100), st.floats(0, 100))
def test_attainment_falls_with_what_is_predicted(bias: Bias, target_s: float, a: float, b: float) -> None:
    low, high = sorted((a, b))
    assert attainment(target_s, low, bias) >= attainment(target_s, high, bias)


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.integers(0, 50_000), st.integers(0, 50_000))
def test_a_longer_prompt_or_more_before_it_never_helps(n: int, m: int, p: int, q: int) -> None:
    gate = warm()
    (short, long), (less, more) = sorted((n, m)), sorted((p, q))
    one = gate.terms("o", INTERACTIVE, short, 50, slots=8, n_prefill=less)
    other = gate.terms("o", INTERACTIVE, long, 50, slots=8, n_prefill=more)
    assert other.most_ahead_ms <= one.most_ahead_ms
    assert other.is_hopeless >= one.is_hopeless
    total_s = [gate.total_s(one, ahead_ms, 8) for ahead_ms in (p, q)]
    assert (total_s[0] <= total_s[1]) == (p <= q)


@given(st.integers(1, 10_000_000), _bias)
def test_an_idle_warm_replica_refuses_nothing(n_prompt: int, bias: Bias) -> None:
    """Nothing waits for its first word there, and a free slot is taken before anything is compared."""
    gate = warm()
    gate.terms("o", INTERACTIVE, 10, 10, slots=1)
    gate.record("o", INTERACTIVE).bias = bias
    gate.record("o", INTERACTIVE).share = share_of_target(bias)
    terms = gate.terms("o", INTERACTIVE, n_prompt, 100, slots=1, n_prefill=0)
    assert not terms.is_hopeless
    queue = FairQueue()
    queue.enrol("r", 1, 0)
    request = Request("q", Flow(0, "o", "p", "k"), 0, n_prompt, 100, slot_ms=terms.slot_ms)
    assert queue.admit(request, 0, ["r"], most_ahead_ms=terms.most_ahead_ms)[0] == "bound"
    stale = Request("s", Flow(0, "o", "p", "k"), 0, n_prompt, 100)
    queue.settle("q", 1, n_prompt=1, n_cached=0, n_output=1)
    assert queue.admit(stale, 1, [], most_ahead_ms=-1)[0] == "bound", "free, although no candidate says so"


def test_a_long_queue_of_little_work_refuses_nothing_and_a_short_one_of_much_does() -> None:
    gate = warm()
    small = gate.terms("o", INTERACTIVE, 10, 1, slots=64)
    n = small.most_ahead_ms // small.slot_ms
    assert n > 100, "hundreds of them may wait"
    large = gate.terms("o", INTERACTIVE, 10_000, 4_000, slots=1)
    assert large.slot_ms > 50_000
    for work_ms, n_waiting, verdict in ((small.slot_ms, 150, "queued"), (large.slot_ms, 1, "late")):
        queue = FairQueue()
        queue.enrol("r", 1, 0)
        for i in range(n_waiting + 1):
            queue.admit(Request(f"q{i}", Flow(0, "o", "p", "k"), i, 1, 1, slot_ms=work_ms), 0, ["r"])
        asks = gate.terms("o", INTERACTIVE, 100, 50, slots=64)
        asked = Request("asked", Flow(0, "o", "p", "k"), 999, 100, 50, slot_ms=asks.slot_ms)
        got = queue.admit(asked, 0, ["r"], most_ahead_ms=asks.most_ahead_ms)[0]
        assert got == verdict, (n_waiting, work_ms, asks)


def test_nobody_is_refused_before_there_is_a_pace_or_where_nobody_knows_the_slots() -> None:
    assert Gate().terms("o", INTERACTIVE, 10, 10, slots=8).most_ahead_ms == ANY_MS
    assert warm().terms("o", INTERACTIVE, 10, 10, slots=0).most_ahead_ms == ANY_MS
    assert warm().terms("o", INTERACTIVE, 10, 10, slots=8, predicts=False).most_ahead_ms == ANY_MS
    assert warm().terms("o", INTERACTIVE, 10, 10, slots=8).most_ahead_ms < ANY_MS


def test_who_can_wait_may_until_the_answer_would_miss_its_deadline() -> None:
    gate = warm()
    interactive, batch = (
        gate.terms("o", each, 100, 50, slots=1).most_ahead_ms for each in (INTERACTIVE, BATCH)
    )
    assert interactive < 1_000 < 10 * 3600 * 1000 < batch < BATCH.deadline_s * 1000
    hurried = Promise("batch", 2, 600_000, 2_000, 5)
    assert warm().terms("o", hurried, 100, 1_000, slots=1).most_ahead_ms == -1


# -- learning


def test_a_pace_is_learned_from_what_was_seen() -> None:
    pace, rng = Pace(), random.Random(1)
    for _ in range(200):
        n, m = rng.randrange(50, 4000), rng.randrange(2, 300)
        pace.saw_first(n, (0.2 + 0.001 * n) * rng.uniform(0.9, 1.1))
        pace.saw_answer(n, m, (m - 1) * 0.08)
    assert pace.first_s(2_000) == pytest.approx(2.2, rel=0.1)
    assert pace.step_s == pytest.approx(0.08, rel=0.01)
    assert pace.slot_s(1_000, 100) == pytest.approx(1.2 + 8, rel=0.1)


@pytest.mark.parametrize("n_seen", [MIN_SEEN, 3 * MIN_SEEN, 500])
@pytest.mark.parametrize("n_tokens", [20, 250, 800])
def test_prompts_of_one_length_that_were_fast_refuse_no_burst_of_them(n_tokens: int, n_seen: int) -> None:
    gate = Gate()
    for _ in range(n_seen):
        gate.pace.saw_first(n_tokens, 0.002)
        gate.pace.saw_answer(n_tokens, 64, 0.005)
    assert gate.pace.first_s(n_tokens) < 0.1, "a presumption is no reason to expect what was never seen"
    burst = gate.terms("org", INTERACTIVE, n_tokens, 64, slots=16, n_prefill=15 * n_tokens)
    assert not burst.is_hopeless
    assert burst.most_ahead_ms > 0


def test_prompts_of_one_length_do_not_tilt_the_line() -> None:
    pace = Pace(0.05, 2e-4)
    for _ in range(300):
        pace.saw_first(64, 0.5)
    assert pace.first_s(64) == pytest.approx(0.5, rel=0.05)
    assert 0 <= pace.token_s < 0.01


def test_quantiles_that_do_not_hold_refuse_nobody_until_they_do() -> None:
    gate = warm()
    assert gate.terms("o", INTERACTIVE, 10, 10, slots=8).most_ahead_ms < ANY_MS
    for i in range(60):  # now in time, now ten times as late: no quantile holds for long
        gate.record("o", INTERACTIVE).waited(1.0, 0.01 * (1.25 ** min(i, 40)))
    assert not gate.record("o", INTERACTIVE).track.holds
    assert gate.terms("o", INTERACTIVE, 10, 10, slots=8).most_ahead_ms == ANY_MS
    for _ in range(300):
        gate.record("o", INTERACTIVE).waited(1.0, random.Random(_).lognormvariate(0, 0.3))
    assert gate.record("o", INTERACTIVE).track.holds
    assert gate.terms("o", INTERACTIVE, 10, 10, slots=8).most_ahead_ms < ANY_MS


def test_coverage_counts_both_ways() -> None:
    late, early = Track(), Track()
    for _ in range(100):
        late, early = late.seen(False, False), early.seen(True, True)
    assert (late.holds, early.holds) == (False, False)


def test_one_in_so_many_that_would_be_refused_is_let_in() -> None:
    gate = warm()
    terms = gate.terms("o", INTERACTIVE, 10, 10, slots=1)
    for _ in range(PROBE_EVERY):
        assert gate.record("o", INTERACTIVE).late(terms, 10_000_000, 1) == 300
    probe = gate.terms("o", INTERACTIVE, 10, 10, slots=1)
    assert probe.most_ahead_ms == ANY_MS
    gate.record("o", INTERACTIVE).let_in(probe)
    assert gate.terms("o", INTERACTIVE, 10, 10, slots=1).most_ahead_ms < ANY_MS


def test_when_to_come_back_is_when_the_surplus_has_drained() -> None:
    gate = warm()
    terms = gate.terms("o", INTERACTIVE, 10, 10, slots=4)
    assert gate.record("o", INTERACTIVE).late(terms, terms.most_ahead_ms + 8_000, 4) == pytest.approx(2)


def test_what_one_organization_does_to_itself_refuses_no_other() -> None:
    gate = warm()
    before = gate.terms("other", INTERACTIVE, 10, 10, slots=8)
    rng = random.Random(3)
    for _ in range(200):
        gate.record("o", INTERACTIVE).waited(0.1, rng.lognormvariate(-1, 0.3))  # four times as late as said
    assert gate.terms("o", INTERACTIVE, 10, 10, slots=8).most_ahead_ms < before.most_ahead_ms
    assert gate.terms("other", INTERACTIVE, 10, 10, slots=8) == before


def test_records_are_bounded_and_the_one_not_used_for_longest_goes() -> None:
    gate = warm()
    kept = gate.record("kept", INTERACTIVE)
    for i in range(2 * MAX_RECORDS):
        gate.record(f"o{i}", INTERACTIVE)
        assert gate.record("kept", INTERACTIVE) is kept
    assert len(list(gate.records())) == MAX_RECORDS


def queued(
    queue: FairQueue, organization: str, n: int, n_prompt: int, slot_ms: int, weight: int = 100
) -> list[str]:
    """`n` requests of it wait."""
    flow = Flow(0, organization, "p" + organization, "k" + organization, (weight, 100, 100))
    return [
        queue.admit(Request(f"{organization}{i}", flow, i, n_prompt, 0, slot_ms=slot_ms), i)[0]
        for i in range(n)
    ]


def test_what_goes_before_follows_the_counters() -> None:
    """A request that costs as much service as ten of another's waits for ten of them, not for one as long as itself."""
    queue = FairQueue()
    queued(queue, "long", 1, 1_000, 500)
    queued(queue, "short", 30, 100, 200)
    assert queue.flows.ahead_ms(Flow(0, "long", "plong", "klong")) == 500 + 10 * 200
    assert queue.flows.ahead_ms(Flow(0, "new", "pnew", "knew")) == 0, "it starts at the least counter"
    queue.enrol("r", 1, 100)
    assert queue.requests["long0"].replica == "r"  # the first to come; 1,000 tokens ahead now
    queue.settle("long0", 200, n_prompt=1_000, n_cached=0, n_output=0)
    assert queue.flows.ahead_ms(Flow(0, "long", "plong", "klong")) == 9 * 200


def test_the_window_counts_for_those_beside() -> None:
    queue = FairQueue(window=500 * TOKEN)
    queued(queue, "short", 30, 100, 200)
    assert queue.flows.ahead_ms(Flow(0, "new", "pnew", "knew")) == 5 * 200


def test_many_flows_beside_are_taken_like_the_last_of_those_looked_at() -> None:
    queue = FairQueue(window=50 * TOKEN)
    for i in range(3 * BESIDE):
        queued(queue, f"o{i:02d}", 1, 100, 200)
    assert queue.flows.ahead_ms(Flow(0, "new", "pnew", "knew")) == 3 * BESIDE * 100


@pytest.mark.parametrize(
    ("others", "n_own", "weight", "verdict"),
    [
        (0, 3, 100, "late"),  # nobody else: it is late by its own doing
        (1, 3, 100, "queued"),  # 3 x 200 ms at half of the slots are 1,200
        (1, 6, 100, "late"),
        (1, 6, 300, "queued"),  # at three quarters of them 1,600
        (2, 3, 100, "queued"),
        (3, 4, 100, "late"),
    ],
)
def test_who_is_within_its_share_is_not_refused_because_of_others(
    others: int, n_own: int, weight: int, verdict: str
) -> None:
    queue = FairQueue()
    queue.enrol("r", 1, 0)
    queue.admit(Request("running", Flow(0, "x", "px", "kx"), 0, 1, 1, slot_ms=1), 0, ["r"])
    queued(queue, "own", n_own, 100, 200, weight)
    for i in range(others):
        queued(queue, f"o{i}", 50, 100, 1_000)
    flow = Flow(0, "own", "pown", "kown", (weight, 100, 100))
    asked = Request("asked", flow, 99, 100, 0, slot_ms=200)
    assert queue.admit(asked, 99, most_ahead_ms=100, most_own_ms=2_000)[0] == verdict


# -- an overloaded deployment


@dataclass
class Served:
    """Open loop: so many requests a second for `slots`, each of which takes what it takes."""

    predicts: bool
    load: float
    slots: int = 16
    target: Promise = INTERACTIVE
    n: int = 3_000
    seed: int = 7
    first_s: list[float] = field(default_factory=list)  # of those admitted
    n_refused: int = 0

    def run(self) -> Served:
        rng, gate, queue = random.Random(self.seed), Gate(), FairQueue(bound=2_000, window=2_000 * TOKEN)
        queue.enrol("r", self.slots, 0)
        mean_s = 0.1 + 40 * 0.02
        gap_s = mean_s / self.slots / self.load
        events: list[tuple[float, int, str]] = []
        at_s, known = 0.0, {}
        for i in range(self.n):
            at_s += rng.expovariate(1 / gap_s)
            heapq.heappush(events, (at_s, 1, f"q{i}"))
        while events:
            now_s, kind, name = heapq.heappop(events)
            now_ms = int(now_s * 1000)
            if kind == 0:
                n_prompt, n_output, started_s, arrived_s, total_s = known[name]
                bound = queue.settle(name, now_ms, n_prompt=n_prompt, n_cached=0, n_output=n_output)
                self._learn(gate, n_prompt, n_output, started_s - arrived_s, total_s)
            else:
                n_prompt, n_output = rng.randrange(50, 500), max(2, int(rng.expovariate(1 / 40)))
                terms = gate.terms("o", self.target, n_prompt, 40, slots=self.slots, predicts=self.predicts)
                flow = Flow(0, "o", "p", f"k{rng.randrange(3)}")
                ahead_ms = queue.flows.ahead_ms(flow)
                request = Request(name, flow, now_ms, n_prompt, 40, slot_ms=terms.slot_ms)
                verdict, bound = queue.admit(request, now_ms, ["r"], most_ahead_ms=terms.most_ahead_ms)
                if verdict in ("late", "full"):
                    self.n_refused += 1
                    gate.record("o", self.target).late(terms, ahead_ms, self.slots)
                else:
                    waits = verdict == "queued"
                    total_s = gate.total_s(terms, ahead_ms, self.slots) if waits else 0.0
                    gate.record("o", self.target).let_in(terms)
                    known[name] = (n_prompt, n_output, 0.0, now_s, total_s)
            for request_id, _ in bound:
                n_prompt, n_output, _, arrived_s, total_s = known[request_id]
                known[request_id] = (n_prompt, n_output, now_s, arrived_s, total_s)
                prefill_s = 0.05 + 2e-4 * n_prompt
                self.first_s.append(now_s + prefill_s - arrived_s)
                heapq.heappush(events, (now_s + prefill_s + n_output * 0.02, 0, request_id))
            bound = []
        return self

    @staticmethod
    def _learn(gate: Gate, n_prompt: int, n_output: int, wait_s: float, total_s: float) -> None:
        prefill_s = 0.05 + 2e-4 * n_prompt
        if total_s:
            gate.record("o", INTERACTIVE).waited(total_s, wait_s + prefill_s)
        else:
            gate.pace.saw_first(n_prompt, prefill_s)
        gate.pace.saw_answer(n_prompt, n_output, (n_output - 1) * 0.02)

    @property
    def attained(self) -> float:
        return sum(s <= 1.0 for s in self.first_s) / len(self.first_s)

    @property
    def n_good(self) -> int:
        return sum(s <= 1.0 for s in self.first_s)


def test_twice_overloaded_those_admitted_are_served_in_time() -> None:
    predicted, bounded = Served(True, 2.0).run(), Served(False, 2.0).run()
    print(f"predicted {predicted.attained:.3f}, bounded {bounded.attained:.3f}; "
          f"good {predicted.n_good} and {bounded.n_good} of 3000; refused {predicted.n_refused}")  # fmt: skip
    assert predicted.attained >= 0.95
    assert bounded.attained < 0.2
    assert predicted.n_good > 10 * bounded.n_good
    assert len(predicted.first_s) > 0.45 * 3_000, "the slots stay busy: half of what comes can be served"


def test_without_overload_hardly_anybody_is_refused() -> None:
    served = Served(True, 0.8).run()
    assert served.n_refused < 0.02 * 3_000
    assert served.attained > 0.99
    assert served.n_good > Served(False, 0.8).run().n_good
