"""How many tokens a prompt has, guessed without tokenising it, and how many the answer will have: pure.

Called by the gateway at admission, where tokenising (0.45 ms per 1,000 characters) would cost more than
everything else on the path. The guesses size holds and charges of the fair queue; the worker counts exactly and
the settle corrects them. Each (tenant, model) keeps one `Calibration`, moved by every finished request.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from controlplane.policy import lengths

# UTF-8 bytes per token of English prose under the common byte-level BPE vocabularies; the calibration moves
# it.
BYTES_PER_TOKEN: Final = 4
# What chat templates put around a message (role, separators) and in front of the answer.
TOKENS_PER_MESSAGE: Final = 4
TOKENS_PER_PROMPT: Final = 3

_SLOWEST_WEIGHT: Final = 0.05  # after some 20 requests an old ratio has lost most of its say
_RATIO_MIN, _RATIO_MAX = 0.1, 10.0
# How far below the estimate the exact count is taken to lie at least: half covers code, CJK and prose alike.
_LOWER_SHARE: Final = 0.5
# A prompt that turns out longer than was held for eats the money of its output: the replica must ask for more. So money
# is held with so many times the usual error. Not of a prompt of fewer tokens where money is short: what it may exceed
# its estimate by is little, and the last requests that a budget pays for should find it.
_LONG_PROMPT: Final = 1024
_SPREADS: Final = 4.0
_LEAST_MARGIN, _MOST_MARGIN = 1 / 64, 0.5


class Calibration(NamedTuple):  # two a request: a frozen dataclass takes four times as long to make
    """Of one (tenant, model), exponentially weighted: exact over raw prompt tokens after `n` requests, and
    tokens of an answer after `n_answers`."""

    ratio: float = 1.0
    n: int = 0
    # Low until something is known: who is charged too much at first is served too much when it comes back.
    n_output: float = 64.0
    n_answers: int = 0
    lengths: lengths.AnswerLengths = lengths.UNKNOWN
    # How far exact counts lie from the estimate, as a share of it, on average.
    spread: float = 0.05


NEW: Final = Calibration()


def raw_tokens(n_bytes: int, n_messages: int) -> int:
    """Uncalibrated estimate for `n_bytes` of UTF-8 text in `n_messages` messages (0: a bare prompt). At least
    1."""
    framing = n_messages * TOKENS_PER_MESSAGE + TOKENS_PER_PROMPT if n_messages else 0
    return max(1, -(-n_bytes // BYTES_PER_TOKEN) + framing)


def estimate(raw: int, calibration: Calibration) -> int:
    """Expected prompt tokens; at least 1."""
    return max(1, round(raw * calibration.ratio))


def lower_bound(estimated: int) -> int:
    """A count that the exact one is not expected to fall below; at least 1. Sizes what the output may still
    take."""
    return max(1, int(estimated * _LOWER_SHARE))


def upper_bound(estimated: int, calibration: Calibration, *, is_roomy: bool) -> int:
    """A count that the exact one seldom exceeds; of a short prompt where money may be short the estimate itself. Sizes
    the money that is held for the prompt. `is_roomy`: there is money for many more."""
    if estimated < _LONG_PROMPT and not is_roomy:
        return estimated
    margin = min(max(_SPREADS * calibration.spread, _LEAST_MARGIN), _MOST_MARGIN)
    return math.ceil(estimated * (1 + margin))


def observe(calibration: Calibration, raw: int, exact: int) -> Calibration:
    """The calibration after a request whose raw estimate was `raw` and whose exact count was `exact`.

    The first requests weigh fully (running mean), later ones by a fixed share. A count of 0 (the prompt was
    never tokenised) changes nothing.
    """
    if raw <= 0 or exact <= 0:
        return calibration
    n = calibration.n + 1
    weight = max(1.0 / n, _SLOWEST_WEIGHT)
    error = exact / raw - calibration.ratio
    ratio = min(max(calibration.ratio + weight * error, _RATIO_MIN), _RATIO_MAX)
    spread = calibration.spread + weight * (min(abs(error) / calibration.ratio, 1.0) - calibration.spread)
    return Calibration(ratio, n, calibration.n_output, calibration.n_answers, calibration.lengths, spread)


def expected_output(calibration: Calibration, at_most: int) -> int:
    """Tokens the answer is expected to have, at least 1 and never more than is held for it."""
    return max(1, min(round(calibration.n_output), at_most))


def observe_output(calibration: Calibration, n_output: int) -> Calibration:
    """The calibration after an answer of `n_output` tokens. None are not counted: the request failed."""
    if n_output <= 0:
        return calibration
    n = calibration.n_answers + 1
    weight = max(1.0 / n, _SLOWEST_WEIGHT)
    mean = calibration.n_output + weight * (n_output - calibration.n_output)
    return Calibration(calibration.ratio, calibration.n, mean, n, calibration.lengths, calibration.spread)


def observe_length(
    calibration: Calibration, n_output: int, said: tuple[float, float] | None = None
) -> Calibration:
    """The same for what order goes by (lengths.py), where a deployment serves shortest first. The length model had
    `said` between how many tokens the answer would have."""
    known = lengths.observe(calibration.lengths, n_output, said)
    return Calibration(
        calibration.ratio,
        calibration.n,
        calibration.n_output,
        calibration.n_answers,
        known,
        calibration.spread,
    )
