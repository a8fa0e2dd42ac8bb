"""Serving one attempt of one request: claim, count, generate, publish, end.

The Celery pool calls `Server.serve(request_id, epoch)` on the engine loop. What happens to an attempt:

- the claim is refused (duplicate, stale, done): nothing, the message is acknowledged;
- it runs to an end: the last entry and the usage event leave in one flush, the spool holds the event before
  that;
- the client goes: the generation is cancelled within a step and ends as `abort`, with what was produced;
- the replica stops, or the message is revoked: the lease is released and the cancellation escapes, so that
  Celery puts the message back; the next attempt resumes from the journal;
- another attempt exists, or Redis forgot the lease: it stops without a word;
- the engine dies: it stops without a word and the replica fails; the request is resumed elsewhere.

Never logs text; every log line carries request and replica ids.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Final

from workers.allowance import Allowance
from workers.attempt import STOP_OF, Attempt, Run, Stop, sampling_of, usage_of
from workers.config import FrontConfig
from workers.contract import (
    Ask,
    ClaimVerdict,
    End,
    FinishReason,
    FlushVerdict,
    RequestEnvelope,
    WireError,
    decode_envelope,
    encode,
    encode_ask,
)
from workers.engine.base import (
    Delta,
    Engine,
    EngineDead,
    EngineInputError,
    EngineRequest,
    resume_blockers,
)
from workers.journal import JournalBroken, inherit
from workers.leases import Leases
from workers.output import Output
from workers.prompt import Prompts
from workers.publisher import Publisher
from workers.redis_client import Client
from workers.spool import Spool

log = logging.getLogger(__name__)

_MAX_RESTARTS: Final = 3
_SETTLE_S: Final = 2.0
# Before the first measurement: what the slowest engine we run (a 135M model on a busy CPU) certainly reaches.
_PREFILL_PRIOR_PER_S: Final = 100.0


class Server:
    """All attempts of one replica."""

    def __init__(
        self,
        config: FrontConfig,
        engine: Engine,
        client: Client,
        publisher: Publisher,
        spool: Spool,
        on_engine_dead: Callable[[EngineDead], None],
        now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._config = config
        self._keys = config.keys
        self._engine = engine
        self._client = client
        self._publisher = publisher
        self._leases = Leases(config, client)
        self._spool = spool
        publisher.before_ends = spool.write_out
        self._on_engine_dead = on_engine_dead
        self._now_ms = now_ms
        self._prompts = Prompts(engine, config.tuning.inline_prompt_bytes)
        self._running: dict[str, Attempt] = {}
        self._moves: set[asyncio.Task[None]] = set()
        self.n_requests_total = self.n_tokens_total = 0
        # For the watchdog: prompt tokens whose first answer token is awaited, and the slowest recent prefill.
        self.n_prefill_tokens = 0
        self.prefill_tokens_per_s = _PREFILL_PRIOR_PER_S

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def tokenise_cpu_ms(self) -> float:
        """CPU time spent on counting prompts since the start."""
        return self._prompts.cpu_ns / 1e6

    @property
    def running(self) -> list[str]:
        """Ids of the requests in our hands, from the delivery of the message to the end."""
        return list(self._running)

    def cancel(self, request_id: str) -> None:
        """The client has gone (control channel). Unknown ids are ignored."""
        attempt = self._running.get(request_id)
        if attempt is not None:
            attempt.interrupt(Stop.CANCELLED)

    def moved(self, request_id: str) -> None:
        """Its client reads elsewhere (control channel, or the answer to a flush). Unknown ids are ignored."""
        attempt = self._running.get(request_id)
        if attempt is None or attempt.moved:
            return
        attempt.moved = True
        if attempt.output is not None:  # else once the claim is answered
            self._start_move(attempt, attempt.output)

    def grant(self, request_id: str, n_tokens: int, final: bool) -> None:
        """How many tokens its money pays for by now (control channel). Unknown ids are ignored."""
        attempt = self._running.get(request_id)
        if attempt is not None and attempt.allowance is not None:
            attempt.allowance.answer(n_tokens, final)

    def close(self) -> None:
        self._prompts.close()

    async def serve(self, request_id: str, epoch: int) -> None:
        """See the module. Returns when the message may be acknowledged; CancelledError puts it back."""
        task = asyncio.current_task()
        assert task is not None
        other = self._running.get(request_id)
        if other is not None:
            if other.epoch >= epoch:
                return  # a late or duplicate delivery
            other.interrupt(Stop.STALE)  # it came back to this replica before the old attempt noticed
        attempt = Attempt(request_id, epoch, task)
        self._running[request_id] = attempt
        try:
            while self._spool.full:  # noqa: ASYNC110 - rare, and bounded by the life of the replica
                await asyncio.sleep(self._config.tuning.beat_s)
            for n_restarts in range(_MAX_RESTARTS + 1):
                attempt.stop = None
                if not await self._once(attempt, give_up=n_restarts == _MAX_RESTARTS):
                    return
                log.warning("attempt claimed again", extra=self._ids(attempt))
        finally:
            if self._running.get(request_id) is attempt:
                del self._running[request_id]

    # -- one claim -------------------------------------------------------------------------------------------

    async def _once(self, attempt: Attempt, *, give_up: bool) -> bool:
        """Claim and serve. True: the attempt must be claimed again."""
        claim = await self._leases.claim(attempt.request_id, attempt.epoch)
        if claim.verdict not in (ClaimVerdict.OK, ClaimVerdict.CANCELLED):
            log.info("claim refused: %s", claim.verdict.value, extra=self._ids(attempt))
            return False
        output = self._publisher.open(
            attempt.request_id, attempt.epoch, claim.gateway, claim.stream, claim.n_done
        )
        output.on_verdict = lambda verdict: self._on_verdict(attempt, verdict)
        attempt.output = output
        if attempt.moved:
            self._start_move(attempt, output)
        try:
            if not claim.body:
                return False  # zero retention, or settled meanwhile: nobody waits for it
            run = Run(decode_envelope(claim.body), claim, output)
            try:
                if give_up:
                    return await self._refuse(run, attempt, _internal("the request could not be continued"))
                return await self._serve_claimed(run, attempt)
            except asyncio.CancelledError:
                await self._hand_back(run, attempt)
                raise
            except Exception:
                # A fault of ours. The client gets an end in any case, and not a silence.
                log.exception("attempt failed", extra=self._ids(attempt))
                return await self._refuse(
                    run, attempt, _internal("the worker failed; send the request again")
                )
        finally:
            attempt.output = None
            self._publisher.close(output)

    def _on_verdict(self, attempt: Attempt, verdict: FlushVerdict) -> None:
        if verdict is FlushVerdict.MOVED:
            self.moved(attempt.request_id)
        else:
            attempt.interrupt(STOP_OF[verdict])

    def _start_move(self, attempt: Attempt, output: Output) -> None:
        task = asyncio.get_running_loop().create_task(self._move(attempt, output))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def _move(self, attempt: Attempt, output: Output) -> None:
        attempt.moved = False  # another word from here on is read again
        reader = await self._leases.reader(attempt.request_id, attempt.epoch)
        if reader is not None and attempt.output is output:
            self._publisher.move(output, *reader)

    async def _serve_claimed(self, run: Run, attempt: Attempt) -> bool:
        claim, envelope = run.claim, run.envelope
        if claim.verdict is ClaimVerdict.CANCELLED and claim.n_done == 0:
            return await self._end(run, attempt, FinishReason.ABORT)  # before any work: nothing to bill
        try:
            # A cancelled claim comes without journal: nothing will be continued, but what was made is billed.
            prior = inherit(claim.entries, claim.n_done).token_ids if claim.verdict is ClaimVerdict.OK else []
            prompt = await self._prompts.token_ids(envelope)
        except EngineInputError as error:
            return await self._refuse(run, attempt, WireError(400, error.code, error.message, error.param))
        except JournalBroken as error:
            log.error("journal broken: %s", error, extra=self._ids(attempt))
            return await self._refuse(run, attempt, _internal("the answer so far was lost; send it again"))
        run.n_prompt = len(prompt)
        if claim.verdict is ClaimVerdict.CANCELLED or attempt.stop is Stop.CANCELLED:
            run.n_prompt = len(prompt) if claim.n_done else 0
            return await self._end(run, attempt, FinishReason.ABORT)
        blockers = self._blockers(run, attempt)
        if blockers:
            return await self._refuse(run, attempt, _cannot_continue(run, blockers))
        run.set_limit(self._engine.max_model_len)
        if run.limit <= claim.n_done:
            return await self._end(run, attempt, run.reason_at_limit)
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
        )
        attempt.generating = attempt.stop is None
        run.n_prefill = len(prompt) + len(prior)
        run.prefill_at_s = time.monotonic()
        self.n_prefill_tokens += run.n_prefill
        try:
            if attempt.generating:
                if not await self._paid(run, attempt.allowance, run.n_completion + 1):
                    run.n_prompt = run.n_prompt if run.n_completion else 0  # never served, not billed
                else:
                    async with aclosing(self._engine.generate(request)) as deltas:
                        await self._publish(run, deltas, attempt.allowance)
        except asyncio.CancelledError:
            if attempt.stop is None:
                raise  # the pool's: stopping or revoked
            attempt.task.uncancel()
        except EngineInputError as error:
            attempt.generating = False
            return await self._refuse(run, attempt, WireError(400, error.code, error.message, error.param))
        except EngineDead as error:
            attempt.stop = attempt.stop or Stop.ENGINE_DEAD
            self._on_engine_dead(error)
        finally:
            attempt.generating = False
            self.n_prefill_tokens -= run.n_prefill
        match attempt.stop:
            case None:
                return await self._end(run, attempt, run.finish or FinishReason.ERROR)
            case Stop.CANCELLED:
                return await self._end(run, attempt, FinishReason.ABORT)
            case Stop.RESTART:
                return await self._release(attempt, run.output)
            case _:
                return False

    async def _publish(self, run: Run, deltas: Any, allowance: Allowance | None) -> None:
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

    def _blockers(self, run: Run, attempt: Attempt) -> tuple[str, ...]:
        """Why going on would not give what an undisturbed run had given; empty while nothing may have been shown."""
        n_shown = max(run.claim.n_done, attempt.n_shown)
        if n_shown == 0:
            return ()
        sampling = run.envelope.sampling
        blockers = resume_blockers(sampling)
        if run.n_completion < n_shown and sampling.temperature > 0 and not blockers:
            return (
                "temperature",
            )  # Redis forgot tokens that were shown: others would be drawn in their place
        return blockers

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

    # -- ends ------------------------------------------------------------------------------------------------

    async def _end(
        self, run: Run, attempt: Attempt, reason: FinishReason, error: WireError | None = None
    ) -> bool:
        """The last entry, with exact counts, once. True when the flush says that it must be tried again."""
        if reason is FinishReason.ERROR and error is None:
            error = _internal("the engine could not finish this request; send it again")
        end = End(reason, run.n_prompt, run.n_cached, run.n_completion, error, run.claim.n_attempt)
        usage = encode(usage_of(run, end, self._config, self._now_ms()))
        self._spool.begin(attempt.request_id, attempt.epoch, usage)
        ended = False
        try:
            ended = await run.output.finish(end, usage)
        finally:
            if ended:
                self._spool.confirm(attempt.request_id)
                if run.envelope.zero_retention:
                    life_ms = self._config.tuning.zero_retention_journal_life_ms
                    self._client.fire("PEXPIRE", self._keys.journal(attempt.request_id), life_ms)
            elif run.output.closed_by is not None:
                self._spool.forget((attempt.request_id,))
            # else: interrupted while Redis was away; the lease will tell which it was.
        if ended:
            self.n_requests_total += 1
            return False
        if run.output.closed_by in (FlushVerdict.GAP, FlushVerdict.BUDGET):
            return await self._release(attempt, run.output)
        return False

    async def _refuse(self, run: Run, attempt: Attempt, error: WireError) -> bool:
        """End with an error. A prompt that was never served is not billed."""
        if run.n_completion == 0:
            run.n_prompt = run.n_cached = 0
        return await self._end(run, attempt, FinishReason.ERROR, error)

    async def _release(self, attempt: Attempt, output: Output) -> bool:
        """Unclaim, once nothing of ours is under way; then it may be claimed again."""
        await self._publisher.settle(output, _SETTLE_S)
        attempt.n_shown = max(attempt.n_shown, output.n_accepted)
        output.drop()
        return await self._leases.release(attempt.request_id, attempt.epoch)

    async def _hand_back(self, run: Run, attempt: Attempt) -> None:
        """The replica stops: journal what was made, then let go of the lease so that no death is counted.

        What could not be continued exactly elsewhere ends here, visibly.
        """
        attempt.n_shown = max(attempt.n_shown, run.n_completion)
        blockers = self._blockers(run, attempt)
        if blockers:
            await self._refuse(run, attempt, _cannot_continue(run, blockers))
            return
        released = await self._release(attempt, run.output)
        log.info("handed back", extra={**self._ids(attempt), "released": released})

    def _ids(self, attempt: Attempt) -> dict[str, object]:
        return {"request": attempt.request_id, "epoch": attempt.epoch, "replica": self._config.replica}


def _release_to(output: Output, held: list[Delta]) -> None:
    for delta in held:
        output.add(delta.token_ids, delta.text, _wire_logprobs(delta))
    held.clear()


def _wire_logprobs(delta: Delta) -> list[object] | None:
    """Per token `[text, logprob, [[text, logprob], …]]`: what the gateway renders."""
    if delta.logprobs is None:
        return None
    return [[t.text, t.logprob, [[text, logprob] for _, text, logprob in t.top]] for t in delta.logprobs]


def _cannot_continue(run: Run, blockers: tuple[str, ...]) -> WireError:
    what = (
        f"was interrupted and cannot be continued exactly (because of {', '.join(blockers)}): send it again"
    )
    if run.envelope.n_carried:  # it was asked for with Last-Event-ID, which the same call must leave out
        return WireError(409, "cannot_continue", f"the answer {what} without Last-Event-ID")
    return WireError(503, "cannot_continue", f"the answer {what}")


def _internal(sentence: str) -> WireError:
    return WireError(500, "internal_error", sentence)
