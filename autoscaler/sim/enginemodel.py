"""One simulated engine: continuous batching with chunked prefill, KV limits, prefix cache and preemption.

Follows vLLM's scheduler: running sequences decode first, what is left of the step's token budget goes to prompts in
order of arrival; a sequence that finds no KV preempts the one admitted last, which starts over later (recompute). Steps
whose batch does not change are taken in one stride (StepModel.decode_s), so a simulated request costs a handful of
events however long its answer is. Knows nothing of policies; world.py drives it on the kernel's clock.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from autoscaler.sim.histogram import Histogram
from autoscaler.sim.job import NEVER, Job
from autoscaler.sim.prefixcache import BLOCK, PrefixCache
from controlplane.policy.perfmodel import StepModel, pairs

INF: Final = math.inf


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What of an engine profile matters here. `kv_tokens` bounds prompt and answer of all running requests together."""

    step: StepModel
    kv_tokens: int
    max_seqs: int = 256
    max_batched_tokens: int = 8192
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        if min(self.kv_tokens, self.max_seqs, self.max_batched_tokens) < 1:
            raise ValueError("kv_tokens, max_seqs and max_batched_tokens must each be at least 1")


class Engine:
    """The batch of one replica. `next_s` is the end of the step or stride under way, infinite when idle.

    `renew` is asked at a boundary where a request has made all tokens it may make (`n_stop`) but not its last: it moves
    `n_stop` on, or leaves it and the request is put aside (it leaves the batch and its KV; its next turn recomputes).
    """

    __slots__ = (
        "_chunks",
        "_heap",
        "_n_seats",
        "_order",
        "_prefilling",
        "_renew",
        "_seq_tokens",
        "_started_s",
        "_step_no",
        "_stride",
        "cache",
        "gaps",
        "kv_used",
        "n_context",
        "n_decoding",
        "n_hit_tokens",
        "n_preempted",
        "n_prefilled_tokens",
        "n_prompt_tokens",
        "n_running",
        "next_s",
        "spec",
        "version",
        "waiting",
    )

    def __init__(
        self,
        spec: EngineSpec,
        gaps: Histogram | None = None,
        renew: Callable[[Job], None] = lambda job: None,
    ) -> None:
        self.spec = spec
        self._renew = renew
        self.cache = PrefixCache() if spec.prefix_caching else None
        self.gaps = gaps
        self.waiting: deque[Job] = deque()
        self.next_s = INF
        self.version = 0
        # Tokens: `kv_used` of running sequences outside shared blocks; `n_context` what decoding reads each step.
        self.kv_used = self.n_context = self.n_decoding = self.n_running = 0
        self.n_hit_tokens = self.n_prompt_tokens = self.n_prefilled_tokens = self.n_preempted = 0
        self._step_no = 0
        self._prefilling: deque[Job] = deque()
        self._heap: list[
            tuple[int, int, Job]
        ] = []  # decoding: (last step, seat, job); stale where the seat differs
        self._order: list[tuple[int, Job]] = []  # in order of admission; stale where the seat differs
        self._n_seats = 0
        self._started_s = 0.0
        self._stride = 0  # steps under way; 1 with chunks
        self._chunks: list[tuple[Job, int]] = []

    # -- what the world asks

    @property
    def n_held(self) -> int:
        """Requests here, running or waiting."""
        return self.n_running + len(self.waiting)

    @property
    def kv_ratio(self) -> float:
        pinned = self.cache.n_pinned * BLOCK if self.cache is not None else 0
        return (self.kv_used + pinned) / self.spec.kv_tokens

    @property
    def n_prefill_waiting(self) -> int:
        """Prompt tokens that have yet to be computed for requests here."""
        return sum(job.n_prefill_left for job in self._prefilling) + sum(
            job.n_prompt + job.n_done for job in self.waiting
        )

    def submit(self, job: Job, now_s: float) -> bool:
        """Take a request; whether `next_s` changed. ValueError for one that can never fit."""
        if job.n_prompt + job.n_output > self.spec.kv_tokens:
            raise ValueError(
                f"job {job.id}: {job.n_prompt} + {job.n_output} tokens exceed {self.spec.kv_tokens}"
            )
        self.waiting.append(job)
        if self.next_s == INF or now_s == self._started_s:  # idle, or a step that has only just begun
            self._begin(now_s)
            return True
        if self._stride > 1:  # it joins at the next step's boundary
            n_over = (
                self.spec.step.decode_steps_within(now_s - self._started_s, self.n_decoding, self.n_context)
                + 1
            )
            if n_over < self._stride:
                self._stride = n_over
                self.next_s = self._started_s + self.spec.step.decode_s(
                    n_over, self.n_decoding, self.n_context
                )
                self.next_s = max(self.next_s, now_s)
                self.version += 1
                return True
        return False

    def boundary(self, now_s: float) -> list[Job]:
        """The step or stride ends: returns what finished with it or was put aside, and begins the next."""
        n_steps, n_decoding = self._stride, self.n_decoding
        if n_decoding:
            self._step_no += n_steps
            self.n_context += n_steps * n_decoding
            self.kv_used += n_steps * n_decoding
            if self.gaps is not None:
                self.gaps.add((now_s - self._started_s) / n_steps, n_steps * n_decoding)
        finished: list[Job] = []
        heap, step_no = self._heap, self._step_no
        while heap and heap[0][0] <= step_no:
            _, seat, job = heapq.heappop(heap)
            if job.seat == seat:
                job.n_done = job.n_stop
                if self._goes_on(job):
                    continue
                self.n_decoding -= 1
                self.n_context -= job.n_prompt + job.n_done
                self._leave(job)
                finished.append(job)
        for job, n in self._chunks:
            job.n_prefill_left -= n
            self.n_prefilled_tokens += n
            if job.n_prefill_left == 0:
                self._prefilling.popleft()  # chunks end in order
                self._first_token(job, now_s, finished)
        for job in finished:
            job.ended_s = now_s
        self._begin(now_s)
        return finished

    def cancel_all(self, now_s: float) -> list[Job]:
        """The engine dies: its requests, with what they had produced by then (the journal has it)."""
        if self._stride > 1:
            self._step_no += self.steps_within(now_s)
        gone = [job for seat, job in self._order if job.seat == seat]
        for job in gone:
            job.n_done = self._done(job)
            job.seat = -1
        gone += self.waiting
        self.waiting.clear()
        self._prefilling.clear()
        self._heap.clear()
        self._order.clear()
        self._chunks = []
        if self.cache is not None:
            self.cache.clear()
        self.kv_used = self.n_context = self.n_decoding = self.n_running = self._stride = 0
        self.next_s = INF
        self.version += 1
        return gone

    def running(self) -> list[Job]:
        """Requests in the batch, in order of admission."""
        return [job for seat, job in self._order if job.seat == seat]

    def done_of(self, job: Job) -> int:
        """Tokens a running request had produced by the last boundary."""
        return self._done(job)

    def steps_within(self, now_s: float) -> int:
        """Decode steps taken since that boundary."""
        if self._stride <= 1:
            return 0
        n_over = self.spec.step.decode_steps_within(now_s - self._started_s, self.n_decoding, self.n_context)
        return min(n_over, self._stride)

    # -- one step

    def _begin(self, now_s: float) -> None:
        self.version += 1
        self._started_s = now_s
        self._chunks = []
        if self.waiting:
            self._admit()
        spec, n = self.spec, self.n_decoding
        if n and self._room() < n:
            self._preempt()
            n = self.n_decoding
        if self._prefilling:
            budget = max(spec.max_batched_tokens - n, 1)
            n_prefill, n_pairs = 0, 0.0
            for job in self._prefilling:
                chunk = min(job.n_prefill_left, budget - n_prefill)
                if chunk <= 0:
                    break
                self._chunks.append((job, chunk))
                n_before = job.n_prompt + job.n_done - job.n_prefill_left
                n_pairs += pairs(n_before, chunk)
                n_prefill += chunk
            self._stride = 1
            self.next_s = now_s + spec.step.step_s(n_prefill, n_pairs, n, self.n_context)
        elif n:
            while self._heap[0][2].seat != self._heap[0][1]:
                heapq.heappop(self._heap)
            stride = min(self._heap[0][0] - self._step_no, self._room() // n)
            self._stride = stride
            self.next_s = now_s + spec.step.decode_s(stride, n, self.n_context)
        else:
            self._stride = 0
            self.next_s = INF

    def _room(self) -> int:
        """Tokens of KV that running sequences may still take, idle shared blocks given up."""
        pinned = self.cache.n_pinned * BLOCK if self.cache is not None else 0
        room = self.spec.kv_tokens - self.kv_used - pinned
        if self.cache is not None and self.cache.n_idle * BLOCK > room:
            self.cache.evict(self.cache.n_idle - max(room, 0) // BLOCK)
        return room

    def _admit(self) -> None:
        """From the engine's own queue into the batch, first come first served, as far as KV and seats allow."""
        while self.waiting and self.n_running < self.spec.max_seqs:
            job = self.waiting[0]
            n_need = job.n_prompt + job.n_done
            blocks = job.prefix[: job.n_prompt // BLOCK] if self.cache is not None else ()
            if blocks:
                assert self.cache is not None
                n_own = n_need - len(blocks) * BLOCK
                n_take = n_own + self.cache.n_new_pins(blocks) * BLOCK
            else:
                n_own = n_take = n_need
            if n_take + self.n_running + 1 > self._room():  # a step more for everybody
                return
            self.waiting.popleft()
            n_hit = 0
            if blocks:
                assert self.cache is not None
                # The last token is always computed: its logits are the answer's first.
                n_hit = min(self.cache.match(blocks) * BLOCK, n_need - 1)
                self.cache.pin(blocks)
            self._n_seats += 1
            job.seat = self._n_seats
            job.n_cached, job.n_shared = n_hit, len(blocks) * BLOCK
            job.n_prefill_left = n_need - n_hit
            self.kv_used += n_own
            if not job.n_preempted and not job.n_done:  # what it finds of itself is no hit
                self.n_hit_tokens += n_hit
                self.n_prompt_tokens += n_need
            self.n_running += 1
            self._prefilling.append(job)
            self._order.append((job.seat, job))
            if len(self._order) > 2 * self.n_running + 64:
                self._order = [(seat, other) for seat, other in self._order if other.seat == seat]

    def _first_token(self, job: Job, now_s: float, finished: list[Job]) -> None:
        job.n_done += 1
        self.kv_used += 1
        if job.first_s == NEVER:
            job.first_s = now_s
        if not self._goes_on(job):
            self._leave(job)
            finished.append(job)
            return
        self.n_decoding += 1
        self.n_context += job.n_prompt + job.n_done

    def _goes_on(self, job: Job) -> bool:
        """Whether it has tokens to make, `n_done` being exact: then the step of its last one is noted."""
        if job.n_stop <= job.n_done < job.n_output:
            self._renew(job)
        n_left = job.n_stop - job.n_done
        if n_left <= 0:
            return False
        job.finish_step = self._step_no + n_left
        heapq.heappush(self._heap, (job.finish_step, job.seat, job))
        return True

    def _leave(self, job: Job) -> None:
        """Give back what it holds. `n_done` must be what its KV stands for."""
        self.kv_used -= job.n_prompt + job.n_done - job.n_shared
        if job.n_shared:
            assert self.cache is not None
            self.cache.unpin(job.prefix[: job.n_shared // BLOCK])
            job.n_shared = 0
        job.seat = -1
        self.n_running -= 1

    def _preempt(self) -> None:
        """No KV for the next step: the last admitted starts over, until the others have room."""
        while self.n_running > 1 and self._room() < self.n_decoding:
            seat, job = self._order.pop()
            if job.seat != seat:
                continue
            if job.n_prefill_left:
                self._prefilling.remove(job)
            else:
                job.n_done = self._done(job)
                self.n_decoding -= 1
                self.n_context -= job.n_prompt + job.n_done
            self._leave(job)
            job.n_prefill_left = 0
            job.n_preempted += 1
            self.n_preempted += 1
            self.waiting.appendleft(job)

    def _done(self, job: Job) -> int:
        if job.n_prefill_left or job.seat < 0:
            return job.n_done
        return job.n_stop - (job.finish_step - self._step_no)
