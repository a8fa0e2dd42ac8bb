"""How long an engine step takes: the one cost model behind admission, routing, scaling, price and simulation.

A step of a continuous batch reads the weights once and the KV of every running sequence, and multiplies every new
token with the weights. So its time is linear in few counts, with one knee between reading and multiplying (roofline;
DistServe, OSDI 24, and Vidur, MLSys 24, fit the same terms). Because it is linear in the context, a run of steps of an
unchanged batch has a closed form, which is what makes the simulator fast. Pure; microseconds per prediction.

How much of its peaks a GPU reaches is an `Efficiency`: ROOFLINE by rule of thumb, or fitted to measurements
(controlplane/prediction/perf), for GPUs of its own and for those never measured alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

from controlplane.policy.gpus import Gpu

MEMORY_USABLE: Final = 0.90  # vLLM's gpu_memory_utilization
RESERVE_BYTES: Final = 2 * 2**30  # activations and graphs, per GPU
# Bytes per parameter; four bits carry a scale for every 16 to 32 of them.
DTYPES: Final = MappingProxyType({"bf16": 2.0, "fp8": 1.0, "fp4": 0.5625, "int4": 0.5625})


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peaks that an engine reaches, and what a step costs besides. Shares are above 0.

    flops_*: of the peak at that width of weights; attention: of the 16-bit peak, by query-key pairs; kv: of the
    bandwidth, reading KV in decoding; link: of the link to the neighbour, in all-reduces. base_s: per step; layer_s:
    per layer and step; layer_tp_s: the same, more, when layers are split over GPUs; layer_expert_s: the same, more, for
    mixtures of experts; seq_s: per running sequence.
    """

    memory: float
    flops_16bit: float
    flops_8bit: float
    flops_4bit: float
    attention: float
    kv: float
    link: float
    base_s: float
    layer_s: float
    layer_tp_s: float
    layer_expert_s: float
    seq_s: float

    def __post_init__(self) -> None:
        for name in ("memory", "flops_16bit", "flops_8bit", "flops_4bit", "attention", "kv", "link"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} = {value}: a share of a peak must be above 0")
        for name in ("base_s", "layer_s", "layer_tp_s", "layer_expert_s", "seq_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}: must be a finite number of seconds, not negative")

    def flops(self, bytes_per_param: float) -> float:
        """The share for weights of that width."""
        if bytes_per_param < 0.75:
            return self.flops_4bit
        return self.flops_8bit if bytes_per_param <= 1 else self.flops_16bit


# What well-tuned kernels reach, and what an engine's step costs besides: the prior for what was never measured.
ROOFLINE: Final = Efficiency(
    memory=0.75, flops_16bit=0.55, flops_8bit=0.55, flops_4bit=0.55, attention=0.55, kv=0.75, link=1.0,
    base_s=0.002, layer_s=0.0, layer_tp_s=16e-6, layer_expert_s=0.0, seq_s=8e-6,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model matters for time and memory.

    Mixtures of experts: `n_params_active` are read for one token, `expert_share` of the experts serve it (8 of 128).
    `kv_width`: numbers of KV per layer and token where that is not two vectors per KV head (latent attention).
    """

    name: str
    n_params: float
    n_layers: int
    n_kv_heads: int
    head_dim: int
    n_heads: int
    bytes_per_param: float = 2.0
    bytes_per_kv: float = 2.0
    n_params_active: float = 0.0
    expert_share: float = 0.0
    kv_width: int = 0

    @property
    def kv_bytes_per_token(self) -> float:
        return self.n_layers * (self.kv_width or 2 * self.n_kv_heads * self.head_dim) * self.bytes_per_kv

    @property
    def active(self) -> float:
        return self.n_params_active or self.n_params

    @property
    def n_params_expert(self) -> float:
        """Parameters inside experts: what is not active beyond what every token reads."""
        return (self.n_params - self.active) / (1 - self.expert_share) if self.expert_share else 0.0

    def with_dtype(self, dtype: str) -> ModelShape:
        """The same model with weights of another width: one of DTYPES."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype: {dtype!r} is unknown; known: {', '.join(DTYPES)}")
        return replace(self, bytes_per_param=DTYPES[dtype])


@dataclass(frozen=True, slots=True)
class StepModel:
    """Seconds of one step:

    `base_s + max(weights_s + expert_s * touched, token_s * n_tokens) + reduce_s * n_tokens + seq_s * n_seqs
    + context_s * n_context + pair_s * n_pairs`

    n_tokens: new tokens in the step (prompt chunk, and one per decoding sequence); n_seqs: decoding sequences;
    n_context: tokens of KV that decoding reads; n_pairs: query-key pairs of the prompt chunk; touched: the share of a
    mixture's experts that at least one token chose, `1 - (1 - expert_share) ** n_tokens`.
    """

    base_s: float
    weights_s: float
    token_s: float
    seq_s: float
    context_s: float
    pair_s: float
    reduce_s: float = 0.0
    expert_s: float = 0.0
    expert_share: float = 0.0

    def __post_init__(self) -> None:
        for name in (
            "base_s", "weights_s", "token_s", "seq_s", "context_s", "pair_s", "reduce_s", "expert_s", "expert_share"
        ):  # fmt: skip
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}: must be a finite number of seconds, not negative")
        if self.base_s + self.weights_s <= 0:
            raise ValueError("base_s + weights_s must be positive: a step cannot take no time")

    def step_s(self, n_prefill: int, n_pairs: float, n_seqs: int, n_context: int) -> float:
        """One step with `n_prefill` prompt tokens beside `n_seqs` decoding sequences."""
        n_tokens = n_prefill + n_seqs
        multiply_s = self.token_s * n_tokens
        read_s = self.weights_s
        if self.expert_s:
            read_s += self.expert_s * (1.0 - (1.0 - self.expert_share) ** n_tokens)
        return (
            self.base_s
            + (multiply_s if multiply_s > read_s else read_s)
            + self.reduce_s * n_tokens
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
            self.reduce_s * factor,
            self.expert_s * factor,
            self.expert_share,
        )


def pairs(n_before: int, n_new: int) -> float:
    """Query-key pairs of causal attention for `n_new` tokens after `n_before`."""
    return n_new * (n_before + (n_new + 1) / 2)


def step_model(shape: ModelShape, gpu: Gpu, tp: int = 1, efficiency: Efficiency = ROOFLINE) -> StepModel:
    """The step times of a model on `tp` GPUs of a kind: their peaks times what the engine reaches of them.

    Tensor parallelism divides reading and multiplying, and adds two all-reduces per layer over the links.
    """
    if tp < 1:
        raise ValueError(f"tp = {tp}: must be at least 1")
    bandwidth = gpu.memory_bytes_per_s * tp
    flops = gpu.flops(shape.bytes_per_param) * efficiency.flops(shape.bytes_per_param) * tp
    # A ring moves 2 (tp - 1) / tp of what is reduced; what a layer reduces is 16 bits wide whatever its weights are.
    reduced = 2 * shape.n_layers * 2 * (tp - 1) / tp * shape.n_heads * shape.head_dim * 2
    n_expert = shape.n_params_expert
    param_s = shape.bytes_per_param / (bandwidth * efficiency.memory)
    layer_s = efficiency.layer_s
    layer_s += efficiency.layer_tp_s if tp > 1 else 0.0
    layer_s += efficiency.layer_expert_s if n_expert else 0.0
    return StepModel(
        base_s=efficiency.base_s + shape.n_layers * layer_s,
        weights_s=(shape.n_params - n_expert) * param_s,
        token_s=2 * shape.active / flops,
        seq_s=efficiency.seq_s,
        context_s=shape.kv_bytes_per_token / (bandwidth * efficiency.kv),
        pair_s=4
        * shape.n_layers
        * shape.n_heads
        * shape.head_dim
        / (gpu.flops_16bit * efficiency.attention * tp),
        reduce_s=reduced / (gpu.link_bytes_per_s * efficiency.link),
        expert_s=n_expert * param_s,
        expert_share=shape.expert_share,
    )


def roofline(shape: ModelShape, gpu: Gpu, tp: int = 1) -> StepModel:
    """The prior for a pair that was never measured."""
    return step_model(shape, gpu, tp, ROOFLINE)


def kv_tokens(shape: ModelShape, gpu: Gpu, tp: int = 1) -> int:
    """Tokens of KV that fit beside the weights; 0 when not even the weights fit."""
    usable = (gpu.memory_bytes * MEMORY_USABLE - RESERVE_BYTES) * tp
    return max(0, int((usable - shape.n_params * shape.bytes_per_param) / shape.kv_bytes_per_token))
