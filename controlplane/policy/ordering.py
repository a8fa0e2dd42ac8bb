"""Which request of one key goes first: pure.

Called by the gateway per request; the queue keeps the numbers in order, lowest first. Order applies inside a
flow only: which tenant is served is decided by fairness, whatever is asked for here.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

# A token of the prompt takes about this share of the time of one decode step: prefill runs thousands at once.
_PREFILL_SHARE: Final = 1 / 64
# Shortest first, less this much per unit waited: a request predicted to take t ms longer than all that come
# after it is overtaken for t / GAMMA ms at most (aging as in SSJF, arXiv:2404.08509).
GAMMA: Final = 0.05


class QueueOrder(StrEnum):
    """How a deployment orders the requests of one key."""

    EDF = "edf"  # earliest deadline of the first token
    SJF = "sjf"  # shortest predicted job, aged
    FCFS = "fcfs"  # first come, first served


def predicted_ms(n_prompt: int, n_output: int, itl_ms: float) -> float:
    """Time a request takes once it runs, at the class's pace of `itl_ms` per output token."""
    return (n_output + n_prompt * _PREFILL_SHARE) * itl_ms


def order_key(
    order: QueueOrder, admitted_at_ms: int, *, ttft_ms: int, predicted_ms: float, gamma: float = GAMMA
) -> int:
    """Place inside the flow, lowest first. Static, although SJF ages: every request ages equally fast, so
    `predicted - gamma * waited` orders as `predicted + gamma * admitted` does."""
    if order is QueueOrder.EDF:
        return admitted_at_ms + ttft_ms
    if order is QueueOrder.SJF:
        return round(predicted_ms + gamma * admitted_at_ms)
    return admitted_at_ms
