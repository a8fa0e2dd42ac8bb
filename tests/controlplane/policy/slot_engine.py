"""A simulated replica for the slots controller: step time a + b·batch with noise, a KV cache, a heartbeat."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from controlplane.policy.slots import SlotMemory, SlotObservation, SlotTarget, next_slots
from workers.engine.steps import StepWindow, gaps_of, quantile_ms

BEAT_S = 0.5


@dataclass
class SimulatedReplica:
    """`load`: requests that want to run at once (the rest waits in our queue). Streams last `stream_s`, so a shrink
    takes effect as they end. KV: each running request holds `kv_each` of the cache; beyond 1 some wait inside.
    """

    base_ms: float
    seq_ms: float
    target: SlotTarget
    slots: int
    load: int = 10_000
    noise: float = 0.0  # relative, of each step
    hiccup: float = 0.0  # share of steps that take five times as long
    kv_each: float = 0.0
    stream_s: float = 4.0
    seed: int = 0
    at_s: float = 0.0
    running: float = 0.0
    last_ms: float = 0.0
    memory: SlotMemory = field(init=False)
    history: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    taken: list[tuple[int, ...]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.memory = SlotMemory(self.slots)
        self.rng = random.Random(self.seed)

    def step_ms(self, batch: float) -> float:
        ms = self.base_ms + self.seq_ms * batch
        ms *= max(1 + self.rng.gauss(0, self.noise), 0.2)
        return ms * (5 if self.rng.random() < self.hiccup else 1)

    @property
    def fits(self) -> float:
        """Of the running ones, those whose context the cache holds."""
        return self.running if not self.kv_each else min(self.running, 1 / self.kv_each)

    @property
    def best(self) -> int:
        """The most slots that keep the promise for 95 % of the steps; cache and ceiling considered."""
        n = self.target.ceiling
        if self.target.itl_ms and self.seq_ms:
            typical_ms = self.target.itl_ms / (1 + 1.645 * self.noise)
            n = min(n, int((typical_ms - self.base_ms) / self.seq_ms))
        if self.kv_each:
            n = min(n, int(0.8 / self.kv_each))
        return max(n, self.target.floor)

    def throughput(self, batch: float) -> float:
        """Tokens a millisecond, without noise."""
        return batch / (self.base_ms + self.seq_ms * batch)

    def beat(self) -> None:
        """Half a second of steps, and what the controller makes of them."""
        window, spent_ms = StepWindow(), 0.0
        while spent_ms < BEAT_S * 1000:
            want = min(self.slots, self.load)
            if self.running > want:  # streams end one by one, nobody is taken off
                self.running = max(want, self.running * max(0.0, 1 - self.last_ms / 1000 / self.stream_s))
            else:
                self.running = want
            fits = self.fits
            self.last_ms = self.step_ms(fits) if fits else BEAT_S * 1000
            spent_ms += self.last_ms
            if fits:
                window.add(self.last_ms, round(fits), round(self.running - fits))
        self.at_s += spent_ms / 1000
        steps = window.take()
        self.taken.append(steps.buckets)
        seen = SlotObservation(
            at_s=self.at_s,
            slots=self.slots,
            used=round(self.running),
            n_queued=max(0, self.load - round(self.running)),
            n_steps=steps.n_steps,
            gaps=gaps_of(steps.buckets),
            engine_queue=steps.n_waiting,
            kv_used_ratio=min(1.0, self.fits * self.kv_each),
        )
        self.slots, self.memory, reason = next_slots(self.memory, seen, self.target)
        self.history.append(self.slots)
        self.reasons.append(reason)

    def run(self, seconds: float) -> list[int]:
        """Slots after each beat of so many seconds."""
        begin, until_s = len(self.history), self.at_s + seconds
        while self.at_s < until_s:
            self.beat()
        return self.history[begin:]

    def p95_ms(self, n_beats: int) -> float:
        """Of the gaps in the last beats."""
        merged: dict[float, int] = {}
        for buckets in self.taken[-n_beats:]:
            for ms, n in gaps_of(buckets):
                merged[ms] = merged.get(ms, 0) + n
        return quantile_ms(sorted(merged.items()), 0.95)
