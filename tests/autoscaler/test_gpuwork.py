"""Machines with different GPUs are weighed by what they do for the deployment that waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from django.utils import timezone

from autoscaler import gpuwork, market
from autoscaler.policy.sizes import Need
from controlplane.deployments import usage, versions
from controlplane.deployments.models import Deployment, ModelSource
from infra.providers.base import Offering
from tests.autoscaler.conftest import Scaling
from tests.booked import book_usage
from tests.database import acting_as

LLAMA_1B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "hidden_size": 2048, "intermediate_size": 8192, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip
L4 = Offering(
    instance_type="g6.xlarge", zone="z", is_spot=False, price_nano_per_h=805_000_000, gpu="l4", n_gpus=1
)
L40S = replace(L4, instance_type="g6e.xlarge", price_nano_per_h=1_600_000_000, gpu="l40s")


@pytest.fixture
def llama(scaling: Scaling) -> Deployment:
    """A model with its config.json, in a market of two GPUs."""
    scaling.provider.kinds = [L4, L40S]
    scaling.configure(accelerator="l4")
    version = versions.register(
        organization_id=scaling.world.organization.id,
        digest="cd" * 32,
        name="llama-3.2-1b",
        source_kind=ModelSource.DIRECTORY,
        source_uri="file:///nowhere",
        size_bytes=2_500_000_000,
        max_model_len=131_072,
        n_params=1_240_000_000,
        config=LLAMA_1B,
    )
    scaling.change(model_version_id=version.id)
    return Deployment.objects.select_related("model_version", "slo_class").get(id=scaling.deployment.id)


def _first(scaling: Scaling, deployment: Deployment | None) -> tuple[str, tuple[str, ...]]:
    plan = market.plan(scaling.provider, scaling.house.config, "c0", deployment=deployment)
    assert plan is not None
    return plan.names[0].rpartition("/")[2], plan.reasons


def test_a_dearer_gpu_is_bought_first_where_it_does_more_than_its_price(
    scaling: Scaling, llama: Deployment
) -> None:
    assert _first(scaling, None)[0] == "g6.xlarge", "without a model the lower price counts"
    name, reasons = _first(scaling, llama)
    work = gpuwork.replicas_for_the_same(llama, {"l4", "l40s"}, Need("l4"), timezone.now())
    assert work["l4"] == 1.0
    assert name == "g6e.xlarge"
    assert 0.3 < work["l40s"] < 0.5, "it has 2.9 times the bandwidth, at twice the price"
    assert reasons[-1] == f"replicas for the same work, prices include it: l40s {work['l40s']:.2f}, l4 1.00"


def test_its_own_requests_say_how_much(scaling: Scaling, llama: Deployment) -> None:
    now = timezone.now()
    typical = gpuwork.replicas_for_the_same(llama, {"l4", "l40s"}, Need("l4"), now)
    for _ in range(3):
        book_usage(scaling.world, deployment_id=llama.id, n_prompt_tokens=6_000, n_completion_tokens=4)
    book_usage(
        scaling.world, n_prompt_tokens=1, n_cached_tokens=0, n_completion_tokens=1
    )  # another deployment's
    now = timezone.now()
    with acting_as("corral_operator"):
        sizes = usage.request_sizes(organization_id=llama.organization_id, deployment_id=llama.id, now=now)
        long = gpuwork.replicas_for_the_same(llama, {"l4", "l40s"}, Need("l4"), now)
    assert sizes == [(6_000, 4)] * 3
    assert abs(long["l40s"] - typical["l40s"]) > 0.01, "prompts are arithmetic, answers are bandwidth"


def test_nothing_is_weighed_where_nobody_can_tell(scaling: Scaling, llama: Deployment) -> None:
    now = timezone.now()
    assert gpuwork.replicas_for_the_same(llama, {"l4"}, Need("l4"), now) == {}
    assert gpuwork.replicas_for_the_same(llama, {"l4", ""}, Need("l4"), now) == {}
    llama.model_version.config = {}
    assert gpuwork.replicas_for_the_same(llama, {"l4", "l40s"}, Need("l4"), now) == {}
