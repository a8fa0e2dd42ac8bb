"""The shapes of common open-weight models, for what is planned before a model was ever loaded. Pure facts.

Read by the simulator, by the choice of GPU types and by the fit of the performance model. Figures are those of each
model's own configuration file; weights are 16 bits wide unless `with_dtype` says otherwise. A model that is not here is
described with `ModelShape`.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from controlplane.policy.perfmodel import ModelShape

# name, parameters, layers, KV heads, width of a head, query heads
_DENSE: Final = (
    ("smollm2-135m", 0.135e9, 30, 3, 64, 9),
    ("llama-3.2-1b", 1.24e9, 16, 8, 64, 32),
    ("llama-3.2-3b", 3.21e9, 28, 8, 128, 24),
    ("llama-3.1-8b", 8.03e9, 32, 8, 128, 32),
    ("llama-3.1-70b", 70.6e9, 80, 8, 128, 64),
    ("llama-3.1-405b", 405.9e9, 126, 8, 128, 128),
    ("llama-2-7b", 6.74e9, 32, 32, 128, 32),
    ("llama-2-13b", 13.0e9, 40, 40, 128, 40),
    ("llama-2-70b", 69.0e9, 80, 8, 128, 64),
    ("codellama-34b", 33.7e9, 48, 8, 128, 64),
    ("mistral-7b", 7.25e9, 32, 8, 128, 32),
    ("mistral-small-24b", 23.6e9, 40, 8, 128, 32),
    ("qwen2.5-7b", 7.62e9, 28, 4, 128, 28),
    ("qwen2.5-14b", 14.8e9, 48, 8, 128, 40),
    ("qwen2.5-32b", 32.8e9, 64, 8, 128, 40),
    ("qwen2.5-72b", 72.7e9, 80, 8, 128, 64),
    ("qwen3-4b", 4.02e9, 36, 8, 128, 32),
    ("qwen3-8b", 8.19e9, 36, 8, 128, 32),
    ("qwen3-14b", 14.8e9, 40, 8, 128, 40),
    ("qwen3-32b", 32.8e9, 64, 8, 128, 64),
    ("gemma-2-9b", 9.24e9, 42, 8, 256, 16),
    ("gemma-2-27b", 27.2e9, 46, 16, 128, 32),
    ("phi-4", 14.7e9, 40, 10, 128, 40),
    ("bloom-176b", 176.2e9, 70, 112, 128, 112),
    ("opt-13b", 12.9e9, 40, 40, 128, 40),
    ("opt-66b", 65.7e9, 64, 72, 128, 72),
)
# The same, then parameters one token reads, and the share of the experts that serve it.
_MIXTURES: Final = (
    ("mixtral-8x7b", 46.7e9, 32, 8, 128, 32, 12.9e9, 2 / 8),
    ("qwen3-30b-a3b", 30.5e9, 48, 4, 128, 32, 3.3e9, 8 / 128),
    ("qwen3-235b-a22b", 235.1e9, 94, 4, 128, 64, 22.2e9, 8 / 128),
    ("gpt-oss-20b", 20.9e9, 24, 8, 64, 64, 3.6e9, 4 / 32),
    ("gpt-oss-120b", 116.8e9, 36, 8, 64, 64, 5.1e9, 4 / 128),
    ("minimax-m2.5", 228.7e9, 62, 8, 128, 48, 10.0e9, 8 / 256),
)
# Latent attention keeps one vector of 512 + 64 numbers per layer and token.
_LATENT: Final = (
    ("deepseek-v3", 671.0e9, 61, 128, 192, 128, 37.0e9, 8 / 256),
    ("kimi-k2.5", 1026.0e9, 61, 64, 192, 64, 32.0e9, 8 / 384),
)

MODELS: Final = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            *(ModelShape(*row) for row in _DENSE),
            *(ModelShape(*row[:6], n_params_active=row[6], expert_share=row[7]) for row in _MIXTURES),
            *(
                ModelShape(*row[:6], n_params_active=row[6], expert_share=row[7], kv_width=576)
                for row in _LATENT
            ),
        )
    }
)


def model(name: str) -> ModelShape:
    """The model of that name; ValueError names those that are known."""
    found = MODELS.get(name)
    if found is None:
        raise ValueError(f"model: {name!r} is not in the catalogue; known: {', '.join(sorted(MODELS))}")
    return found
