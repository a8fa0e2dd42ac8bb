"""How long engine steps took since the last heartbeat: what a stream waits between two of its tokens.

A step gives one token to every running sequence, so its length is the gap that each of them saw. The engine adds
a step in under a microsecond, whatever the batch (no work per token); heartbeat.py takes the window; the trusted
side merges windows and asks for quantiles (autoscaler/watch/slots.py). Fixed memory. No clock of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

# Geometric buckets, 4.4 % apart: 0.1 ms to 100 s in 320 of them. A quantile is at most 2.2 % off.
_RATIO: Final = 2 ** (1 / 16)
_FIRST_MS: Final = 0.1
N_BUCKETS: Final = 321
_BOUNDS_MS: Final = tuple(_FIRST_MS * _RATIO**i for i in range(N_BUCKETS - 1))


@dataclass(frozen=True, slots=True)
class Steps:
    """One window. `buckets`: flat pairs (bucket, tokens that came after so long), as they travel (gaps_of).

    n_tokens: steps times running sequences; n_waiting: sequences that the engine's own queue held, mean over the
    steps.
    """

    n_steps: int = 0
    n_tokens: int = 0
    n_waiting: float = 0.0
    kv_peak_ratio: float = 0.0  # the fullest that the KV cache was
    buckets: tuple[int, ...] = ()


class StepWindow:
    """Gathers steps until `take`. On the engine's loop only."""

    __slots__ = ("_buckets", "_kv_peak_ratio", "_n_steps", "_n_tokens", "_n_waiting")

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._buckets = [0] * N_BUCKETS
        self._n_steps = self._n_tokens = self._n_waiting = 0
        self._kv_peak_ratio = 0.0

    def add(
        self, step_ms: float, n_running: int, n_waiting: int, kv_used_ratio: float = 0.0, n_steps: int = 1
    ) -> None:
        """A step (or so many alike) that ran `n_running` sequences and left `n_waiting` in the engine's queue."""
        n_tokens = n_running * n_steps
        self._buckets[bisect_left(_BOUNDS_MS, step_ms)] += n_tokens
        self._n_steps += n_steps
        self._n_tokens += n_tokens
        self._n_waiting += n_waiting * n_steps
        if kv_used_ratio > self._kv_peak_ratio:
            self._kv_peak_ratio = kv_used_ratio

    def take(self) -> Steps:
        """What was gathered; the next window begins."""
        if not self._n_steps:
            return Steps()
        pairs = [part for pair in enumerate(self._buckets) if pair[1] for part in pair]
        found = Steps(
            self._n_steps,
            self._n_tokens,
            self._n_waiting / self._n_steps,
            self._kv_peak_ratio,
            tuple(pairs),
        )
        self._reset()
        return found


def gaps_of(pairs: Sequence[int]) -> tuple[tuple[float, int], ...]:
    """(milliseconds, tokens) of flat pairs (bucket, tokens), shortest first.

    What is no such list gives nothing: it comes from a machine.
    """
    if len(pairs) % 2 or len(pairs) > 2 * N_BUCKETS:
        return ()
    found = sorted(zip(pairs[::2], pairs[1::2], strict=True))
    if any(not 0 <= bucket < N_BUCKETS or n < 0 for bucket, n in found):
        return ()
    return tuple((_middle_ms(bucket), n) for bucket, n in found if n)


def quantile_ms(gaps: Iterable[tuple[float, int]], q: float) -> float:
    """The length that a share `q` of the tokens did not exceed; `gaps` by rising length; 0.0 for none."""
    gaps = tuple(gaps)
    wanted = q * sum(n for _, n in gaps)
    seen = 0
    for ms, n in gaps:
        seen += n
        if seen >= wanted:
            return ms
    return 0.0


def _middle_ms(bucket: int) -> float:
    return float(_FIRST_MS * _RATIO ** (bucket - 0.5))
