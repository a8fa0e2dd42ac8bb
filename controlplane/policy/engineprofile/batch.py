"""How many sequences run at once, and how many new tokens a step may take: both from the promised pace. Pure.

Chunked prefill (Sarathi-Serve, OSDI 24): a step that decodes also computes a piece of a prompt, and everybody waits for
that step. So the piece is the largest with which a step of a full batch still keeps the promised time between
tokens; a smaller one wastes multiplications, a larger one stalls streams. Decoding alone is given DECODE_SHARE of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from controlplane.policy.engineprofile.memory import Layout
from controlplane.policy.engineprofile.types import ModelConfig, Promise, Wish
from controlplane.policy.gpus import Gpu
from controlplane.policy.perfmodel import Efficiency, StepModel, pairs, step_model

DECODE_SHARE: Final = 0.6
MAX_SEQS: Final = 1024
CHUNK_STEP: Final = 64
MIN_CHUNK: Final = 256
MAX_CHUNK: Final = 8192  # a step is saturated long before
MAX_CHUNK_BATCH: Final = 16384
RELAXED_MS: Final = 1000.0  # from this pace on nobody watches: throughput counts


@dataclass(frozen=True, slots=True)
class Pace:
    """Step times of a layout: a token passes all its stages, each of which holds its part of the batch."""

    stage: StepModel
    layout: Layout

    def step_ms(self, n_prefill: int, n_seqs: int, n_context: int) -> float:
        """Between two tokens of one sequence, with so many running in one copy and that context each."""
        parts = self.layout.pp
        n = -(-n_seqs // parts)
        chunk = -(-n_prefill // parts)
        return 1000 * parts * self.stage.step_s(chunk, pairs(n_context, chunk), n, n * n_context)

    def prefill_ms(self, n_tokens: int, chunk: int) -> float:
        """A lone prompt, through all stages."""
        return 1000 * self.layout.pp * self.stage.prefill_s(n_tokens, chunk=max(chunk, 1))


def pace(model: ModelConfig, gpu: Gpu, layout: Layout, efficiency: Efficiency, bytes_per_kv: float) -> Pace:
    shape = model.shape(n_stages=layout.pp, bytes_per_kv=bytes_per_kv)
    n_wide = layout.tp * (layout.dp if layout.ep else 1)
    if n_wide == layout.tp:
        return Pace(step_model(shape, gpu, layout.tp, efficiency), layout)
    # Copies that share experts: attention is read by tp GPUs, experts by all; the batch of experts is everybody's.
    whole, own = step_model(shape, gpu, n_wide, efficiency), step_model(shape, gpu, layout.tp, efficiency)
    return Pace(
        StepModel(
            own.base_s, own.weights_s, own.token_s, own.seq_s, own.context_s, own.pair_s,
            own.reduce_s, whole.expert_s, whole.expert_share,
        ),
        layout,
    )  # fmt: skip


def n_seqs(found: Pace, promise: Promise, wish: Wish, kv_tokens: int) -> tuple[int, str]:
    """(sequences at once of all copies, why no more): what keeps the pace and what memory holds."""
    by_memory = max(1, kv_tokens // max(wish.mean_context, 1))
    alone_ms = found.step_ms(0, 1, wish.mean_context)
    # Of what one sequence leaves of the promise; a batch costs little more than one while reading weights dominates.
    budget_ms = alone_ms + DECODE_SHARE * max(promise.itl_ms - alone_ms, alone_ms / 4)
    low, high = 0, MAX_SEQS
    while low < high:
        middle = (low + high + 1) // 2
        if found.step_ms(0, middle, wish.mean_context) <= budget_ms:
            low = middle
        else:
            high = middle - 1
    by_pace = low * found.layout.dp
    n = max(1, min(by_memory, by_pace, MAX_SEQS))
    if n == MAX_SEQS:
        return n, f"the pace allows {by_pace} and memory {by_memory}; beyond {MAX_SEQS} a step gains nothing"
    if by_memory <= by_pace:
        return _round_down(n), (
            f"{kv_tokens} tokens of KV hold {by_memory} sequences of {wish.mean_context}; "
            f"the pace would allow {by_pace}"
        )
    return _round_down(n), (
        f"more would take a decoding step beyond {budget_ms:.0f} ms of the promised {promise.itl_ms:g} ms, and leave "
        f"prompts too little; memory would hold {by_memory}"
    )


def chunk(found: Pace, promise: Promise, wish: Wish, n_running: int) -> tuple[int, str]:
    """(new tokens of a step, why)."""
    most = MAX_CHUNK_BATCH if promise.itl_ms >= RELAXED_MS else MAX_CHUNK
    n = -(-n_running // found.layout.dp)
    least = -(-max(MIN_CHUNK, n) // CHUNK_STEP) * CHUNK_STEP

    def ms(tokens: int) -> float:
        return found.step_ms(max(tokens - n, 0), n, wish.mean_context)

    if ms(least) > promise.itl_ms:
        return least, (
            f"the least that makes sense; a step with it takes {ms(least):.0f} ms, above the promised "
            f"{promise.itl_ms:g} ms"
        )
    low, high = least // CHUNK_STEP, most // CHUNK_STEP
    while low < high:
        middle = (low + high + 1) // 2
        if ms(middle * CHUNK_STEP) <= promise.itl_ms:
            low = middle
        else:
            high = middle - 1
    size = low * CHUNK_STEP
    if size == most:
        return (
            size,
            f"a step with {size} tokens takes {ms(size):.0f} of {promise.itl_ms:g} ms; more gains nothing",
        )
    return size, (
        f"the largest with which a step beside {n_running} streams keeps {promise.itl_ms:g} ms: "
        f"{ms(size):.0f} ms, with {size + CHUNK_STEP} {ms(size + CHUNK_STEP):.0f} ms"
    )


def portion(found: Pace, promise: Promise, n_running: int, chunk_tokens: int) -> tuple[int, str]:
    """(new tokens of one prompt in a step, 0 = all that has room; why). vLLM goes on with prompts before it begins
    others, so that a short one would wait for the whole of every long one that came before it."""
    if promise.itl_ms >= RELAXED_MS:
        return 0, "nobody watches this class: a prompt may have a whole step"
    half = (chunk_tokens - min(n_running, chunk_tokens // 2)) // 2
    long = 8 * chunk_tokens
    alone_ms, shared_ms = found.prefill_ms(long, chunk_tokens), found.prefill_ms(long, half)
    return half, (
        f"half of what a step has for prompts, so that a short one finds room beside a long one; {long} tokens alone "
        f"take {shared_ms:.0f} ms instead of {alone_ms:.0f} ms"
    )


def _round_down(n: int) -> int:
    """To what CUDA graphs are captured for: steps of 8 above 8."""
    return n if n <= 8 else n // 8 * 8
