"""The simulated engine of a model on a kind of GPU: fitted step times, and the KV that fits beside the weights.

Asked by `manage.py simulate` and by the studies, so that all of them mean the same replica by the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autoscaler.policy.gpumix import Kind
from autoscaler.sim.enginemodel import EngineSpec
from controlplane.policy.gpus import PRICES, gpu
from controlplane.policy.models import model
from controlplane.policy.perfmodel import kv_tokens
from controlplane.prediction.perf.coefficients import coefficients


def engine_spec(
    model_name: str,
    gpu_name: str,
    tp: int = 1,
    *,
    dtype: str = "bf16",
    max_seqs: int = 256,
    prefix_caching: bool = True,
) -> EngineSpec:
    """ValueError for unknown names, and for a model whose weights do not fit on `tp` GPUs."""
    shape, card = model(model_name).with_dtype(dtype), gpu(gpu_name)
    room = kv_tokens(shape, card, tp)
    if room == 0:
        raise ValueError(f"gpu {gpu_name}: {model_name} in {dtype} does not fit on {tp}; take more GPUs (tp)")
    step = coefficients().step_model(shape, card, tp)
    return EngineSpec(step, room, max_seqs, prefix_caching=prefix_caching)


def told(model_name: str, gpu_name: str, tp: int = 1, *, dtype: str = "bf16") -> str:
    """The replica in words, with what its times rest on, for a list of assumptions."""
    return f"{model_name} ({dtype}) on {tp} x {gpu_name}, step times {coefficients().basis(gpu(gpu_name))}"


def kinds(
    model_name: str,
    gpu_names: Sequence[str],
    tps: Sequence[int] = (1,),
    *,
    dtype: str = "bf16",
    prices: Mapping[str, float] | None = None,
) -> list[Kind]:
    """Replicas of the model on each kind of GPU, as many GPUs as named, where its weights fit. `prices`: USD per GPU
    hour instead of the catalogue's. ValueError for a GPU without a price."""
    found = []
    shape = model(model_name).with_dtype(dtype)
    for name in gpu_names:
        card = gpu(name)
        usd_per_h = (prices or {}).get(name) or (PRICES[name].usd_per_h if name in PRICES else None)
        if usd_per_h is None:
            raise ValueError(f"gpu {name}: has no price in the catalogue; give one as {name}=USD")
        for tp in tps:
            room = kv_tokens(shape, card, tp)
            if room:
                step = coefficients().step_model(shape, card, tp)
                label = name if tp == 1 else f"{tp}x{name}"
                found.append(Kind(label, usd_per_h * tp, step, room))
    return found
