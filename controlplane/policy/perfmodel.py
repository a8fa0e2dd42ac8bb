"""How long an engine step takes: the one cost model behind admission, routing, scaling, price and simulation.

A step of a continuous batch reads the weights once and the KV of every running sequence, and multiplies every new
token with the weights. So its time is linear in few counts, with one knee between reading and multiplying (roofline;
DistServe, OSDI 24, and Vidur, MLSys 24, fit the same terms). Because it is linear in the context, a run of steps of an
unchanged batch has a closed form, which is what makes the simulator fast. Pure; microseconds per prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from controlplane.policy.gpus import Gpu

# Shares of the peaks that well-tuned kernels reach, and what a step costs besides: the prior for what was never
# measured. Fitted values replace them (docs/simulator.md).
MEMORY_EFFICIENCY: Final = 0.75
FLOPS_EFFICIENCY: Final = 0.55
STEP_OVERHEAD_S: Final = 0.002
SEQUENCE_S: Final = 8e-6  # sampling, detokenising and bookkeeping per running sequence
MEMORY_USABLE: Final = 0.90  # vLLM's gpu_memory_utilization
RESERVE_BYTES: Final = 2 * 2**30  # activations and graphs, per GPU


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model matters for time and memory. `n_params_active` differs from `n_params` for mixtures."""

    name: str
    n_params: float
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_heads: int
    bytes_per_param: float = 2.0
    bytes_per_kv: float = 2.0
    n_params_active: float = 0.0

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.bytes_per_kv

    @property
    def active(self) -> float:
        return self.n_params_active or self.n_params


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of one step:

    `base_s + max(weights_s, token_s * n_tokens) + seq_s * n_seqs + context_s * n_context + pair_s * n_pairs`

    n_tokens: new tokens in the step (prompt chunk, and one per decoding sequence); n_seqs: decoding sequences;
    n_context: tokens of KV that decoding reads; n_pairs: query-key pairs of the prompt chunk.
    """

    base_s: float
    weights_s: float
    token_s: float
    seq_s: float
    context_s: float
    pair_s: float

    def __post_init__(self) -> None:
        for name in ("base_s", "weights_s", "token_s", "seq_s", "context_s", "pair_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}: must be a finite number of seconds, not negative")
        if self.base_s + self.weights_s <= 0:
            raise ValueError("base_s + weights_s must be positive: a step cannot take no time")

    def step_s(self, n_prefill: int, n_pairs: float, n_seqs: int, n_context: int) -> float:
        """One step with `n_prefill` prompt tokens beside `n_seqs` decoding sequences."""
        multiply_s = self.token_s * (n_prefill + n_seqs)
        return (
            self.base_s
            + (multiply_s if multiply_s > self.weights_s else self.weights_s)
            + self.seq_s * n_seqs
            + self.context_s * n_context
            + self.pair_s * n_pairs
        )

    def decode_s(self, n_steps: int, n_seqs: int, n_context: int) -> float:
        """`n_steps` steps of an unchanged decoding batch, each adding one token to each sequence."""
        first_s = self.step_s(0, 0.0, n_seqs, n_context)
        return n_steps * (first_s + self.context_s * n_seqs * (n_steps - 1) / 2)

    def decode_steps_within(self, seconds: float, n_seqs: int, n_context: int) -> int:
        """Most whole steps of `decode_s` that fit into `seconds`."""
        if seconds <= 0:
            return 0
        first_s = self.step_s(0, 0.0, n_seqs, n_context)
        half = self.context_s * n_seqs / 2
        if half * seconds < 1e-9 * first_s * first_s:  # the context hardly grows meanwhile
            guess = int(seconds / first_s)
        else:
            linear = first_s - half
            guess = int((math.sqrt(linear * linear + 4 * half * seconds) - linear) / (2 * half))
        while guess > 0 and self.decode_s(guess, n_seqs, n_context) > seconds:
            guess -= 1
        while self.decode_s(guess + 1, n_seqs, n_context) <= seconds:
            guess += 1
        return guess

    def prefill_s(self, n_tokens: int, n_cached: int = 0, chunk: int = 8192) -> float:
        """A lone prompt of `n_tokens`, of which the first `n_cached` are in the cache, in chunks."""
        total_s, at = 0.0, min(n_cached, n_tokens - 1)
        while at < n_tokens:
            n = min(chunk, n_tokens - at)
            total_s += self.step_s(n, pairs(at, n), 0, 0)
            at += n
        return total_s

    def scaled(self, factor: float) -> StepModel:
        """All times multiplied, e.g. by what was observed over what was predicted."""
        return StepModel(
            self.base_s * factor,
            self.weights_s * factor,
            self.token_s * factor,
            self.seq_s * factor,
            self.context_s * factor,
            self.pair_s * factor,
        )


def pairs(n_before: int, n_new: int) -> float:
    """Query-key pairs of causal attention for `n_new` tokens after `n_before`."""
    return n_new * (n_before + (n_new + 1) / 2)


def roofline(shape: ModelShape, gpu: Gpu, tp: int = 1) -> StepModel:
    """The prior for a pair that was never measured: data-sheet peaks times what kernels usually reach of them.

    Tensor parallelism divides reading and multiplying, and adds two all-reduces per layer over the links.
    """
    if tp < 1:
        raise ValueError(f"tp = {tp}: must be at least 1")
    bandwidth = gpu.memory_bytes_per_s * MEMORY_EFFICIENCY * tp
    peak = gpu.flops_8bit if shape.bytes_per_param <= 1 else gpu.flops_16bit
    flops = peak * FLOPS_EFFICIENCY * tp
    attention_flops = gpu.flops_16bit * FLOPS_EFFICIENCY * tp
    hidden_bytes = shape.n_heads * shape.head_dim * 2
    reduce_s = (
        0.0 if tp == 1 else 2 * shape.n_layers * 2 * (tp - 1) / tp * hidden_bytes / gpu.link_bytes_per_s
    )
    # The experts that a batch does not choose stay unread; a large batch chooses them all.
    return StepModel(
        base_s=STEP_OVERHEAD_S + (0.0 if tp == 1 else 2 * shape.n_layers * 8e-6),
        weights_s=shape.n_params * shape.bytes_per_param / bandwidth,
        token_s=2 * shape.active / flops + reduce_s,
        seq_s=SEQUENCE_S,
        context_s=shape.kv_bytes_per_token / bandwidth,
        pair_s=4 * shape.n_layers * shape.n_heads * shape.head_dim / attention_flops,
    )


def kv_tokens(shape: ModelShape, gpu: Gpu, tp: int = 1) -> int:
    """Tokens of KV that fit beside the weights; 0 when not even the weights fit."""
    usable = (gpu.memory_bytes * MEMORY_USABLE - RESERVE_BYTES) * tp
    return max(0, int((usable - shape.n_params * shape.bytes_per_param) / shape.kv_bytes_per_token))
