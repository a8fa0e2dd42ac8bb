"""How fast a replica should be before anybody saw it work: what the performance model says of its model, engine
profile and GPUs.

Called by table.py for every replica; gateways begin their predictions with it (controlplane/gateway/forecasts.py) and
go by what they see soon after. Where nothing is known (a processor's cores, a GPU or a model without a description) it
says nothing, and they begin as ever.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from autoscaler.models import Offer, Replica
from controlplane.deployments.models import ModelVersion
from controlplane.policy.engineprofile import batch
from controlplane.policy.engineprofile.memory import Layout
from controlplane.policy.engineprofile.modelconfig import model_config
from controlplane.policy.engineprofile.types import ImpossibleError, ModelConfig
from controlplane.policy.gpus import GPUS
from controlplane.policy.pace import Speed
from controlplane.prediction.perf.coefficients import coefficients
from workers.engine.base import EngineProfile, ProfileError

_N_RUNNING: Final = 16  # how many run beside it, and how long their contexts are: what is usual anywhere
_N_CONTEXT: Final = 1_000


@functools.lru_cache(maxsize=4096)
def told(spec_digest: str, offering: str, cell: str, provider: str) -> str:
    """`Speed.text` of the replicas that run this on such machines; '' where it cannot be told. Asks Postgres the first
    time: a digest stands for a model and a profile, an offering for its GPUs, and neither changes."""
    row = Replica.objects.filter(spec_digest=spec_digest).only("spec").first() if spec_digest else None
    if row is None:
        return ""
    try:
        profile = EngineProfile.from_json(dict(row.spec.get("profile") or {}))
    except ProfileError:
        return ""
    config = _config(str(row.spec.get("model_digest", "")))
    offer = Offer.objects.filter(cell=cell, provider=provider, name=offering).first() if offering else None
    found = speed(profile, config, "" if offer is None else offer.gpu)
    return "" if found is None else found.text


def _config(model_digest: str) -> Mapping[str, Any] | None:
    """The config.json of those weights, whoever brought them; None where nobody did with one."""
    known = ModelVersion.objects.filter(digest=model_digest).exclude(config=None)
    found: Mapping[str, Any] | None = known.values_list("config", flat=True).first()
    return found


def speed(profile: EngineProfile, config: Mapping[str, Any] | None, gpu: str) -> Speed | None:
    """Of a model (its config.json) under that profile on such GPUs; of the toy engine, which is as slow as it is told
    to be, without either."""
    if profile.engine == "toy":
        step_ms, token_ms = profile.toy_step_ms, profile.toy_prefill_ms / 1000
        return Speed(
            (step_ms + profile.toy_seq_ms) / 1000,
            token_ms / 1000,
            (step_ms + profile.toy_seq_ms * _N_RUNNING) / 1000,
        )
    if not config or gpu not in GPUS:
        return None
    layout = Layout(
        profile.tensor_parallel_size,
        profile.pipeline_parallel_size,
        profile.data_parallel_size,
        profile.enable_expert_parallel,
    )
    try:
        model = _as_run(model_config("", config), profile.dtype)
    except ImpossibleError:
        return None
    kv_bytes = 1.0 if profile.kv_cache_dtype.startswith("fp8") else 4.0 if profile.dtype == "float32" else 2.0
    known = coefficients()
    found = batch.pace(model, GPUS[gpu], layout, known.by_gpu.get(gpu, known.common), kv_bytes)
    chunk = profile.max_num_batched_tokens or _N_CONTEXT
    first_ms, long_ms = (found.prefill_ms(n, chunk) for n in (1, 1 + _N_CONTEXT))
    return Speed(
        first_ms / 1000,
        max(long_ms - first_ms, 0.0) / _N_CONTEXT / 1000,
        found.step_ms(0, _N_RUNNING, _N_CONTEXT) / 1000,
    )


def _as_run(model: ModelConfig, dtype: str) -> ModelConfig:
    """Plain weights are as wide as the engine is told to keep them."""
    if model.quantization or dtype == "auto":
        return model
    return replace(model, weight_bits=32.0 if dtype == "float32" else 16.0)
