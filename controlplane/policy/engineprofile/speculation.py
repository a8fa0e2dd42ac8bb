"""Whether drafting tokens ahead pays. Pure.

A step that verifies k drafted tokens costs a step with k + 1 tokens per sequence and yields, where each is kept with
probability a, (1 - a^(k+1)) / (1 - a) tokens (Leviathan et al., ICML 23). It pays while reading the weights dominates,
and costs once multiplying does: so it is judged at the batch the profile is made for. Without a measured acceptance it
stays off: a guess would be a promise. The engine refuses our resume penalties beside it (vLLM 0.32: no custom logits
processors), so requests with penalties then drain instead of moving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from controlplane.policy.engineprofile.batch import Pace
from controlplane.policy.engineprofile.types import Wish

PAYS_FROM: Final = 1.15  # less is within the error of the performance model
MAX_DRAFT: Final = 7
BUSY_SHARE: Final = 0.5  # of the sequences at once: an ordinary hour


@dataclass(frozen=True, slots=True)
class Speculation:
    """method '' = off."""

    method: str
    n_tokens: int
    speedup: float
    reason: str


def speculation(found: Pace, wish: Wish, n_seqs: int, n_params: float) -> Speculation:
    """How many tokens to draft, and with what; off where it does not pay."""
    if wish.acceptance is None:
        return Speculation("", 0, 1.0, "nobody measured how many drafted tokens this traffic keeps")
    a = min(max(wish.acceptance, 0.0), 0.99)
    n = max(1, int(n_seqs * BUSY_SHARE) // found.layout.dp)
    plain_ms = found.step_ms(0, n, wish.mean_context)
    method = "eagle" if wish.draft_model else "ngram"
    best, best_k = 0.0, 1
    for k in range(1, MAX_DRAFT + 1):
        gain = (
            _expected(a, k)
            * plain_ms
            / (_verify_ms(found, n, k, wish) + _draft_ms(plain_ms, k, wish.draft_params / n_params))
        )
        if gain > best:
            best, best_k = gain, k
    told = f"{best:.2f} times as fast with {best_k} drafted tokens of which {a:.0%} are kept, {n} streams"
    if best < PAYS_FROM:
        return Speculation("", 0, best, f"at best {told}, below {PAYS_FROM:g}")
    return Speculation(method, best_k, best, told)


def _expected(a: float, k: int) -> float:
    return sum(a**i for i in range(k + 1))


def _verify_ms(found: Pace, n: int, k: int, wish: Wish) -> float:
    """The k tokens beside each sequence's own multiply like prompt tokens; their attention reads the same KV."""
    stage, parts = found.stage, found.layout.pp
    rows = -(-n // parts)
    plain = stage.step_s(0, 0.0, rows, rows * wish.mean_context)
    # As a step of rows * (k + 1) new tokens, less the per-sequence cost of those that are no sequences.
    wide = stage.step_s(rows * k, 0.0, rows, rows * wish.mean_context)
    return 1000 * parts * max(plain, wide)


def _draft_ms(plain_ms: float, k: int, draft_share: float) -> float:
    """A head runs k times, as its share of the model's weights takes; looking n-grams up costs next to nothing."""
    return k * plain_ms * max(draft_share, 0.02) if draft_share else 0.05
