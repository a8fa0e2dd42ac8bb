"""How a model is split over the GPUs of a replica, and why other splits are impossible. Pure.

Tensor parallelism inside the node (Megatron-LM) is the only one that makes a single token faster; pipeline stages take
what heads do not divide by, or what a slow link would spoil. Copies (data parallelism) are for mixtures of experts
only: copies of a dense model behind one engine would be balanced by a queue that knows nothing of tenants; start
replicas instead. With whole experts on each GPU (expert parallelism) no expert is cut into slices that multiply badly.
Which of the possible splits is taken, the performance model says.
"""

from __future__ import annotations

from controlplane.policy.engineprofile.memory import Layout, Room, kv_bytes_per_token
from controlplane.policy.engineprofile.types import Hardware, ModelConfig, Refusal
from controlplane.policy.gpus import GIB


def layouts(n_gpus: int) -> tuple[Layout, ...]:
    """Every way to use exactly so many GPUs, fewest parts first."""
    found = [
        Layout(tp, pp, n_gpus // (tp * pp), ep)
        for pp in _divisors(n_gpus)
        for tp in _divisors(n_gpus // pp)
        for ep in (False, True)
    ]
    return tuple(sorted(found, key=lambda each: (each.pp, each.dp, each.ep)))


def impossible(model: ModelConfig, layout: Layout) -> Refusal | None:
    """Why the model's shape does not allow this split, whatever memory there is."""
    tp, pp = layout.tp, layout.pp
    if model.n_heads % tp:
        return Refusal(
            "tensor_parallel_size", "heads_not_divisible",
            f"{model.n_heads} attention heads cannot be shared by {tp} GPUs",
            f"choose a number that divides {model.n_heads}",
        )  # fmt: skip
    if not model.kv_latent and model.n_kv_heads % tp and tp % model.n_kv_heads:
        return Refusal(
            "tensor_parallel_size", "kv_heads_not_divisible",
            f"{model.n_kv_heads} KV heads can neither be shared by {tp} GPUs nor copied evenly",
            f"choose a divisor or a multiple of {model.n_kv_heads}",
        )  # fmt: skip
    if not layout.ep and model.intermediate_size % tp:
        return Refusal(
            "tensor_parallel_size", "mlp_not_divisible",
            f"an MLP {model.intermediate_size} wide cannot be cut into {tp}",
            f"choose a number that divides {model.intermediate_size}",
        )  # fmt: skip
    if model.quantization and not layout.ep and (model.intermediate_size // tp) % 64 and tp > 1:
        return Refusal(
            "tensor_parallel_size", "blocks_not_divisible",
            f"{model.quantization} blocks do not fit slices {model.intermediate_size // tp} wide",
            "choose fewer GPUs per layer, or the unquantised model",
        )  # fmt: skip
    if pp > model.n_layers:
        return Refusal(
            "pipeline_parallel_size", "too_few_layers",
            f"{model.n_layers} layers cannot make {pp} stages", f"choose at most {model.n_layers}",
        )  # fmt: skip
    if layout.dp > 1 and not model.n_experts:
        return Refusal(
            "data_parallel_size", "dense_copies",
            f"{layout.dp} copies of a dense model behind one engine", "start that many replicas instead",
        )  # fmt: skip
    if layout.ep and not model.n_experts:
        return Refusal(
            "enable_expert_parallel", "no_experts", "the model has no experts", "leave it off",
        )  # fmt: skip
    if layout.ep and (layout.tp * layout.dp == 1 or model.n_experts % (layout.tp * layout.dp)):
        return Refusal(
            "enable_expert_parallel", "experts_not_divisible",
            f"{model.n_experts} experts cannot be shared by {layout.tp * layout.dp} GPUs",
            f"choose a number above 1 that divides {model.n_experts}",
        )  # fmt: skip
    if layout.dp > 1 and not layout.ep:
        return Refusal(
            "data_parallel_size", "copies_of_experts", "copies of attention are worth it with shared experts only",
            "set enable_expert_parallel",
        )  # fmt: skip
    return None


def too_large(
    model: ModelConfig, hardware: Hardware, layout: Layout, found: Room, n_context: int, bytes_per_kv: float
) -> Refusal | None:
    """Why it does not fit: the weights, or the KV of one sequence of that length beside them."""
    name = f"{layout} of {hardware.name}"
    if found.kv <= 0:
        return Refusal(
            "gpu", "weights_do_not_fit",
            f"{found.weights / GIB:.1f} GiB of weights per GPU and {_rest(found):.1f} GiB of activations and graphs "
            f"leave nothing of {found.usable / GIB:.1f} GiB ({name})",
            "choose more or larger GPUs, or a quantised model",
        )  # fmt: skip
    fits = int(found.kv / kv_bytes_per_token(model, layout, bytes_per_kv))
    if fits < n_context:
        return Refusal(
            "max_model_len", "context_does_not_fit",
            f"{found.kv / GIB:.2f} GiB of KV per GPU hold {fits} tokens, one sequence needs {n_context} ({name})",
            f"set max_model_len to at most {fits}, kv_cache_dtype to fp8 (twice as many), or choose more GPUs",
        )  # fmt: skip
    return None


def why(model: ModelConfig, layout: Layout, others: int) -> dict[str, str]:
    """A sentence for each of the four settings."""
    tp = "one GPU holds it, and nothing is quicker than not to reduce over a link" if layout.n_gpus == 1 else (
        f"{model.n_heads} heads and {model.n_kv_heads} KV heads over {layout.tp} GPUs: all of them work on each token"
        if layout.tp > 1
        else "layers are not cut: stages or experts use the other GPUs"
    )  # fmt: skip
    if others:
        tp += f"; fastest by the model of {others + 1} possible splits"
    pp = "no stages: they let tokens pass no faster" if layout.pp == 1 else (
        f"{layout.pp} stages of {model.n_layers} layers: heads do not divide further"
    )  # fmt: skip
    dp = "one copy: more are replicas of their own, with our queue in front" if layout.dp == 1 else (
        f"{layout.dp} copies of attention share one set of experts"
    )  # fmt: skip
    if not model.n_experts:
        ep = "the model has no experts"
    elif layout.ep:
        ep = f"{model.n_experts} experts over {layout.tp * layout.dp} GPUs, each whole on one"
    else:
        ep = "experts are cut like every matrix: they do not divide otherwise, or the model of step times gains by it"
    return {
        "tensor_parallel_size": tp,
        "pipeline_parallel_size": pp,
        "data_parallel_size": dp,
        "enable_expert_parallel": ep,
    }


def _rest(found: Room) -> float:
    return (found.activations + found.graphs + found.adapters) / GIB


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
