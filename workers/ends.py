"""How an attempt ends at its replica: with its last entry and the usage event, or unclaimed for another attempt.

Called by serve.py and generate.py on the engine loop. The spool holds the usage before the flush that ends the request
leaves, and learns whether Redis took it. Every function that may have to claim again answers True for that.
Never logs text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from workers.attempt import Attempt, Run, usage_of
from workers.config import FrontConfig
from workers.contract import End, FinishReason, FlushVerdict, WireError, encode
from workers.engine.base import resume_blockers
from workers.leases import Leases
from workers.output import Output
from workers.publisher import Publisher
from workers.redis_client import Client
from workers.spool import Spool

log = logging.getLogger(__name__)

_SETTLE_S: Final = 2.0


class Ends:
    """The ends of all attempts of one replica."""

    def __init__(
        self,
        config: FrontConfig,
        client: Client,
        publisher: Publisher,
        spool: Spool,
        leases: Leases,
        now_ms: Callable[[], int],
    ) -> None:
        self.n_requests_total = 0
        self._config = config
        self._client = client
        self._publisher = publisher
        self._spool = spool
        self._leases = leases
        self._now_ms = now_ms
        publisher.before_ends = spool.write_out

    async def end(
        self, run: Run, attempt: Attempt, reason: FinishReason, error: WireError | None = None
    ) -> bool:
        """The last entry, with exact counts, once. True when the flush says that it must be tried again."""
        if reason is FinishReason.ERROR and error is None:
            error = internal("the engine could not finish this request; send it again")
        end = End(reason, run.n_prompt, run.n_cached, run.n_billed, error, run.claim.n_attempt)
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
                    journal = self._config.keys.journal(attempt.request_id)
                    self._client.fire("PEXPIRE", journal, life_ms)
            elif run.output.closed_by is not None:
                self._spool.forget((attempt.request_id,))
            # else: interrupted while Redis was away; the lease will tell which it was.
        if ended:
            self.n_requests_total += 1
            return False
        if run.output.closed_by in (FlushVerdict.GAP, FlushVerdict.BUDGET):
            return await self.release(attempt, run.output)
        return False

    async def refuse(self, run: Run, attempt: Attempt, error: WireError) -> bool:
        """End with an error. A prompt that was never served is not billed."""
        if run.n_completion == 0:
            run.n_prompt = run.n_cached = 0
        return await self.end(run, attempt, FinishReason.ERROR, error)

    async def release(self, attempt: Attempt, output: Output) -> bool:
        """Unclaim, once nothing of ours is under way; then it may be claimed again."""
        await self._publisher.settle(output, _SETTLE_S)
        attempt.n_shown = max(attempt.n_shown, output.n_accepted)
        output.drop()
        return await self._leases.release(attempt.request_id, attempt.epoch)

    async def hand_back(self, run: Run, attempt: Attempt) -> None:
        """The replica stops: journal what was made, then let go of the lease so that no death is counted.

        What could not be continued exactly elsewhere ends here, visibly.
        """
        attempt.n_shown = max(attempt.n_shown, run.n_completion)
        blockers = blockers_of(run, attempt)
        if blockers:
            await self.refuse(run, attempt, cannot_continue(run, blockers))
            return
        released = await self.release(attempt, run.output)
        log.info("handed back", extra={**attempt.ids, "released": released})


def blockers_of(run: Run, attempt: Attempt) -> tuple[str, ...]:
    """Why going on would not give what an undisturbed run had given; empty while nothing may have been shown."""
    n_shown = max(run.claim.n_done, attempt.n_shown)
    if n_shown == 0:
        return ()
    if run.is_foreign:
        return ("upstream",)
    sampling = run.envelope.sampling
    blockers = resume_blockers(sampling)
    if run.n_completion < n_shown and sampling.temperature > 0 and not blockers:
        return ("temperature",)  # Redis forgot tokens that were shown: others would be drawn in their place
    return blockers


def cannot_continue(run: Run, blockers: tuple[str, ...]) -> WireError:
    """What its client is told of an answer that would not go on as it began."""
    what = (
        f"was interrupted and cannot be continued exactly (because of {', '.join(blockers)}): send it again"
    )
    if run.envelope.n_carried:  # it was asked for with Last-Event-ID, which the same call must leave out
        return WireError(409, "cannot_continue", f"the answer {what} without Last-Event-ID")
    return WireError(503, "cannot_continue", f"the answer {what}")


def internal(sentence: str) -> WireError:
    return WireError(500, "internal_error", sentence)
