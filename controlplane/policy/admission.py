"""What a request may cost at most, before it runs: pure.

Called by the gateway for every request; the admission script takes the hold, or less of it where a budget has
less left. A request can never use more than is held for it, which is what makes a budget exact.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from billing.money import TOKENS_PER_RATE, NanoPerMillion, Rates, worst_case_cost
from controlplane.policy import estimate

# Of money that does not last for so many worst cases a stream holds only this part at a time and is topped up as it
# goes: 32 streams that share the last credit all run, and each finds something left. Larger: fairer towards the
# end, and more top-ups (about SHARE * ln(tokens left) in all).
SHARE: Final = 64


class Hold(NamedTuple):  # one a request: a frozen dataclass takes four times as long to make
    """What admission takes. `n_output` is also the most the engine may generate. Money is held for `n_paid` tokens of
    prompt: beyond them the replica must ask for more before it begins."""

    n_prompt: int
    n_paid: int
    n_output: int
    money_nano: int
    # Of the prompt, and of one output token: fractions, because a shortfall divided by a rounded rate would cut too
    # few tokens from the hold, or too many.
    prompt_nano: float
    output_rate_nano: float
    # 0: a plain answer is held whole (or what is left of it), because half of many answers is worth less to whoever
    # waits for them than all of some. A stream is read as it comes.
    share: int


# Of a prompt that is only counted: bounded by requests a minute and at once, not by tokens or money.
NOTHING: Final = Hold(0, 0, 0, 0, 0.0, 0.0, 0)


def hold(
    n_prompt: int,
    max_tokens: int | None,
    context_tokens: int,
    rates: Rates,
    *,
    streaming: bool = False,
    n_paid: int = 0,
) -> Hold:
    """The worst case of a request with an estimated prompt of `n_prompt` tokens. Money is held for `n_paid` of them,
    where the exact count may well be higher than the estimate.

    `max_tokens` is what the client asked for (None: all that the context leaves). The output is bounded by
    the context less a lower bound of the prompt, because an estimate that is too high must not cut an answer
    short.
    """
    room = max(1, context_tokens - estimate.lower_bound(n_prompt))
    n_output = room if max_tokens is None else min(max_tokens, room)
    n_paid = max(n_prompt, n_paid)
    return Hold(
        n_prompt,
        n_paid,
        n_output,
        worst_case_cost(rates, n_prompt=n_paid, n_completion=n_output),
        n_paid * prompt_rate(rates) / TOKENS_PER_RATE,
        rates.output / TOKENS_PER_RATE,
        SHARE if streaming else 0,
    )


def rest(whole: Hold, n_prompt_charged: int, n_produced: int, rates: Rates) -> Hold:
    """What is left to hold of `whole` for a request that continues another one: neither its prompt nor its tokens are
    charged again. At least one token, so that the replica can say that the end was reached."""
    n_prompt = max(0, whole.n_prompt - n_prompt_charged)
    n_paid = max(0, whole.n_paid - n_prompt_charged)
    n_output = max(1, whole.n_output - n_produced)
    money_nano = worst_case_cost(rates, n_prompt=n_paid, n_completion=n_output)
    prompt_nano = n_paid * prompt_rate(rates) / TOKENS_PER_RATE
    return Hold(n_prompt, n_paid, n_output, money_nano, prompt_nano, whole.output_rate_nano, whole.share)


def prompt_rate(rates: Rates) -> NanoPerMillion:
    """What a prompt token costs at most, cached or not."""
    return max(rates.input, rates.cached)
