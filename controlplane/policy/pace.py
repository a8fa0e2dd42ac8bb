"""How fast a deployment is, learned from its own finished requests: first words, steps, time in a slot. Pure.

The performance model (perfmodel.py) says it beforehand where model and GPU are known; what a gateway sees corrects that
within some tens of requests, and is all there is where they are not. One `Pace` per deployment and gateway; it keeps
sums, no requests. Seconds are wall seconds as the gateway sees them, queueing excluded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, NamedTuple

_KEEP: Final = 0.98  # of the sums, per request: the last 50 have most of the say
_PRIOR: Final = 2.0  # requests that what is said beforehand counts for
_SLOWEST_S: Final = 100.0  # for a token or a step: nothing is slower and still served
_LEAST_BASE_S: Final = 1e-3
_PRIOR_TOKENS: Final = 1_000  # where the second point of the prior's line lies


class Speed(NamedTuple):
    """What the performance model says of a replica: seconds to a first word of no prompt at all, more per prompt token,
    and per further token."""

    base_s: float
    token_s: float
    step_s: float

    @classmethod
    def mean(cls, speeds: Sequence[Speed]) -> Speed | None:
        """Of several replicas; None of none."""
        return cls(*(sum(column) / len(speeds) for column in zip(*speeds, strict=True))) if speeds else None

    @classmethod
    def parse(cls, told: bytes | None) -> Speed | None:
        """Of `text`; None for anything else, and for what cannot be: it is only a beginning."""
        try:
            found = cls(*map(float, (told or b"").split()))
        except (TypeError, ValueError):
            return None
        return found if all(math.isfinite(value) and 0 <= value < _SLOWEST_S for value in found) else None

    @property
    def text(self) -> str:
        return " ".join(f"{value:.6g}" for value in self)


class Pace:
    """`first_s(n) = base_s + token_s * n` for prompts, `step_s` per further token of an answer."""

    __slots__ = (
        "_slot_s",
        "_steps",
        "_steps_s",
        "_w",
        "_weight",
        "_x",
        "_xx",
        "_xy",
        "_y",
        "base_s",
        "mean_slot_s",
        "n",
        "step_s",
        "token_s",
    )

    def __init__(self, base_s: float = 0.05, token_s: float = 2e-4, step_s: float = 0.03) -> None:
        self.n = 0  # requests seen
        self.base_s, self.token_s, self.step_s = base_s, token_s, step_s
        w, x = _PRIOR / 2, _PRIOR_TOKENS
        # Weighted sums of the line through (tokens, seconds): two points of the prior, then what is seen.
        self._w, self._x, self._xx = 2 * w, w * x, w * x * x
        self._y, self._xy = w * (2 * base_s + token_s * x), w * x * (base_s + token_s * x)
        self._steps, self._steps_s = 1.0, step_s
        self._slot_s, self._weight = 0.0, 0.0
        # Slot time of the requests seen; that of a short answer until there were any.
        self.mean_slot_s = self.slot_s(100, 64)

    def first_s(self, n_tokens: int) -> float:
        """From a slot to the first word, with so many prompt tokens to compute until then."""
        return self.base_s + self.token_s * n_tokens

    def slot_s(self, n_prompt: int, n_output: int) -> float:
        """How long a request keeps its slot."""
        return self.base_s + self.token_s * n_prompt + self.step_s * n_output

    def saw_first(self, n_tokens: int, seconds: float) -> None:
        """A request that found a free slot had its first word after so long, with so many prompt tokens to compute."""
        if seconds < 0 or n_tokens < 0:
            raise ValueError(f"{n_tokens} tokens in {seconds} s: neither may be negative")
        x = float(n_tokens)
        w = self._w = self._w * _KEEP + 1
        sx = self._x = self._x * _KEEP + x
        sy = self._y = self._y * _KEEP + seconds
        sxx = self._xx = self._xx * _KEEP + x * x
        sxy = self._xy = self._xy * _KEEP + x * seconds
        spread = w * sxx - sx * sx
        # Prompts of one length say nothing of the slope: it stays, and the base takes up the difference.
        if spread > 1e-6 * w * sxx:
            self.token_s = max((w * sxy - sx * sy) / spread, 0.0)
        self.base_s = (sy - self.token_s * sx) / w
        if self.base_s < _LEAST_BASE_S:  # the slope is too steep: the mean of what was seen stays
            self.base_s = _LEAST_BASE_S
            self.token_s = max((sy - _LEAST_BASE_S * w) / sx, 0.0) if sx else 0.0

    def saw_answer(self, n_prompt: int, n_output: int, after_first_s: float) -> None:
        """A whole answer, from its first word to its last."""
        if n_output > 1 and math.isfinite(after_first_s) and after_first_s >= 0:
            self._steps = self._steps * _KEEP + (n_output - 1)
            self._steps_s = self._steps_s * _KEEP + after_first_s
            self.step_s = self._steps_s / self._steps
        self._slot_s = self._slot_s * _KEEP + self.first_s(n_prompt) + max(after_first_s, 0.0)
        self._weight = self._weight * _KEEP + 1
        self.mean_slot_s = self._slot_s / self._weight
        self.n += 1
