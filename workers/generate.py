"""From a claimed request to its end: count the prompt, check what may go on, run the engine, hand each step on.

Called by serve.py on the engine loop, once per claim. Never logs text.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from workers.adapters import Adapters, AdapterUnavailable
from workers.allowance import Allowance
from workers.attempt import Attempt, Run, Stop, sampling_of
from workers.config import FrontConfig
from workers.contract import Ask, ClaimVerdict, FinishReason, RequestEnvelope, WireError, encode_ask
from workers.ends import Ends, blockers_of, cannot_continue, internal
from workers.engine.base import (
    BY_ESTIMATE,
    UNKNOWN_ID,
    Delta,
    Engine,
    EngineDead,
    EngineFailed,
    EngineInputError,
    EngineRequest,
)
from workers.journal import JournalBroken, inherit
from workers.output import Output
from workers.prompt import Prompts
from workers.redis_client import Client

log = logging.getLogger(__name__)

_CANNOT_COUNT: Final = WireError(
    501,
    "count_unavailable",
    "this model is answered by an endpoint elsewhere, which counts prompts only when it answers them: "
    "send the message and read its usage",
)
# Before the first measurement: what the slowest engine we run (a 135M model on a busy CPU) certainly reaches.
_PREFILL_PRIOR_PER_S: Final = 100.0


class Generations:
    """All generations of one replica."""

    def __init__(
        self,
        config: FrontConfig,
        engine: Engine,
        client: Client,
        ends: Ends,
        on_engine_dead: Callable[[EngineDead], None],
        now_ms: Callable[[], int],
    ) -> None:
        self.prompts = Prompts(engine, config.tuning.inline_prompt_bytes)
        self.n_tokens_total = 0
        # For the watchdog: prompt tokens whose first answer token is awaited, and the slowest recent prefill.
        self.n_prefill_tokens = 0
        self.prefill_tokens_per_s = _PREFILL_PRIOR_PER_S
        self._config = config
        self._keys = config.keys
        self._engine = engine
        self._client = client
        self._ends = ends
        self._on_engine_dead = on_engine_dead
        self._now_ms = now_ms
        self.adapters = Adapters(config, engine, client)

    async def serve(self, run: Run, attempt: Attempt) -> bool:
        """Serve one claim to its end. True: the attempt must be claimed again."""
        claim, envelope = run.claim, run.envelope
        if claim.verdict is ClaimVerdict.CANCELLED and claim.n_done == 0:
            return await self._ends.end(run, attempt, FinishReason.ABORT)  # before any work: nothing to bill
        try:
            # A cancelled claim comes without journal: nothing will be continued, but what was made is billed.
            prior = inherit(claim.entries, claim.n_done).token_ids if claim.verdict is ClaimVerdict.OK else []
            prompt = await self.prompts.token_ids(envelope)
        except EngineInputError as error:
            return await self._ends.refuse(
                run, attempt, WireError(400, error.code, error.message, error.param)
            )
        except JournalBroken as error:
            log.error("journal broken: %s", error, extra=attempt.ids)
            return await self._ends.refuse(
                run, attempt, internal("the answer so far was lost; send it again")
            )
        run.n_prompt = len(prompt)
        if claim.verdict is ClaimVerdict.CANCELLED or attempt.stop is Stop.CANCELLED:
            run.n_prompt = len(prompt) if claim.n_done else 0
            return await self._ends.end(run, attempt, FinishReason.ABORT)
        if self._config.spec.upstream is not None:
            if not envelope.sampling.max_tokens:
                return await self._ends.refuse(run, attempt, _CANNOT_COUNT)
            run.is_foreign, run.counted_by = True, BY_ESTIMATE  # until the endpoint says more
        elif UNKNOWN_ID in prior:
            run.is_foreign = True
        blockers = blockers_of(run, attempt)
        if blockers:
            return await self._ends.refuse(run, attempt, cannot_continue(run, blockers))
        run.set_limit(self._engine.max_model_len)
        if run.limit <= claim.n_done:
            return await self._ends.end(run, attempt, run.reason_at_limit)
        attempt.allowance = self._allowance(run) if run.n_paid < run.limit else None
        return await self._generate(run, attempt, prompt, prior)

    async def _generate(self, run: Run, attempt: Attempt, prompt: list[int], prior: list[int]) -> bool:
        envelope = run.envelope
        request = EngineRequest(
            id=f"{attempt.request_id}.{attempt.epoch}.{id(run):x}",
            prompt_token_ids=prompt,
            sampling=sampling_of(envelope, run.limit),
            prior_token_ids=prior,
            priority=envelope.priority,
            cache_salt=envelope.cache_salt or None,
            min_delta_tokens=self._coalesce(envelope) if attempt.allowance is None else 1,
            single_tokens=attempt.allowance is not None,
            endpoint=envelope.endpoint,
            body=envelope.payload,
            adapter=envelope.adapter,
        )
        attempt.generating = attempt.stop is None
        run.n_prefill = len(prompt) + len(prior)
        run.prefill_at_s = time.monotonic()
        self.n_prefill_tokens += run.n_prefill
        try:
            if attempt.generating:
                if not await self._paid(run, attempt.allowance, run.n_completion + 1):
                    run.n_prompt = run.n_prompt if run.n_completion else 0  # never served, not billed
                elif envelope.adapter:
                    async with self.adapters.use(envelope.adapter, envelope.deployment):
                        run.prefill_at_s = time.monotonic()
                        await self._produce(run, attempt, request)
                else:
                    await self._produce(run, attempt, request)
        except asyncio.CancelledError:
            if attempt.stop is None:
                raise  # the pool's: stopping or revoked
            attempt.task.uncancel()
        except EngineInputError as error:
            attempt.generating = False
            return await self._ends.refuse(
                run, attempt, WireError(400, error.code, error.message, error.param)
            )
        except EngineFailed as error:
            attempt.generating = False
            log.warning("the engine failed it", extra={**attempt.ids, "code": error.code})
            return await self._ends.refuse(run, attempt, WireError(error.status, error.code, error.message))
        except AdapterUnavailable as error:
            attempt.generating = False
            return await self._ends.refuse(
                run, attempt, WireError(503, "adapter_unavailable", str(error), "model")
            )
        except EngineDead as error:
            attempt.stop = attempt.stop or Stop.ENGINE_DEAD
            self._on_engine_dead(error)
        finally:
            attempt.generating = False
            self.n_prefill_tokens -= run.n_prefill
        match attempt.stop:
            case None:
                return await self._ends.end(run, attempt, run.finish or FinishReason.ERROR)
            case Stop.CANCELLED:
                return await self._ends.end(run, attempt, FinishReason.ABORT)
            case Stop.RESTART:
                return await self._ends.release(attempt, run.output)
            case _:
                return False

    async def _produce(self, run: Run, attempt: Attempt, request: EngineRequest) -> None:
        async with aclosing(self._engine.generate(request)) as deltas:
            await self._publish(run, deltas, attempt.allowance)

    async def _publish(
        self, run: Run, deltas: AsyncGenerator[Delta, None], allowance: Allowance | None
    ) -> None:
        """Hand each step to the publisher; a plain answer gathers `coalesce_tokens`, or a while, first.

        Where money is short a token is handed on once it is paid for. The engine goes on meanwhile; what it makes
        beyond the money is dropped with it, unseen and unbilled.
        """
        output = run.output
        coalesce, patience_s = self._coalesce(run.envelope), self._config.tuning.coalesce_s
        flushed_at_s = time.monotonic()
        held: list[Delta] = []
        n_held = 0
        delta: Delta
        try:
            async for delta in deltas:
                n = len(delta.token_ids)
                if n:
                    if allowance is not None:
                        if run.n_completion + n > allowance.allowed:
                            _release_to(output, held)
                            n_held = 0
                            if not await self._paid(run, allowance, run.n_completion + n):
                                return
                        allowance.reached(run.n_completion + n)
                    self.n_tokens_total += n
                    if not run.n_new:
                        self._first_token(run)
                    run.n_new += n
                if delta.n_cached_prompt_tokens:
                    run.n_cached = delta.n_cached_prompt_tokens
                held.append(delta)
                n_held += n
                if delta.counted is not None:
                    run.count(delta.counted, len(run.envelope.payload))
                if delta.finish is not None:
                    run.finish = run.reason_at_limit if delta.finish is FinishReason.LENGTH else delta.finish
                    return  # the end leaves with the last tokens
                if n_held >= coalesce or time.monotonic() - flushed_at_s > patience_s:
                    _release_to(output, held)
                    n_held = 0
                    flushed_at_s = time.monotonic()
                    if output.lane.full:
                        await output.lane.room()
        finally:
            _release_to(output, held)  # an interrupted answer journals what it made, too

    def _allowance(self, run: Run) -> Allowance:
        """What the attempt may produce, and how it asks for more."""
        envelope, output = run.envelope, run.output
        n_prompt = max(0, run.n_prompt - envelope.n_carried_prompt)

        def ask(n_granted: int, empty: bool) -> None:
            frame = encode_ask(output.stream, Ask(n_granted, n_prompt, empty))
            self._client.fire("PUBLISH", self._keys.gateway_channel(output.lane.gateway), frame)

        # A gateway that says nothing of its rates would not answer.
        patience_s = self._config.tuning.budget_patience_s if envelope.n_prompt_held else 0.0
        return Allowance(
            granted=run.n_granted,
            allowed=run.n_paid,
            n_done=run.claim.n_done,
            n_carried=envelope.n_carried,
            ask=ask,
            patience_s=patience_s,
        )

    @staticmethod
    async def _paid(run: Run, allowance: Allowance | None, n_tokens: int) -> bool:
        """Whether the money pays for so many tokens, now or soon. False: the attempt ends here."""
        if allowance is None or n_tokens <= allowance.allowed or await allowance.room_for(n_tokens):
            return True
        run.finish = FinishReason.BUDGET
        return False

    def _coalesce(self, envelope: RequestEnvelope) -> int:
        """Tokens per flush: each step of a stream is seen by somebody, a plain answer only at its end."""
        return 1 if envelope.stream else self._config.tuning.coalesce_tokens

    def _first_token(self, run: Run) -> None:
        run.first_token_ms = max(0, self._now_ms() - run.envelope.admitted_at_ms)
        rate = (run.n_prefill - run.n_cached) / max(time.monotonic() - run.prefill_at_s, 1e-3)
        if run.n_prefill >= 64:  # shorter ones measure the step, not the prefill
            self.prefill_tokens_per_s += (0.5 if rate < self.prefill_tokens_per_s else 0.1) * (
                rate - self.prefill_tokens_per_s
            )
        self.n_prefill_tokens -= run.n_prefill
        run.n_prefill = 0


def _release_to(output: Output, held: list[Delta]) -> None:
    for delta in held:
        output.add(delta.token_ids, delta.text, _wire_logprobs(delta))
    held.clear()


def _wire_logprobs(delta: Delta) -> list[object] | None:
    """Per token `[text, logprob, [[text, logprob], …]]`: what the gateway renders."""
    if delta.logprobs is None:
        return None
    return [[t.text, t.logprob, [[text, logprob] for _, text, logprob in t.top]] for t in delta.logprobs]
