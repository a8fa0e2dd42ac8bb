"""Profiles for the processor: the local stack's engine. Pure.

There is no performance model of a shared processor worth its name (walls vary threefold with the neighbours), so what
is chosen here rests on measurements of vLLM 0.32 on two cores and on memory alone. How many requests a replica is
really given follows its latency while it runs (autoscaler/watch/slots.py); max_num_seqs is only the ceiling of that.
"""

from __future__ import annotations

from typing import Final

from controlplane.policy.engineprofile import numbers
from controlplane.policy.engineprofile.types import (
    Compiled,
    Hardware,
    ImpossibleError,
    ModelConfig,
    Override,
    Promise,
    Refusal,
    Scalar,
    Value,
    Wish,
)
from controlplane.policy.gpus import GIB

CONTEXT: Final = 2048  # longer prompts hold everybody up for seconds on two cores
SEQS: Final = 64
CHUNK: Final = 2048
KV_LEAST: Final = 256 << 20
KV_MOST: Final = 512 << 20  # more takes longer to zero at a cold start
KV_SHARE: Final = 1 / 4  # of a full batch of full contexts: most answers are short
MEMORY_SHARE: Final = 0.5  # the machine runs more than one replica


def compile_cpu(model: ModelConfig, hardware: Hardware, promise: Promise, wish: Wish) -> Compiled:
    """Raises ImpossibleError."""
    dtype = _own(wish, numbers.dtype(model, hardware, Wish()))
    quantization, kv_dtype = numbers.quantization(model, hardware), numbers.kv_dtype(model, hardware, wish)
    width = 4.0 if dtype.value == "float32" else 2.0
    per_token = model.n_layers * model.kv_width * (1.0 if str(kv_dtype.value).startswith("fp8") else width)
    context = _own(wish, Value(
        "max_model_len", min(model.context, CONTEXT),
        "what the model was made for" if model.context <= CONTEXT
        else f"a longer prompt holds everybody up for seconds on a processor; the model could take {model.context}",
        {"model_context": model.context},
    ))  # fmt: skip
    _whole("max_model_len", context.value, 16, model.context)
    n_seqs = _own(wish, Value(
        "max_num_seqs", SEQS, "a ceiling: live slot control gives fewer", {"itl_ms": promise.itl_ms}
    ))  # fmt: skip
    _whole("max_num_seqs", n_seqs.value, 1, 4096)
    wanted = int(KV_SHARE * int(n_seqs.value or 1) * int(context.value or 1) * per_token)
    kv = min(max(wanted, KV_LEAST), KV_MOST)
    kv_value = _own(wish, Value(
        "kv_cache_bytes", kv,
        f"{kv // max(int(per_token), 1)} tokens at {per_token / 1024:.1f} KiB each; stated, so that the engine need "
        "not measure (0.16 s per 256 MiB to zero)",
        {"bytes_per_token": per_token, "n_seqs": n_seqs.value, "context": context.value},
    ))  # fmt: skip
    if int(kv_value.value or 0) < per_token * int(context.value or 1):
        fits = int(int(kv_value.value or 0) / per_token)
        raise ImpossibleError((Refusal(
            "kv_cache_bytes", "context_does_not_fit",
            f"{kv_value.value} bytes hold {fits} tokens, one sequence needs {context.value}",
            f"set at least {int(per_token * int(context.value or 1))} bytes, or max_model_len to at most {fits}",
        ),))  # fmt: skip
    weights = model.n_params * (width if not model.quantization else model.weight_bits / 8)
    needs = weights + float(kv_value.value or 0)
    if hardware.memory_bytes and needs > MEMORY_SHARE * hardware.memory_bytes:
        raise ImpossibleError((Refusal(
            "gpu", "weights_do_not_fit",
            f"{weights / GIB:.1f} GiB of weights and {float(kv_value.value or 0) / GIB:.2f} GiB of KV are more "
            f"than half of {hardware.memory_bytes / GIB:.0f} GiB",
            "choose a smaller model, or a machine with a GPU",
        ),))  # fmt: skip
    tp = wish.get("tensor_parallel_size")
    if tp is not None and tp.value != 1:
        raise ImpossibleError((Refusal(
            "tensor_parallel_size", "one_processor", f"{tp.value} processors in one replica", "leave it 1 on the CPU"
        ),))  # fmt: skip
    sleep = wish.get("sleep_level")
    if sleep is not None and sleep.value != 0:
        raise ImpossibleError((Refusal(
            "sleep_level", "no_sleep_on_cpu", "vLLM has no sleep mode on a processor (0.32 refuses to start)",
            "leave it 0: a warm machine forks a replica anew in about a second",
        ),))  # fmt: skip
    values = [
        dtype, quantization, kv_dtype, context, n_seqs,
        _own(wish, Value("max_num_batched_tokens", max(CHUNK, int(n_seqs.value or 1)),
             "no model of a shared processor says more; live control of slots keeps the pace")),
        _own(wish, Value("long_prefill_token_threshold", 0, "not measured here: a prompt may have a whole step")),
        kv_value,
        _own(wish, Value("block_size", None, "the engine's own (128); finer ones work and were not measured")),
        _own(wish, Value("enforce_eager", True, "compiling takes longer than the requests of an idle model last")),
        _own(wish, Value("enable_prefix_caching", True, "2,000 cached tokens start in 0.2 s instead of 3 s")),
        _own(wish, Value("tensor_parallel_size", 1, "there is one processor, and nothing to share")),
        _own(wish, Value("max_loras", min(wish.n_adapters, 16), f"{wish.n_adapters} adapters are to be served")),
        _own(wish, Value("load_format", "safetensors", "the model cache holds nothing else")),
        _own(wish, Value("sleep_level", 0, "vLLM has no sleep mode on a processor; the fork server takes its place")),
        _own(wish, Value("speculative_method", "", "rejected drafts doubled the CPU time of a token")),
    ]  # fmt: skip
    chunk = next(v for v in values if v.name == "max_num_batched_tokens")
    if int(chunk.value or 0) < int(n_seqs.value or 1):
        raise ImpossibleError((Refusal(
            "max_num_batched_tokens", "chunk_below_batch",
            f"{chunk.value} new tokens in a step cannot give {n_seqs.value} sequences one each",
            f"set at least {n_seqs.value}, or a smaller max_num_seqs",
        ),))  # fmt: skip
    tokens = int(int(kv_value.value or 0) / per_token)
    return Compiled(
        tuple(values), {"weights_gib_per_gpu": round(weights / GIB, 2), "kv_tokens": float(tokens)}
    )


def _own(wish: Wish, chosen: Value) -> Value:
    own: Override | None = wish.get(chosen.name)
    if own is None:
        return chosen
    inputs: dict[str, Scalar] = {**chosen.inputs, "instead_of": chosen.value}
    return Value(chosen.name, own.value, own.reason or "the operator set it", inputs, overridden=True)


def _whole(field: str, value: Scalar, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ImpossibleError(
            (
                Refusal(
                    field,
                    "out_of_range",
                    f"{value} is out of range",
                    f"set a whole number from {low} to {high}",
                ),
            )
        )
