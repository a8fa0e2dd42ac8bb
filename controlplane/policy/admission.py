"""What a request may cost at most, before it runs: pure.

Called by the gateway for every request; the admission script takes the hold, or less of it where a budget has
less left. Holding the worst case is what makes a budget exact: a request can never use more than was held.
"""

from __future__ import annotations

from dataclasses import dataclass

from billing.money import TOKENS_PER_RATE, Rates, worst_case_cost
from controlplane.policy import estimate


@dataclass(frozen=True, slots=True)
class Hold:
    """What admission takes. `n_output` is also the most the engine may generate."""

    n_prompt: int
    n_output: int
    money_nano: int
    # Of one output token: what the script divides a shortfall by. A fraction, because rounding it up would
    # cut too few tokens from the hold and rounding it down too many.
    output_rate_nano: float


def hold(n_prompt: int, max_tokens: int | None, context_tokens: int, rates: Rates) -> Hold:
    """The worst case of a request with an estimated prompt of `n_prompt` tokens.

    `max_tokens` is what the client asked for (None: all that the context leaves). The output is bounded by
    the context less a lower bound of the prompt, because an estimate that is too high must not cut an answer
    short.
    """
    room = max(1, context_tokens - estimate.lower_bound(n_prompt))
    n_output = room if max_tokens is None else min(max_tokens, room)
    return Hold(
        n_prompt=n_prompt,
        n_output=n_output,
        money_nano=worst_case_cost(rates, n_prompt=n_prompt, n_completion=n_output),
        output_rate_nano=rates.output / TOKENS_PER_RATE,
    )


def rest(whole: Hold, n_prompt_charged: int, n_produced: int, rates: Rates) -> Hold:
    """What is left to hold of `whole` for a request that continues another one: neither its prompt nor its tokens are
    charged again. At least one token, so that the replica can say that the end was reached."""
    n_prompt = max(0, whole.n_prompt - n_prompt_charged)
    n_output = max(1, whole.n_output - n_produced)
    money_nano = worst_case_cost(rates, n_prompt=n_prompt, n_completion=n_output)
    return Hold(n_prompt, n_output, money_nano, whole.output_rate_nano)
