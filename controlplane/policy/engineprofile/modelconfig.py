"""From a model's own config.json to `ModelConfig`. Pure: the caller read the file.

Names differ by family; where a family says nothing (KV heads, width of a head) the Hugging Face default counts. How
many parameters there are is computed when nobody counted them, by the matrices every decoder of that shape has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from controlplane.policy.engineprofile.types import ImpossibleError, ModelConfig, Refusal

_BITS: Final = {"fp8": 8.0, "fbgemm_fp8": 8.0, "mxfp4": 4.5, "nvfp4": 4.5}


def model_config(
    name: str, config: Mapping[str, Any], *, n_params: float = 0.0, max_model_len: int = 0
) -> ModelConfig:
    """Raises ImpossibleError naming the entry that is missing or wrong.

    `n_params` as counted in the weights, 0 = compute it; `max_model_len` overrides what the file says of the context.
    """
    told = config.get("text_config") if isinstance(config.get("text_config"), Mapping) else None
    text: Mapping[str, Any] = {**config, **told} if told is not None else config
    n_layers = _count(text, "num_hidden_layers", "n_layer")
    n_heads = _count(text, "num_attention_heads", "n_head")
    hidden = _count(text, "hidden_size", "n_embd")
    inner = _count(text, "intermediate_size", "n_inner", default=4 * hidden)
    n_experts = _count(text, "num_local_experts", "num_experts", "n_routed_experts", default=0)
    n_used = _count(text, "num_experts_per_tok", default=0) if n_experts else 0
    expert_inner = _count(text, "moe_intermediate_size", default=inner) if n_experts else inner
    if n_experts and not 1 <= n_used <= n_experts:
        raise _wrong("num_experts_per_tok", f"{n_used} of {n_experts} experts cannot serve a token")
    n_kv = _count(text, "num_key_value_heads", default=n_heads)
    head_dim = _count(text, "head_dim", default=hidden // n_heads)
    latent = _count(text, "kv_lora_rank", default=0)
    if latent:
        latent += _count(text, "qk_rope_head_dim", default=0)
    vocab = _count(text, "vocab_size")
    quantization, bits, kv_scales = _quantization(config, text)
    attention = hidden * head_dim * (2 * n_heads + 2 * n_kv)
    embeddings = vocab * hidden * (1 if text.get("tie_word_embeddings") else 2)
    n_mlps = n_experts or 1
    computed = embeddings + n_layers * (attention + n_mlps * 3 * hidden * expert_inner)
    total = n_params or float(computed)
    idle = n_layers * (n_experts - n_used) * 3 * hidden * expert_inner
    return ModelConfig(
        name=name,
        architecture=str(next(iter(config.get("architectures") or ()), "")),
        n_params=total,
        n_params_active=max(total - idle, total * 0.01) if n_experts else total,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv,
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=expert_inner,
        vocab_size=vocab,
        context=max_model_len or _count(text, "max_position_embeddings", "n_positions"),
        dtype=_dtype(text),
        quantization=quantization,
        weight_bits=bits or {"float32": 32.0}.get(_dtype(text), 16.0),
        n_experts=n_experts,
        n_experts_used=n_used,
        kv_latent=latent,
        kv_scales=kv_scales,
    )


def _count(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """The first of these entries that is there."""
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**12:
            raise _wrong(name, f"{value!r} is no count")
        if value == 0 and default is None:
            raise _wrong(name, "0 is not possible")
        return value
    if default is None:
        raise _wrong(names[0], "is missing")
    return default


def _dtype(config: Mapping[str, Any]) -> str:
    told = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    return told if told in ("float32", "float16", "bfloat16") else "bfloat16"


def _quantization(config: Mapping[str, Any], text: Mapping[str, Any]) -> tuple[str, float, bool]:
    """(method, bits of a weight, whether 8-bit KV comes with scales): '', 0 for plain weights."""
    found = config.get("quantization_config") or text.get("quantization_config")
    if not isinstance(found, Mapping):
        return "", 0.0, False
    method = str(found.get("quant_method", "")).lower()
    kv_scales = bool(found.get("kv_cache_scheme"))
    if method in _BITS:
        return method, _BITS[method], kv_scales
    bits = found.get("bits", found.get("w_bit"))
    groups = found.get("config_groups")
    if bits is None and isinstance(groups, Mapping):
        weights = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)]
        bits = next((w.get("num_bits") for w in weights if isinstance(w, Mapping)), None)
    if not isinstance(bits, int | float) or not 1 <= bits <= 16:
        raise _wrong("quantization_config", f"{method or 'it'} does not say how many bits a weight has")
    return method, float(bits) + (0.5 if bits < 8 else 0.0), kv_scales  # groups of weights carry a scale


def _wrong(entry: str, why: str) -> ImpossibleError:
    return ImpossibleError(
        (
            Refusal(
                "model", "config_unreadable", f"config.json: {entry} {why}", "correct the model's config.json"
            ),
        )
    )
