"""Models of the shape catalogue as configurations, for what is planned before a model was ever loaded. Pure.

The catalogue has no hidden size, width of the MLP and vocabulary; they are computed from what it has, and only the
estimate of activations and the divisibility of the MLP rest on them.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from controlplane.policy.engineprofile.types import ModelConfig
from controlplane.policy.models import MODELS

CONTEXT: Final = 32_768  # what the catalogue does not say
EXPERTS: Final = MappingProxyType(
    {
        "mixtral-8x7b": 8, "qwen3-30b-a3b": 128, "qwen3-235b-a22b": 128, "gpt-oss-20b": 32, "gpt-oss-120b": 128,
        "minimax-m2.5": 256, "deepseek-v3": 256, "kimi-k2.5": 384,
    }
)  # fmt: skip
VOCABULARY: Final = 128_256


def known_model(name: str) -> ModelConfig | None:
    """None for a name that is not in the catalogue."""
    shape = MODELS.get(name)
    if shape is None:
        return None
    hidden = shape.n_heads * shape.head_dim
    n_experts = EXPERTS.get(name, 0)
    n_used = round(shape.expert_share * n_experts)
    attention = hidden * shape.head_dim * (2 * shape.n_heads + 2 * shape.n_kv_heads)
    per_layer = max(shape.n_params / shape.n_layers - attention, 0) / (3 * hidden * max(n_experts, 1))
    return ModelConfig(
        name=name,
        architecture="",
        n_params=shape.n_params,
        n_params_active=shape.active,
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        hidden_size=hidden,
        intermediate_size=max(128, int(per_layer) // 128 * 128),
        vocab_size=VOCABULARY,
        context=CONTEXT,
        weight_bits=8 * shape.bytes_per_param,
        n_experts=n_experts,
        n_experts_used=n_used,
        kv_latent=shape.kv_width,
    )
