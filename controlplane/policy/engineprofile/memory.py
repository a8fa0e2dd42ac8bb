"""What lies in the memory of one GPU: weights, activations, graphs, adapters; the rest is KV. Pure.

An estimate from the shape, so that what cannot fit is refused before a machine is bought; the engine measures for
itself when it starts, and may hold a few per cent more or less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from controlplane.policy.engineprofile.types import Hardware, ModelConfig, Value, Wish
from controlplane.policy.gpus import GIB

# What the driver's context, libraries and fragmentation keep, of every GPU: outside of the engine's share.
OUTSIDE_BYTES: Final = int(1.25 * GIB)
OUTSIDE_RATIO: Final = 0.05
GRAPH_BYTES: Final = int(0.75 * GIB)  # captured CUDA graphs and communication buffers
LORA_RANKS: Final = (8, 16, 32, 64, 128, 256, 320, 512)  # for which vLLM 0.32 has kernels


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is split: tp GPUs share a layer, pp groups of layers, dp copies of attention; experts by `ep`."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False

    @property
    def n_gpus(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        names = [f"{what} {n}" for what, n in (("TP", self.tp), ("PP", self.pp), ("DP", self.dp)) if n > 1]
        return " x ".join(names or ["one GPU"]) + (" with whole experts on each GPU" if self.ep else "")


@dataclass(frozen=True, slots=True)
class Room:
    """Bytes of one GPU by what they are for; kv may be negative: then it does not fit."""

    usable: int
    weights: int
    activations: int
    graphs: int
    adapters: int

    @property
    def kv(self) -> int:
        return self.usable - self.weights - self.activations - self.graphs - self.adapters


def utilization(hardware: Hardware, wish: Wish) -> Value:
    """Which share of each GPU's memory the engine may take."""
    assert hardware.gpu is not None
    asked = wish.get("gpu_memory_utilization")
    if asked is not None and isinstance(asked.value, int | float):
        return Value("gpu_memory_utilization", float(asked.value), asked.reason)
    total = hardware.gpu.memory_bytes
    kept = max(OUTSIDE_BYTES, int(OUTSIDE_RATIO * total))
    share = math.floor(100 * (1 - kept / total)) / 100
    return Value(
        "gpu_memory_utilization",
        share,
        f"leaves {kept / GIB:.1f} of {total / GIB:.0f} GiB to the driver, libraries and fragmentation; "
        "nothing else runs on a replica's GPUs",
        {"memory_gib": round(total / GIB, 1), "kept_gib": round(kept / GIB, 2)},
    )


def room(
    model: ModelConfig,
    hardware: Hardware,
    layout: Layout,
    *,
    share: float,
    chunk: int,
    n_seqs: int,
    eager: bool = False,
    n_loras: int = 0,
    lora_rank: int = 0,
) -> Room:
    """What one GPU of the layout holds with so many new tokens and sequences in a step."""
    assert hardware.gpu is not None
    bytes_per_param = model.weight_bits / 8
    n_expert = model.shape().n_params_expert
    n_expert_parts = layout.tp * layout.pp * (layout.dp if layout.ep else 1)
    weights = bytes_per_param * (
        (model.n_params - n_expert) / (layout.tp * layout.pp) + n_expert / n_expert_parts
    )
    # The widest moment of a layer, 16-bit: residual, normed copy and attention's output beside the two MLP halves of
    # the experts a token visits; then logits and probabilities of the sampled rows in 32 bit.
    n_visited = max(model.n_experts_used, 1)
    wide = 4 * model.hidden_size + 2 * n_visited * model.intermediate_size / layout.tp
    activations = 2 * chunk * wide + 8 * n_seqs * model.vocab_size / layout.tp
    return Room(
        usable=int(hardware.gpu.memory_bytes * share),
        weights=int(weights),
        activations=int(activations),
        graphs=0 if eager else GRAPH_BYTES,
        adapters=int(n_loras * adapter_bytes(model, lora_rank) / (layout.tp * layout.pp)),
    )


def adapter_bytes(model: ModelConfig, rank: int) -> float:
    """A slot for one LoRA adapter on every matrix of the model, 16-bit."""
    attention = 2 * model.hidden_size + (2 * model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    attention += 2 * model.hidden_size
    mlp = 3 * (model.hidden_size + model.intermediate_size) * max(model.n_experts, 1)
    return 2.0 * rank * model.n_layers * (attention + mlp)


def kv_bytes_per_token(model: ModelConfig, layout: Layout, bytes_per_kv: float) -> float:
    """Of one token, on one GPU of the layout. Heads are shared out over `tp`, and copied where there are too few; the
    one vector of latent attention is on every GPU.
    """
    width: float = model.kv_latent
    if not width:
        width = 2 * max(1, model.n_kv_heads // layout.tp) * model.head_dim
    return math.ceil(model.n_layers / layout.pp) * width * bytes_per_kv


def kv_tokens(model: ModelConfig, layout: Layout, found: Room, bytes_per_kv: float) -> int:
    """Tokens of KV of the whole replica, all copies together."""
    return max(0, int(found.kv / kv_bytes_per_token(model, layout, bytes_per_kv))) * layout.dp


def lora_rank(rank: int) -> int | None:
    """The smallest rank there are kernels for that holds `rank`; None if there is none."""
    return next((known for known in LORA_RANKS if known >= rank), None)
