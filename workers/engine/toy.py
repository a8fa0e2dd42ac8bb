"""A deterministic engine with real continuous batching and no model: for tests, benchmarks and the
simulator's check.

Sequences wait, are admitted within a per-step token budget, prefill in chunks, hold KV blocks, are preempted
and recomputed when blocks run out, as in vLLM; only the "model" is a hash of the prompt and the position. So
the same request gives the same text on every attempt, and a resumed one continues exactly. One task steps
everything on the loop; a token costs about a microsecond, so measurements of the chain around it are not
measurements of it.

It has no core process that a drill could hurt. With `toy_faults` two signals to the front stand for that:
SIGNAL_DIE fails every sequence as a lost core does, SIGNAL_HANG stops the stepping.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import signal
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from workers.contract import FinishReason
from workers.engine import toy_text
from workers.engine.base import (
    AdapterRefused,
    Delta,
    EngineDead,
    EngineInputError,
    EngineProfile,
    EngineRequest,
    EngineStats,
    TokenLogprob,
    context_exceeded,
)
from workers.engine.steps import Steps, StepWindow
from workers.engine.toy_calls import calls_of
from workers.engine.toy_memory import ToyMemory
from workers.engine.toy_sequence import Sequence, Spelled

# Real-time signals: Celery has handlers of its own for the ordinary ones.
SIGNAL_DIE = signal.SIGRTMIN + 1
SIGNAL_HANG = signal.SIGRTMIN + 2
KV_BYTES_PER_TOKEN = 1024  # pretended; with it `kv_cache_bytes` means what it means for a small model
_MAX_STRIDE = 32  # unpaced steps in one go: so many tokens of everybody is the longest an arrival waits


class ToyEngine:
    """See the module. `profile` gives slots, KV size, token budget and pace; no model directory is needed."""

    def __init__(self, profile: EngineProfile, now_s: Callable[[], float] = time.monotonic) -> None:
        self.profile = profile
        self.max_model_len = profile.max_model_len
        self._now_s = now_s
        self._block = profile.block_size or 16
        self.n_blocks = max(1, profile.kv_cache_bytes // (KV_BYTES_PER_TOKEN * self._block))
        self.kv_tokens = self.n_blocks * self._block
        self._n_free = self.n_blocks
        self._budget = profile.max_num_batched_tokens or max(2048, profile.max_num_seqs)
        self._portion = profile.long_prefill_token_threshold or self._budget  # of one prompt in a step
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._running: list[Sequence] = []
        self._n_arrived = 0
        self._task: asyncio.Task[None] | None = None
        self._work = asyncio.Event()
        self._dead: str | None = None
        self._hung = False
        self._n_steps = self._n_preemptions = 0
        self._n_strided = 0  # steps since the last call of `step`
        self._noticed = False  # the last step told somebody something
        self._last_step_at_s = now_s()
        self._step_ms = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        if profile.toy_faults and threading.current_thread() is threading.main_thread():
            signal.signal(SIGNAL_DIE, self._on_signal)
            signal.signal(SIGNAL_HANG, self._on_signal)
        self._seated = False  # the step under way has taken in who waited when it began
        self._n_left = 0  # who waited all the same, for want of a slot or of blocks
        self._steps = StepWindow()
        self._memory: ToyMemory | None = None
        if profile.toy_weights_bytes:
            self._memory = ToyMemory(profile.toy_weights_bytes, profile.kv_cache_bytes)
        self._asleep = False
        self._adapters: dict[str, int] = {}  # adapter -> what it adds to a prompt's seed

    # -- the Engine interface

    def tokenize(self, text: str) -> list[int]:
        return toy_text.tokenize(text, faults=self.profile.toy_faults)

    def tokenize_chat(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        return toy_text.tokenize_chat(messages, tools, faults=self.profile.toy_faults)

    async def start(self) -> None:
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._last_step_at_s = self._now_s()
            self._task = asyncio.create_task(self._run(), name="toy-engine")

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._die("stopped")

    async def check_health(self) -> None:
        if self._dead is not None:
            raise EngineDead(f"toy engine: {self._dead}")

    @property
    def sleep_level(self) -> int:
        return self.profile.sleep_level

    async def sleep(self) -> None:
        """Its memory is the kernel's again; what prefix its KV cache held is not pretended to be known either."""
        await self.check_health()
        if not self._asleep and self._memory is not None:
            await asyncio.to_thread(self._memory.sleep, self.profile.sleep_level)
        self._asleep = True

    async def wake(self) -> None:
        await self.check_health()
        if self._asleep and self._memory is not None and not await asyncio.to_thread(self._memory.wake):
            self._die("woke with other weights than it slept with")
            await self.check_health()
        self._asleep = False

    async def load_adapter(self, adapter: str, directory: Path) -> None:
        """Its weights' checksum is all that matters of it: equal weights give equal answers."""
        await self.check_health()
        if adapter in self._adapters:
            return
        if len(self._adapters) >= self.profile.max_loras:
            raise AdapterRefused(f"{self.profile.max_loras} adapters are loaded: that is max_loras")
        try:
            weights = await asyncio.to_thread((directory / "adapter_model.safetensors").read_bytes)
        except OSError as error:
            raise AdapterRefused(f"adapter_model.safetensors: {error.strerror}") from None
        self._adapters[adapter] = zlib.crc32(weights) or 1

    async def unload_adapter(self, adapter: str) -> None:
        await self.check_health()
        self._adapters.pop(adapter, None)

    def stats(self) -> EngineStats:
        return EngineStats(
            n_running=len(self._running),
            n_waiting=len(self._waiting),
            kv_used_ratio=1 - self._n_free / self.n_blocks,
            n_steps=self._n_steps,
            last_step_at_s=self._last_step_at_s,
            step_ms=self._step_ms,
            n_preemptions=self._n_preemptions,
        )

    def take_steps(self) -> Steps:
        return self._steps.take()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Delta, None]:
        await self.check_health()
        if self._asleep:
            raise EngineDead("toy engine: asked while asleep")
        seq = self._admit(request)
        if self.profile.toy_fail_every and self._n_arrived % self.profile.toy_fail_every == 0:
            self._abort(seq)
            raise RuntimeError("toy engine: told to fail")
        loop = asyncio.get_running_loop()
        try:
            while True:
                if seq.n_out < seq.n_due and seq.finish is None:
                    seq.waiter = loop.create_future()
                    await seq.waiter
                portions = seq.take_singly() if request.single_tokens else [seq.take()]
                seq.n_due = seq.n_out + request.min_delta_tokens
                finish = seq.finish  # the sequence goes on while our consumer holds the delta
                if finish is FinishReason.ERROR:
                    raise EngineDead(f"toy engine: {self._dead}")
                for ids, text in portions[:-1]:
                    yield _delta(request, ids, text, None)
                yield _delta(request, *portions[-1], finish)
                if finish is not None:
                    return
        finally:
            if seq.finish is None:
                self._abort(seq)

    # -- admission and stepping

    def _admit(self, request: EngineRequest) -> Sequence:
        n_prompt = len(request.prompt_token_ids)
        n_context = min(self.max_model_len, self.n_blocks * self._block)
        if not n_prompt:
            raise EngineInputError("empty_prompt", "messages", "the prompt has no tokens; send some text")
        if request.sampling.json_schema is not None and request.sampling.calls is None:
            raise EngineInputError(
                "unsupported_parameter",
                "response_format",
                "response_format is not supported by the toy engine that serves this model: leave it out",
            )
        if n_prompt >= n_context:
            raise context_exceeded(n_prompt, n_context)
        self._n_arrived += 1
        key = (request.priority, self._n_arrived)
        adapter_seed = self._adapters[request.adapter] if request.adapter else 0
        seq = Sequence(request, key, n_context - n_prompt, adapter_seed)
        rule = request.sampling.calls
        if rule is not None and (text := calls_of(rule, request.body, seq.seed)) is not None:
            seq = Spelled(request, key, n_context - n_prompt, adapter_seed, text)
        seq.replay()
        if seq.finish is None:
            if not self._running and not self._waiting:
                self._last_step_at_s = self._now_s()
            heapq.heappush(self._waiting, (seq.key, seq))
            self._work.set()
        return seq

    async def _run(self) -> None:
        due_s = self._now_s()
        while True:
            if not self._running and not self._waiting:
                self._work.clear()
                await self._work.wait()
                due_s = self._now_s()  # the first step takes its time like any other
            pace_s = self._begin_s()
            if pace_s:
                now_s = self._now_s()
                due_s = max(due_s + pace_s, now_s)  # lateness is not made up for, as on an accelerator
                await asyncio.sleep(due_s - now_s)
            else:
                await asyncio.sleep(0)
            if self._hung:
                await asyncio.Event().wait()
            if pace_s:
                self.step()
            else:
                self._steps_unnoticed()

    def _steps_unnoticed(self) -> None:
        """Without a pace: steps up to and with the next one that somebody notices, in one go."""
        for _ in range(_MAX_STRIDE):
            self._noticed = False
            self._stride()
            self.step()
            if self._noticed or not self._running:
                return

    def _begin_s(self) -> float:
        """Begins a step and says how long it takes, as on an accelerator: a base, every sequence's share, and the
        prompt tokens that it computes. With a pace, who waits takes a seat now: who comes while the step is under way
        waits for the next, as in any engine that schedules before it computes. 0: no pace.
        """
        profile = self.profile
        if not (profile.toy_step_ms or profile.toy_seq_ms or profile.toy_prefill_ms):
            return 0.0
        n_due = sum(min(seq.n_prompt + seq.n_out - seq.n_computed, self._portion) for seq in self._running)
        if self._waiting:
            n_due += self._seat(self._budget - n_due)
        self._seated, self._n_left = True, len(self._waiting)
        n_running = len(self._running)
        n_prompt = max(min(n_due, self._budget) - n_running, 0)  # all but each sequence's next token
        return (
            profile.toy_step_ms + profile.toy_seq_ms * n_running + profile.toy_prefill_ms * n_prompt / 1000
        ) / 1000

    def _seat(self, budget: int) -> int:
        """Waiting sequences into free slots while their context fits the free blocks; their prompts are computed by the
        step. Returns their tokens.
        """
        n_due = 0
        while self._waiting and n_due < budget and len(self._running) < self.profile.max_num_seqs:
            seq = self._waiting[0][1]
            n_context = seq.n_prompt + seq.n_out
            if -(-n_context // self._block) > self._n_free:
                break
            heapq.heappop(self._waiting)
            if self.profile.toy_faults:
                self._misbehave(seq)
            self._take(seq, n_context)
            self._running.append(seq)
            seq.n_computed = 0  # a preempted one is computed from the start again
            n_due += min(n_context, self._portion)
        return n_due

    def _stride(self) -> None:
        """Without a pace: take the steps up to the next one that somebody would notice, in one go.

        Noticed are a token that is awaited, an end, an admission, a preemption. Each of these happens in `step`.
        """
        running = self._running
        if self._waiting or not 0 < len(running) <= self._budget:
            return
        n = _MAX_STRIDE
        for seq in running:
            n = min(n, min(seq.n_due, seq.n_end) - seq.n_out - 1)
            if n <= 0 or not seq.countable or seq.n_computed != seq.n_prompt + seq.n_out - 1:
                return
        n_blocks = sum(-(-(seq.n_computed + n) // self._block) - seq.n_blocks for seq in running)
        if n_blocks > self._n_free:
            return
        for seq in running:
            seq.n_out += n
            seq.n_computed += n
            if seq.n_computed > seq.n_room:
                self._take(seq, seq.n_computed)
        self._n_strided = n

    def step(self) -> None:
        """One engine step, running sequences first, then waiting ones, as far as token budget, slots and
        blocks go.

        A sequence whose whole context is computed in this step gets its next token.
        """
        budget, running, ended = self._budget, self._running, False
        n_running = len(running)
        at = 0
        while at < len(running) and budget > 0:
            seq = running[at]
            n_context = seq.n_prompt + seq.n_out
            target = min(n_context, seq.n_computed + min(budget, self._portion))
            if target > seq.n_room and not self._grow(seq, target):
                break  # it was the last one and gave way itself
            budget -= target - seq.n_computed
            seq.n_computed = target
            if target == n_context:
                seq.advance()
                ended = ended or seq.finish is not None
                if seq.n_out >= seq.n_due or seq.finish is not None:
                    seq.wake()
                    self._noticed = True
            at += 1
        if ended:
            for seq in running:
                if seq.finish is not None:
                    self._free(seq)
            self._running = [seq for seq in running if seq.finish is None]
        if not self._seated:
            self._admit_waiting(budget)
            self._n_left = len(self._waiting)
        self._seated = False
        now_s = self._now_s()
        n_steps, self._n_strided = self._n_strided + 1, 0
        step_ms = (now_s - self._last_step_at_s) * 1000 / n_steps
        self._n_steps += n_steps
        self._step_ms += 0.2 * (step_ms - self._step_ms)
        self._steps.add(step_ms, n_running, self._n_left, 1 - self._n_free / self.n_blocks, n_steps)
        self._last_step_at_s = now_s

    def _admit_waiting(self, budget: int) -> None:
        """Without a pace, at a step's end: waiting sequences into free slots while their context fits the free blocks;
        their prefill starts.
        """
        while self._waiting and budget > 0 and len(self._running) < self.profile.max_num_seqs:
            seq = self._waiting[0][1]
            n_context = seq.n_prompt + seq.n_out
            if -(-n_context // self._block) > self._n_free:
                break
            heapq.heappop(self._waiting)
            if self.profile.toy_faults:
                self._misbehave(seq)
            self._take(seq, n_context)
            self._running.append(seq)
            seq.n_computed = min(
                n_context, budget, self._portion
            )  # a preempted one is computed from the start again
            budget -= seq.n_computed
            if seq.n_computed == n_context:
                seq.advance()
                if seq.n_out >= seq.n_due or seq.finish is not None:
                    seq.wake()
                    self._noticed = True
                if seq.finish is not None:
                    self._running.pop()
                    self._free(seq)

    def _grow(self, seq: Sequence, n_tokens: int) -> bool:
        """Room for `n_tokens`, at the cost of the sequences admitted last.

        False: `seq` itself had to give way.
        """
        while -(-n_tokens // self._block) - seq.n_blocks > self._n_free:
            victim = self._running.pop()
            self._free(victim)
            heapq.heappush(self._waiting, (victim.key, victim))
            self._n_preemptions += 1
            if victim is seq:
                return False
        self._take(seq, n_tokens)
        return True

    def _take(self, seq: Sequence, n_tokens: int) -> None:
        n_blocks = -(-n_tokens // self._block)
        self._n_free -= n_blocks - seq.n_blocks
        seq.n_blocks, seq.n_room = n_blocks, n_blocks * self._block

    def _free(self, seq: Sequence) -> None:
        self._n_free += seq.n_blocks
        seq.n_blocks = seq.n_room = 0

    def _abort(self, seq: Sequence) -> None:
        seq.finish = FinishReason.ABORT
        self._free(seq)
        if seq in self._running:
            self._running.remove(seq)
        else:
            self._waiting = [entry for entry in self._waiting if entry[1] is not seq]
            heapq.heapify(self._waiting)

    def _die(self, reason: str) -> None:
        """Every sequence fails with EngineDead, now and later."""
        self._dead = self._dead or reason
        for seq in [*self._running, *(entry[1] for entry in self._waiting)]:
            seq.finish = FinishReason.ERROR
            seq.wake()
        self._running, self._waiting, self._n_free = [], [], self.n_blocks

    def _on_signal(self, signum: int, _frame: object) -> None:
        """On the main thread, wherever it is; the loop turns on another."""
        if signum == SIGNAL_HANG:
            self._hung = True
        elif self._loop is not None:
            self._loop.call_soon_threadsafe(self._die, "killed by a signal")

    def _misbehave(self, seq: Sequence) -> None:
        if toy_text.DIE in seq.request.prompt_token_ids:
            os._exit(70)
        if toy_text.HANG in seq.request.prompt_token_ids:
            self._hung = True


def _delta(request: EngineRequest, ids: list[int], text: str, finish: FinishReason | None) -> Delta:
    if request.sampling.logprobs is None:
        return Delta(ids, text, finish)
    return Delta(ids, text, finish, 0, _logprobs(ids, request.sampling.logprobs))


def _logprobs(ids: list[int], n_top: int) -> tuple[TokenLogprob, ...]:
    """Made up, but well-formed: the chosen token first, alternatives below it."""
    return tuple(
        TokenLogprob(
            token,
            toy_text.PIECES[token],
            -0.1,
            tuple(
                (t, toy_text.PIECES[t], -0.1 - k) for k, t in enumerate(toy_text.alternatives(token, n_top))
            ),
        )
        for token in ids
    )
