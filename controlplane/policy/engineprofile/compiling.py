"""`compile_profile`: model, hardware, promise and wish in; an engine's settings with their reasons out, or refusals.

The order of the rules: numbers, split, memory, context, batch, chunk, adapters, speculation, the rest. An override
replaces what a rule would choose and is then held to everything after it, so that what an operator insists on is
refused for the same reasons as what nobody would choose. Pure; equal inputs give equal outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from controlplane.policy.engineprofile import batch, layout, memory, numbers, onecpu
from controlplane.policy.engineprofile.batch import Pace
from controlplane.policy.engineprofile.memory import Layout, Room
from controlplane.policy.engineprofile.speculation import speculation
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
from controlplane.policy.perfmodel import ROOFLINE, Efficiency

_SPLIT: Final = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
)
_MEMORY: Final = ("beyond_the_model", "context_does_not_fit", "weights_do_not_fit")
MODEL_ERROR: Final = 0.15  # of the performance model, median over GPUs it was not fitted on
MAX_NODE: Final = 8  # GPUs with links between them; engines over several machines are not started here


@dataclass(frozen=True, slots=True)
class _Fit:
    """A split that holds the model, and what it does there."""

    layout: Layout
    room: Room
    pace: Pace
    kv_tokens: int
    context: int
    n_seqs: int
    why_seqs: str
    tokens_per_s: float


def compile_profile(
    model: ModelConfig, hardware: Hardware, promise: Promise, wish: Wish, efficiency: Efficiency = ROOFLINE
) -> Compiled:
    """Raises ImpossibleError: what cannot run, with field, reason and remedy."""
    if hardware.gpu is None:
        return onecpu.compile_cpu(model, hardware, promise, wish)
    if not 1 <= hardware.n <= MAX_NODE:
        raise _refused(
            "n_gpus",
            "too_many_gpus",
            f"{hardware.n} GPUs in one replica",
            f"choose 1 to {MAX_NODE}: one machine's",
        )
    dtype, quantization = numbers.dtype(model, hardware, wish), numbers.quantization(model, hardware)
    if not model.quantization:
        model = replace(model, weight_bits=32.0 if dtype.value == "float32" else 16.0)
    kv_dtype = numbers.kv_dtype(model, hardware, wish)
    bytes_per_kv = numbers.kv_bytes(kv_dtype, str(dtype.value))
    share = memory.utilization(hardware, wish)
    rank, n_loras, lora_values = _adapters(wish)
    fits, refusals = [], []
    for each in _layouts(hardware, wish):
        found = _fit(model, hardware, promise, wish, efficiency, each, bytes_per_kv, share, n_loras, rank)
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            fits.append(found)
    if not fits:
        raise ImpossibleError(_telling(refusals))
    best = _best(fits, promise, wish)
    values = [dtype, quantization, kv_dtype]
    values += _split_values(model, best.layout, wish, len(fits) - 1)
    values.append(share)
    values.append(_context_value(model, best, wish))
    n_seqs = _own(
        wish,
        "max_num_seqs",
        best.n_seqs,
        best.why_seqs,
        {"kv_tokens": best.kv_tokens, "mean_context": wish.mean_context},
    )
    values.append(n_seqs)
    n_running = int(n_seqs.value or 1)
    size, why = batch.chunk(best.pace, promise, wish, n_running)
    chunk = _own(
        wish,
        "max_num_batched_tokens",
        size,
        why,
        {"itl_ms": promise.itl_ms, "n_streams": n_running, "mean_context": wish.mean_context},
    )
    if int(chunk.value or 0) < n_running:
        raise _refused(
            "max_num_batched_tokens", "chunk_below_batch",
            f"{chunk.value} new tokens in a step cannot give {n_running} sequences one each",
            f"set at least {n_running}, or a smaller max_num_seqs",
        )  # fmt: skip
    values.append(chunk)
    portion, why = batch.portion(best.pace, promise, n_running, int(chunk.value or 1))
    values.append(_own(wish, "long_prefill_token_threshold", portion, why, {"itl_ms": promise.itl_ms}))
    values += lora_values
    values += _speculation_values(best, wish, n_running, model.n_params_active)
    values += _rest(model, wish)
    return Compiled(
        tuple(values),
        _forecast(best, promise, wish, n_running, int(chunk.value or 1)),
        _warnings(best, promise, wish, n_running, int(chunk.value or 1)),
    )


def _layouts(hardware: Hardware, wish: Wish) -> list[Layout]:
    """Those that the operator's overrides leave."""
    names = ("tp", "pp", "dp", "ep")
    asked = {name: wish.get(knob) for name, knob in zip(names, _SPLIT, strict=True)}
    found = [
        each
        for each in layout.layouts(hardware.n)
        if all(own is None or getattr(each, name) == own.value for name, own in asked.items())
    ]
    if not found:
        told = ", ".join(
            f"{knob} = {own.value}" for knob, own in zip(_SPLIT, asked.values(), strict=True) if own
        )
        raise _refused(
            next(knob for knob, own in zip(_SPLIT, asked.values(), strict=True) if own), "gpus_do_not_multiply",
            f"{told} does not use the {hardware.n} GPUs of the replica",
            "choose numbers whose product is the number of GPUs",
        )  # fmt: skip
    return found


def _fit(
    model: ModelConfig, hardware: Hardware, promise: Promise, wish: Wish, efficiency: Efficiency,
    each: Layout, bytes_per_kv: float, share: Value, n_loras: int, rank: int,
) -> _Fit | Refusal:  # fmt: skip
    refusal = layout.impossible(model, each)
    if refusal is not None:
        return refusal
    assert hardware.gpu is not None
    eager = wish.get("enforce_eager")
    most_chunk = batch.MAX_CHUNK_BATCH if promise.itl_ms >= batch.RELAXED_MS else batch.MAX_CHUNK
    own_chunk, own_seqs = wish.get("max_num_batched_tokens"), wish.get("max_num_seqs")
    found = memory.room(
        model,
        hardware,
        each,
        share=float(share.value or 0),
        chunk=int(own_chunk.value) if own_chunk and isinstance(own_chunk.value, int) else most_chunk,
        n_seqs=int(own_seqs.value) if own_seqs and isinstance(own_seqs.value, int) else 256,
        eager=bool(eager and eager.value),
        n_loras=n_loras,
        lora_rank=rank,
    )
    asked = wish.get("max_model_len")
    least = (
        int(asked.value) if asked is not None and isinstance(asked.value, int) else min(model.context, 2048)
    )
    if asked is not None and least > model.context:
        return Refusal(
            "max_model_len", "beyond_the_model", f"the model was made for {model.context} tokens, not {least}",
            f"set at most {model.context}",
        )  # fmt: skip
    refusal = layout.too_large(model, hardware, each, found, least, bytes_per_kv)
    if refusal is not None:
        return refusal
    pace = batch.pace(model, hardware.gpu, each, efficiency, bytes_per_kv)
    tokens = memory.kv_tokens(model, each, found, bytes_per_kv)
    context = least if asked is not None else min(model.context, tokens // each.dp)
    n, why = batch.n_seqs(pace, promise, wish, tokens)
    step_ms = pace.step_ms(0, -(-n // each.dp), wish.mean_context)
    # Stages work on other parts of the batch meanwhile, which step_ms has in it already.
    return _Fit(each, found, pace, tokens, context, n, why, 1000 * n / step_ms)


def _best(fits: list[_Fit], promise: Promise, wish: Wish) -> _Fit:
    """Most tokens per second among those that keep the pace, else the quickest. Within the model's error a simpler
    split wins."""
    keep = [f for f in fits if f.pace.step_ms(0, 1, wish.mean_context) <= promise.itl_ms]
    if not keep:
        return min(fits, key=lambda f: f.pace.step_ms(0, 1, wish.mean_context))
    most = max(f.tokens_per_s for f in keep)
    near = [f for f in keep if f.tokens_per_s >= (1 - MODEL_ERROR) * most]
    return min(near, key=lambda f: (f.layout.pp, f.layout.dp, -f.tokens_per_s))


def _telling(refusals: list[Refusal]) -> tuple[Refusal, ...]:
    """Distinct ones; where memory is what lacks, nobody wants to hear which splits would not divide either."""
    memory_says = [r for r in refusals if r.code in _MEMORY]
    ordered = sorted(memory_says or refusals, key=lambda r: _MEMORY.index(r.code) if r.code in _MEMORY else 9)
    return tuple(
        {r.code: r for r in reversed(ordered)}[code] for code in dict.fromkeys(r.code for r in ordered)
    )


def _split_values(model: ModelConfig, chosen: Layout, wish: Wish, others: int) -> list[Value]:
    reasons = layout.why(model, chosen, others)
    values: Mapping[str, Scalar] = dict(
        zip(_SPLIT, (chosen.tp, chosen.pp, chosen.dp, chosen.ep), strict=True)
    )
    inputs = {
        "heads": model.n_heads,
        "kv_heads": model.n_kv_heads,
        "layers": model.n_layers,
        "n_gpus": chosen.n_gpus,
    }
    return [_own(wish, name, values[name], reasons[name], inputs) for name in _SPLIT]


def _context_value(model: ModelConfig, best: _Fit, wish: Wish) -> Value:
    per_copy = best.kv_tokens // best.layout.dp
    reason = "what the model was made for" if best.context == model.context else (
        f"as many tokens of KV as fit beside the weights; the model could take {model.context}"
    )  # fmt: skip
    return _own(
        wish, "max_model_len", best.context, reason, {"model_context": model.context, "kv_tokens": per_copy}
    )


def _adapters(wish: Wish) -> tuple[int, int, list[Value]]:
    """(rank, slots, values)."""
    own_n, own_rank = wish.get("max_loras"), wish.get("max_lora_rank")
    n = int(own_n.value) if own_n is not None and isinstance(own_n.value, int) else min(wish.n_adapters, 16)
    asked = (
        int(own_rank.value)
        if own_rank is not None and isinstance(own_rank.value, int)
        else wish.lora_rank or 16
    )
    rank = memory.lora_rank(asked)
    if rank is None:
        raise _refused(
            "max_lora_rank", "rank_too_large", f"rank {asked} has no kernels",
            f"use adapters of rank {memory.LORA_RANKS[-1]} or less",
        )  # fmt: skip
    inputs: dict[str, Scalar] = {"n_adapters": wish.n_adapters, "largest_rank": wish.lora_rank}
    if not n:
        return (
            rank,
            0,
            [
                _own(wish, "max_loras", 0, "no adapters: their slots would cost KV", inputs),
                _own(wish, "max_lora_rank", rank, "unused without adapters", inputs),
            ],
        )
    why = f"{wish.n_adapters} adapters, all in one batch" if n >= wish.n_adapters else (
        f"{wish.n_adapters} adapters take turns in {n} slots: more slots would cost KV"
    )  # fmt: skip
    return (
        rank,
        n,
        [
            _own(wish, "max_loras", n, why, inputs),
            _own(
                wish,
                "max_lora_rank",
                rank,
                f"the smallest there are kernels for that holds rank {asked}",
                inputs,
            ),
        ],
    )


def _speculation_values(best: _Fit, wish: Wish, n_running: int, n_params: float) -> list[Value]:
    own = wish.get("speculative_method")
    if own is not None and own.value and wish.acceptance is None:
        n = wish.get("num_speculative_tokens")
        return [
            Value("speculative_method", own.value, own.reason, overridden=True),
            Value("num_speculative_tokens", n.value if n is not None else 3, own.reason, overridden=True),
            Value("speculative_model", wish.draft_model, own.reason, overridden=True),
        ]
    found = speculation(best.pace, wish, n_running, n_params)
    inputs: dict[str, Scalar] = {"acceptance": wish.acceptance, "speedup": round(found.speedup, 3)}
    return [
        _own(wish, "speculative_method", found.method, found.reason, inputs),
        _own(wish, "num_speculative_tokens", found.n_tokens, found.reason, inputs),
        _own(
            wish,
            "speculative_model",
            wish.draft_model if found.method == "eagle" else "",
            found.reason,
            inputs,
        ),
    ]


def _rest(model: ModelConfig, wish: Wish) -> list[Value]:
    block: Scalar = None if model.kv_latent else 16
    return [
        _own(wish, "block_size", block, (
            "the kernels of latent attention choose their own"
            if block is None
            else "tokens per KV block: the finest that all attention kernels have, so most of a prefix is shared"
        )),
        _own(wish, "enable_prefix_caching", True, "requests are routed to where their prompt is cached"),
        _own(wish, "enforce_eager", False, "captured graphs take the launch of kernels off every decoding step"),
        _own(wish, "attention_backend", None, "the engine picks the quickest that this GPU and dtype have"),
        _own(wish, "load_format", "safetensors", "the model cache holds nothing else, and has just written the files"),
        _own(wish, "sleep_level", 0, (
            "idle replicas end: sleeping was not measured on a GPU yet; 1 keeps the weights in the machine's RAM"
        )),
    ]  # fmt: skip


def _forecast(best: _Fit, promise: Promise, wish: Wish, n_running: int, size: int) -> dict[str, float]:
    n = -(-n_running // best.layout.dp)
    step_ms = best.pace.step_ms(0, n, wish.mean_context)
    return {
        "weights_gib_per_gpu": round(best.room.weights / 2**30, 2),
        "kv_gib_per_gpu": round(best.room.kv / 2**30, 2),
        "kv_tokens": float(best.kv_tokens),
        "itl_alone_ms": round(best.pace.step_ms(0, 1, wish.mean_context), 2),
        "itl_full_ms": round(step_ms, 2),
        "ttft_alone_ms": round(best.pace.prefill_ms(wish.mean_prompt, size), 1),
        "tokens_per_s": round(1000 * n_running / step_ms, 1),
    }


def _warnings(best: _Fit, promise: Promise, wish: Wish, n_running: int, size: int) -> tuple[str, ...]:
    found = []
    told = _forecast(best, promise, wish, n_running, size)
    if told["itl_alone_ms"] > promise.itl_ms:
        found.append(
            f"itl: even a lone request takes {told['itl_alone_ms']:.0f} ms per token, promised are {promise.itl_ms:g}: "
            "choose more or faster GPUs, a quantised model, or a slower class"
        )
    if told["ttft_alone_ms"] > promise.ttft_ms:
        found.append(
            f"ttft: a prompt of {wish.mean_prompt} tokens alone takes {told['ttft_alone_ms']:.0f} ms, promised are "
            f"{promise.ttft_ms:g}: choose more or faster GPUs, or a slower class"
        )
    return tuple(found)


def _own(
    wish: Wish, name: str, value: Scalar, reason: str, inputs: Mapping[str, Scalar] | None = None
) -> Value:
    """What was chosen, or what the operator wants instead."""
    own: Override | None = wish.get(name)
    if own is None:
        return Value(name, value, reason, inputs or {})
    told = own.reason or "the operator set it"
    return Value(name, own.value, told, {**(inputs or {}), "instead_of": value}, overridden=True)


def _refused(field: str, code: str, message: str, remedy: str) -> ImpossibleError:
    return ImpossibleError((Refusal(field, code, message, remedy),))
