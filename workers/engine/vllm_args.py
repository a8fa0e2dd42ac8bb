"""From an engine profile to vLLM's own arguments: the one place that knows both vocabularies.

Called by vllm.py when an engine is made, and by `manage.py profile`, which prints them. Imports no vLLM: a test has
vLLM's own parser read what comes out.
"""

from __future__ import annotations

import json
from typing import Any, Final

from workers.engine.base import EngineProfile

# Knobs that vLLM knows by the same name; None leaves its default.
_SAME: Final = (
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "enforce_eager",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "gpu_memory_utilization",
    "kv_cache_dtype",
    "quantization",
    "attention_backend",
    "load_format",
    "enable_prefix_caching",
)

# Answers that follow a schema. vLLM's own choice (xgrammar) let control characters into strings in 16 of 20 answers of
# a random model, guidance none of 20 (measured 2026-11-20); free white space lets a model that has lost its way
# write blanks up to its limit.
STRUCTURED_OUTPUTS: Final = {"backend": "guidance", "disable_any_whitespace": True}


def engine_args(profile: EngineProfile) -> dict[str, Any]:
    """Keyword arguments of AsyncEngineArgs, by its own names; without the model and what is ours alone."""
    found = {name: value for name in _SAME if (value := getattr(profile, name)) is not None}
    if profile.gpu_memory_utilization is None:
        found["kv_cache_memory_bytes"] = profile.kv_cache_bytes
    if profile.long_prefill_token_threshold:
        found["long_prefill_token_threshold"] = profile.long_prefill_token_threshold
    if profile.sleep_level:
        found["enable_sleep_mode"] = True
    if profile.max_loras:
        found |= {"enable_lora": True, "max_loras": profile.max_loras, "max_lora_rank": profile.max_lora_rank}
    if profile.speculative_method:
        told: dict[str, Any] = {
            "method": profile.speculative_method,
            "num_speculative_tokens": profile.num_speculative_tokens,
        }
        if profile.speculative_model:
            told["model"] = profile.speculative_model
        if profile.speculative_method == "ngram":
            told |= {"prompt_lookup_max": 4, "prompt_lookup_min": 2}
        found["speculative_config"] = told
    return {
        **found,
        "scheduling_policy": "priority",
        "trust_remote_code": False,
        "structured_outputs_config": STRUCTURED_OUTPUTS,
    }


def argv(args: dict[str, Any]) -> list[str]:
    """The same as flags of `vllm serve`."""
    flags: list[str] = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
