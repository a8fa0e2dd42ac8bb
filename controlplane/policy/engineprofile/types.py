"""The nouns of an engine profile: what a model is, what it runs on, what was promised, what was chosen and why. Pure.

Bytes are bytes, widths are numbers (not bytes), times are milliseconds where the name says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from controlplane.policy.gpus import Gpu
from controlplane.policy.perfmodel import ModelShape

Scalar = str | int | float | bool | None

# Bytes of one number.
WIDTHS: Final = MappingProxyType({"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model as its own config.json describes it; counts of 0 mean "has none".

    weight_bits: of its matrices as stored. kv_latent: numbers of KV per layer and token with latent attention.
    n_params_active: read for one token; equal to n_params without experts. kv_scales: it brings scales for 8-bit KV.
    """

    name: str
    architecture: str
    n_params: float
    n_params_active: float
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    context: int
    dtype: str = "bfloat16"
    quantization: str = ""
    weight_bits: float = 16.0
    n_experts: int = 0
    n_experts_used: int = 0
    kv_latent: int = 0
    kv_scales: bool = False

    @property
    def kv_width(self) -> int:
        """Numbers of KV per layer and token."""
        return self.kv_latent or 2 * self.n_kv_heads * self.head_dim

    @property
    def expert_share(self) -> float:
        return self.n_experts_used / self.n_experts if self.n_experts else 0.0

    def shape(self, *, n_stages: int = 1, bytes_per_kv: float = 2.0, weight_bits: float = 0.0) -> ModelShape:
        """As the performance model takes it: one of `n_stages` equal parts of its layers."""
        return ModelShape(
            self.name,
            self.n_params / n_stages,
            max(1, self.n_layers // n_stages),
            self.n_kv_heads,
            self.head_dim,
            self.n_heads,
            bytes_per_param=(weight_bits or self.weight_bits) / 8,
            bytes_per_kv=bytes_per_kv,
            n_params_active=self.n_params_active / n_stages,
            expert_share=self.expert_share,
            kv_width=self.kv_latent,
        )


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one replica runs on. `gpu` None: the processor's cores, whose memory `memory_bytes` is shared by others."""

    gpu: Gpu | None
    n: int = 1
    memory_bytes: int = 0

    @property
    def name(self) -> str:
        if self.gpu is None:
            return "cpu"
        return self.gpu.name if self.n == 1 else f"{self.n}x{self.gpu.name}"


@dataclass(frozen=True, slots=True)
class Promise:
    """Of the service class: its name and targets."""

    slo_class: str
    ttft_ms: float
    itl_ms: float


@dataclass(frozen=True, slots=True)
class Override:
    """What an operator wants instead of what would be chosen, and why."""

    value: Scalar
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Wish:
    """What is known of the use, and what the operator insists on.

    mean_prompt, mean_output: tokens of a typical request. n_adapters, lora_rank: LoRA adapters to hold at once and the
    largest rank among them. acceptance: measured share of drafted tokens that are kept; None: never measured.
    draft_model, draft_params: an EAGLE head, where there is one.
    """

    mean_prompt: int = 1024
    mean_output: int = 256
    n_adapters: int = 0
    lora_rank: int = 0
    acceptance: float | None = None
    draft_model: str = ""
    draft_params: float = 0.0
    overrides: Mapping[str, Override] = field(default_factory=dict)

    @property
    def mean_context(self) -> int:
        """Tokens of a typical running sequence, half of its answer written."""
        return self.mean_prompt + self.mean_output // 2

    def get(self, name: str) -> Override | None:
        return self.overrides.get(name)


@dataclass(frozen=True, slots=True)
class Value:
    """One setting: what, why in a sentence, the figures that led to it, and whether an operator chose it."""

    name: str
    value: Scalar
    reason: str
    inputs: Mapping[str, Scalar] = field(default_factory=dict)
    overridden: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a shape cannot run: the field at fault, a stable code, a sentence, and what to do."""

    field: str
    code: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}; {self.remedy}"


class ImpossibleError(ValueError):
    """No profile is possible; `refusals` say why, the most telling first."""

    def __init__(self, refusals: tuple[Refusal, ...]) -> None:
        super().__init__("; ".join(str(refusal) for refusal in refusals[:3]))
        self.refusals = refusals


@dataclass(frozen=True, slots=True)
class Compiled:
    """A whole profile: its settings in order, what it promises by the model, and what it will probably miss."""

    values: tuple[Value, ...]
    forecast: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Scalar]:
        """Settings by name, as the engine's profile takes them."""
        return {value.name: value.value for value in self.values}
