"""One attempt of a request while a replica serves it: what interrupts it, what limits it, what it has used.

Built by serve.py from a claim and an envelope. No I/O.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Any, Final

from workers.allowance import Allowance
from workers.config import FrontConfig
from workers.contract import End, FinishReason, FlushVerdict, RequestEnvelope, UsageEvent
from workers.engine.base import Counted, SamplingSpec
from workers.leases import Claim
from workers.output import Output

_STATUS: Final = {FinishReason.ABORT: 499, FinishReason.ERROR: 500}


class Stop(enum.Enum):
    """Why a running attempt was interrupted from within the replica."""

    CANCELLED = "cancelled"  # the client has gone
    STALE = "stale"  # somebody else's request now
    RESTART = "restart"  # journal or hold are not what we think: claim again and resume
    ENGINE_DEAD = "engine_dead"


STOP_OF: Final = {
    FlushVerdict.CANCELLED: Stop.CANCELLED,
    FlushVerdict.STALE: Stop.STALE,
    FlushVerdict.GAP: Stop.RESTART,
    FlushVerdict.BUDGET: Stop.RESTART,
}


class Attempt:
    """A claimed attempt while it runs."""

    __slots__ = (
        "allowance",
        "epoch",
        "generating",
        "moved",
        "n_shown",
        "output",
        "request_id",
        "stop",
        "task",
    )

    def __init__(self, request_id: str, epoch: int, task: asyncio.Task[Any]) -> None:
        self.request_id = request_id
        self.epoch = epoch
        self.task = task
        self.stop: Stop | None = None
        self.generating = False
        self.n_shown = 0  # tokens that left here, over all claims: the client may have seen them
        self.output: Output | None = None  # since it was claimed
        self.moved = False  # its client reads elsewhere, and where is not known yet
        self.allowance: Allowance | None = None  # where the money held is less than the request may use

    @property
    def ids(self) -> dict[str, object]:
        """For a log line (which says replica and machine anyway)."""
        return {"request": self.request_id, "epoch": self.epoch}

    def interrupt(self, stop: Stop) -> None:
        """Remember why, and end the generation if it runs. The first reason counts."""
        if self.stop is None:
            self.stop = stop
            if self.generating:
                self.task.cancel()


class Run:
    """What is known about a claimed request while it is served."""

    __slots__ = (
        "claim",
        "counted",
        "counted_by",
        "envelope",
        "finish",
        "first_token_ms",
        "is_foreign",
        "limit",
        "n_cached",
        "n_new",
        "n_prefill",
        "n_prompt",
        "output",
        "prefill_at_s",
        "reason_at_limit",
    )

    def __init__(self, envelope: RequestEnvelope, claim: Claim, output: Output) -> None:
        self.envelope = envelope
        self.claim = claim
        self.output = output
        self.n_prompt = self.n_cached = self.n_new = self.limit = self.n_prefill = 0
        self.prefill_at_s = 0.0
        self.reason_at_limit = FinishReason.LENGTH
        self.finish: FinishReason | None = None
        self.first_token_ms: int | None = None
        self.counted: Counted | None = None
        self.counted_by = ""  # empty where the engine's own tokens are what counts
        self.is_foreign = False  # made or begun by an endpoint elsewhere: nobody can continue it

    @property
    def n_completion(self) -> int:
        """Tokens produced over all attempts."""
        return self.claim.n_done + self.n_new

    def count(self, counted: Counted, n_most_prompt: int) -> None:
        """The engine says the counts of the whole. The prompt is taken to have no more tokens than its text could have,
        and, where a budget holds for it, than are paid for."""
        self.counted, self.counted_by = counted, counted.by
        if counted.n_prompt >= 0:
            held = self.envelope.n_prompt_held
            most = max(self.n_prompt, held) if held else max(self.n_prompt, n_most_prompt)
            self.n_prompt = min(counted.n_prompt, most)
            self.n_cached = min(counted.n_cached, self.n_prompt)

    @property
    def n_billed(self) -> int:
        """Output tokens over all attempts as they are told and billed."""
        return self.n_completion if self.counted is None else self.claim.n_done + self.counted.n_completion

    def set_limit(self, n_context: int) -> None:
        """Most output tokens over all attempts: what was asked, and what the context has left."""
        asked, room = self.envelope.sampling.max_tokens, n_context - self.n_prompt
        self.limit = min(asked, room)
        if self.limit < room and self.envelope.budget_bound:
            self.reason_at_limit = FinishReason.BUDGET

    @property
    def n_granted(self) -> int:
        """Tokens over all attempts that the trusted side held money for when this attempt was claimed."""
        return self.claim.n_done + self.claim.hold

    @property
    def n_paid(self) -> int:
        """Those that the money still pays for, now that the prompt is counted; may be less than nothing."""
        envelope = self.envelope
        n_excess = self.n_prompt - envelope.n_carried_prompt - envelope.n_prompt_held
        if not envelope.n_prompt_held or n_excess <= 0 or not envelope.prompt_rate:
            return self.n_granted
        if not envelope.output_rate:
            return 0
        return self.n_granted - -(-n_excess * envelope.prompt_rate // envelope.output_rate)


def sampling_of(envelope: RequestEnvelope, limit: int) -> SamplingSpec:
    """What the engine is told; `limit` output tokens over all attempts."""
    asked = envelope.sampling
    return SamplingSpec(
        max_tokens=limit,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        min_p=asked.min_p,
        seed=asked.seed,
        stop=asked.stop,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        logprobs=asked.logprobs,
        ignore_eos=asked.ignore_eos,
        logit_bias={int(token): bias for token, bias in asked.logit_bias.items()},
        json_schema=asked.json_schema,
        calls=asked.calls,
    )


def usage_of(run: Run, end: End, config: FrontConfig, now_ms: int) -> UsageEvent:
    """What is billed and measured: the counts of the end the client sees, less what a request that this one continues
    was charged for."""
    envelope = run.envelope
    n_prompt = max(0, end.n_prompt - envelope.n_carried_prompt)
    return UsageEvent(
        request_id=envelope.id,
        org=envelope.org,
        project=envelope.project,
        key=envelope.key,
        deployment=envelope.deployment,
        replica=config.replica,
        machine=config.machine,
        model=envelope.model,
        endpoint=envelope.endpoint,
        n_prompt=n_prompt,
        n_cached=min(end.n_cached, n_prompt),
        n_completion=max(0, end.n_completion - envelope.n_carried),
        attempts=end.attempts,
        finish_reason=end.reason,
        status=end.error.status if end.error else _STATUS.get(end.reason, 200),
        admitted_at_ms=envelope.admitted_at_ms,
        # Unknown when an earlier attempt made the first token.
        first_token_ms=run.first_token_ms if run.claim.n_done == 0 else None,
        duration_ms=max(0, now_ms - envelope.admitted_at_ms),
        price_version=envelope.price_version,
        slo=envelope.slo,
        end_customer=envelope.end_customer,
        counted_by=run.counted_by,
    )
