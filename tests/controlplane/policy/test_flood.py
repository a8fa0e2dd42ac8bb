"""Admission by prediction under a flood, in virtual time: what a tenant is served must not be taken by one that asks
several times as much with long prompts. The live figure is `manage.py bench isolation`.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from controlplane.policy.fairness import Binding, FairQueue
from controlplane.policy.flows import Flow, Request
from controlplane.policy.outlook import Gate
from controlplane.policy.promises import CLASSES

INTERACTIVE = CLASSES[0]
STEP_S, PREFILL_TOKENS_PER_S = 0.021, 5_000.0
AGAIN_S = 0.25  # a refused client asks again
VICTIM, OTHER = "victim", "other"
N_PROMPT = {VICTIM: 60, OTHER: 3_000}


@dataclass
class Flood:
    """Closed loop: so many clients of each, one replica that computes prompts one after the other."""

    clients: dict[str, int]
    slots: int
    guarded: bool = True
    until_s: float = 40.0
    served: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    first_s: dict[str, list[float]] = field(default_factory=lambda: {VICTIM: [], OTHER: []})
    prefill_free_s: float = 0.0
    events: list[tuple[float, int, str, str]] = field(
        default_factory=list
    )  # (at, order, kind, whose or which)
    asked: dict[str, tuple[str, float, float, int]] = field(default_factory=dict)
    prefills: list[tuple[float, str]] = field(default_factory=list)  # (end, whose)

    def run(self) -> Flood:
        self.rng, self.gate, self.queue, self.n = random.Random(1), Gate(), FairQueue(), 0
        self.queue.enrol("r", self.slots, 0)
        for name, n in self.clients.items():
            for _ in range(n):
                self._at(self.rng.uniform(0, 0.1), "ask", name)
        while self.events[0][0] < self.until_s:
            now_s, _, kind, subject = heapq.heappop(self.events)
            self._ask(now_s, subject) if kind == "ask" else self._end(now_s, subject)
        return self

    def _at(self, at_s: float, kind: str, subject: str) -> None:
        self.n += 1
        heapq.heappush(self.events, (at_s, self.n, kind, subject))

    def _ask(self, now_s: float, name: str) -> None:
        n_prompt, n_output, now_ms = N_PROMPT[name], self.rng.randrange(24, 57), int(now_s * 1000)
        self.prefills = [each for each in self.prefills if each[0] > now_s]
        own = sum(N_PROMPT[name] for _, who in self.prefills if who == name)
        terms = self.gate.terms(name, INTERACTIVE, n_prompt, 40, slots=self.slots, n_prefill=own)
        flow = Flow(0, name, name, name)
        self.n += 1
        request = Request(f"q{self.n}", flow, now_ms, n_prompt, 40, slot_ms=terms.slot_ms)
        ahead_ms = self.queue.flows.ahead_ms(flow)
        most_own_ms = terms.most_own_ms if self.guarded else -1
        verdict, bound = "late", list[Binding]()
        if not terms.is_hopeless:
            verdict, bound = self.queue.admit(
                request, now_ms, ["r"], most_ahead_ms=terms.most_ahead_ms, most_own_ms=most_own_ms
            )
        record = self.gate.record(name, INTERACTIVE)
        if verdict == "late":
            record.late(terms, ahead_ms, self.slots)
            self.refused[name] += 1
            self._at(now_s + AGAIN_S, "ask", name)
            return
        record.let_in(terms)
        total_s = self.gate.total_s(terms, ahead_ms, self.slots) if verdict == "queued" else 0.0
        self.asked[request.id] = (name, total_s, now_s, n_output)
        self._begin(now_s, [request_id for request_id, _ in bound])

    def _begin(self, now_s: float, request_ids: list[str]) -> None:
        """They have slots; their prompts are computed after those before them."""
        for request_id in request_ids:
            name, total_s, arrived_s, n_output = self.asked[request_id]
            before_s = max(self.prefill_free_s - now_s, 0.0)
            self.prefill_free_s = now_s + before_s + N_PROMPT[name] / PREFILL_TOKENS_PER_S
            first_at_s = self.prefill_free_s + STEP_S
            self.asked[request_id] = (name, total_s, first_at_s, n_output)
            self.prefills.append((self.prefill_free_s, name))
            self.first_s[name].append(first_at_s - arrived_s)
            if total_s:
                self.gate.record(name, INTERACTIVE).waited(total_s, first_at_s - arrived_s)
            else:
                n_before = int(before_s * PREFILL_TOKENS_PER_S)
                self.gate.pace.saw_first(n_before + N_PROMPT[name], first_at_s - now_s)
            self._at(first_at_s + n_output * STEP_S, "end", request_id)

    def _end(self, now_s: float, request_id: str) -> None:
        name, _, _, n_output = self.asked.pop(request_id)
        self.gate.pace.saw_answer(N_PROMPT[name], n_output, n_output * STEP_S)
        self.served[name] += n_output
        bound = self.queue.settle(
            request_id, int(now_s * 1000), n_prompt=N_PROMPT[name], n_cached=0, n_output=n_output
        )
        self._begin(now_s, [each for each, _ in bound])
        self._at(now_s, "ask", name)


def test_a_flood_takes_nothing_of_a_tenants_share() -> None:
    alone = Flood({VICTIM: 16}, slots=8).run()
    flooded = Flood({VICTIM: 16, OTHER: 60}, slots=16).run()
    assert flooded.refused[OTHER] > 500, "it is a flood"
    assert flooded.served[VICTIM] == pytest.approx(alone.served[VICTIM], rel=0.1)


def test_refused_because_of_others_a_tenant_would_lose_its_share() -> None:
    """Without the rule: the model above shows what it is there for."""
    alone = Flood({VICTIM: 16}, slots=8).run()
    unguarded = Flood({VICTIM: 16, OTHER: 60}, slots=16, guarded=False).run()
    assert unguarded.served[VICTIM] < 0.8 * alone.served[VICTIM]
