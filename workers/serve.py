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
from collections import deque
from collections.abc import Callable
from typing import Final

from workers.adapters import Adapters
from workers.attempt import STOP_OF, Attempt, Run, Stop
from workers.config import FrontConfig
from workers.contract import ClaimVerdict, FlushVerdict, decode_envelope
from workers.ends import Ends, internal
from workers.engine.base import Engine, EngineDead
from workers.generate import Generations
from workers.leases import Leases
from workers.output import Output
from workers.publisher import Publisher
from workers.redis_client import Client
from workers.spool import Spool

log = logging.getLogger(__name__)

_MAX_RESTARTS: Final = 3
_HANDED_BACK: Final = 256  # told in each beat: those of the last seconds


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
        self._publisher = publisher
        self._spool = spool
        self._leases = Leases(config, client)
        self._ends = Ends(config, client, publisher, spool, self._leases, now_ms)
        self._generations = Generations(config, engine, client, self._ends, on_engine_dead, now_ms)
        self._running: dict[str, Attempt] = {}
        self.n_errors_total = 0  # requests that failed through no fault of theirs
        self.handed_back: deque[str] = deque(maxlen=_HANDED_BACK)
        self._moves: set[asyncio.Task[None]] = set()

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def tokenise_cpu_ms(self) -> float:
        """CPU time spent on counting prompts since the start."""
        return self._generations.prompts.cpu_ns / 1e6

    @property
    def n_tokens_total(self) -> int:
        """Tokens made since the start."""
        return self._generations.n_tokens_total

    @property
    def n_requests_total(self) -> int:
        """Requests ended since the start."""
        return self._ends.n_requests_total

    @property
    def adapters(self) -> Adapters:
        """LoRA adapters in the engine's memory."""
        return self._generations.adapters

    @property
    def n_prefill_tokens(self) -> int:
        """Prompt tokens whose first answer token is awaited (for the watchdog)."""
        return self._generations.n_prefill_tokens

    @property
    def prefill_tokens_per_s(self) -> float:
        """The slowest recent prefill."""
        return self._generations.prefill_tokens_per_s

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
        self._generations.prompts.close()

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
                log.warning("attempt claimed again", extra=attempt.ids)
        finally:
            if self._running.get(request_id) is attempt:
                del self._running[request_id]

    # -- one claim -------------------------------------------------------------------------------------------

    async def _once(self, attempt: Attempt, *, give_up: bool) -> bool:
        """Claim and serve. True: the attempt must be claimed again."""
        claim = await self._leases.claim(attempt.request_id, attempt.epoch)
        if claim.verdict not in (ClaimVerdict.OK, ClaimVerdict.CANCELLED):
            log.info("claim refused: %s", claim.verdict.value, extra=attempt.ids)
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
                    return await self._ends.refuse(
                        run, attempt, internal("the request could not be continued")
                    )
                return await self._generations.serve(run, attempt)
            except asyncio.CancelledError:
                await self._ends.hand_back(run, attempt)
                raise
            except Exception:
                # A fault of ours. The client gets an end in any case, and not a silence.
                log.exception("attempt failed", extra=attempt.ids)
                self.n_errors_total += 1
                if self._config.spec.canary and claim.n_attempt == 1 and run.n_completion == 0:
                    # What is tried out here failed; where it is not, the request may be served. Nobody saw a token.
                    await self._ends.release(attempt, output)
                    self.handed_back.append(attempt.request_id)
                    return False
                return await self._ends.refuse(
                    run, attempt, internal("the worker failed; send the request again")
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
