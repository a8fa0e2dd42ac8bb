"""What one replica can do within its promise: requests at once, and requests per second. Pure.

From the step-time model and the mix it serves. Read by the profile compiler and the simulator for initial slots (the
running house then adapts them), and by scaling for replicas per load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from controlplane.policy.perfmodel import StepModel, pairs

# Of the KV that running requests should fill at their mean size; the rest absorbs the tail.
KV_SHARE: Final = 0.9
_MAX_SLOTS: Final = 1024


@dataclass(frozen=True, slots=True)
class Mix:
    """Mean request of a workload, in tokens."""

    n_prompt: float
    n_output: float

    def __post_init__(self) -> None:
        if self.n_prompt < 1 or self.n_output < 1:
            raise ValueError(f"{self}: both lengths must be at least 1")


@dataclass(frozen=True, slots=True)
class Capacity:
    """`slots` requests at once give `requests_per_s` with `itl_s` between tokens; `bound_by` says what limits them."""

    slots: int
    requests_per_s: float
    itl_s: float
    bound_by: str  # kv | itl | ceiling


def capacity(
    step: StepModel, kv_tokens: int, mix: Mix, itl_target_s: float, ceiling: int = _MAX_SLOTS
) -> Capacity:
    """Most requests at once whose mean gap between tokens stays within the target and whose KV fits; at least one."""
    by_kv = int(KV_SHARE * kv_tokens / (mix.n_prompt + mix.n_output))
    low, high = 1, max(min(by_kv, ceiling), 1)
    while low < high:  # itl_s grows with the batch
        middle = (low + high + 1) // 2
        if itl_s(step, mix, middle) <= itl_target_s:
            low = middle
        else:
            high = middle - 1
    gap_s = itl_s(step, mix, low)
    bound_by = "itl" if low < min(by_kv, ceiling) else "kv" if by_kv <= ceiling else "ceiling"
    return Capacity(low, low / (mix.n_output * gap_s), gap_s, bound_by)


def itl_s(step: StepModel, mix: Mix, n_running: int) -> float:
    """Mean gap between a request's tokens in a full batch of `n_running`: a decode step, and the share of prompts that
    come in while it decodes (each step makes n_running tokens, so a prompt begins every n_output / n_running steps)."""
    decode_s = step.step_s(0, 0.0, n_running, round(n_running * (mix.n_prompt + mix.n_output / 2)))
    prompt_s = (step.token_s + step.reduce_s) * mix.n_prompt + step.pair_s * pairs(0, round(mix.n_prompt))
    return decode_s + prompt_s * n_running / mix.n_output
