"""Engine profiles of deployments: compiled when one is written, kept with their reasons, named by digest."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.specs import engine_digest, replica_spec
from controlplane.deployments import services
from controlplane.deployments.models import Deployment, ModelSource, ModelVersion
from controlplane.deployments.services import Change
from controlplane.errors import InvalidInputError
from controlplane.ids import new_id
from controlplane.rollouts.models import EngineProfile
from controlplane.rollouts.profiles import current
from controlplane.tenants.context import tenant
from tests.world import World, make_deployment, make_version
from workers.modelcache.tiny import _config as tiny_config


def weights(world: World, digest: str = "c" * 64, **values: Any) -> ModelVersion:
    config = tiny_config(4096)
    defaults: dict[str, Any] = {
        "source_kind": ModelSource.DIRECTORY, "source_uri": "file:///models/tiny", "config": config, "name": "tiny",
    }  # fmt: skip
    return make_version(world.organization.id, digest=digest, **(defaults | values))


def row(world: World, deployment: Deployment) -> EngineProfile:
    with tenant(world.organization.id):
        found = current(Deployment.objects.select_related("model_version").get(id=deployment.id))
    assert found is not None
    return found


def change(world: World, deployment: Deployment, **values: Any) -> Deployment:
    return services.update_deployment(
        organization_id=world.organization.id, deployment_id=deployment.id, change=Change(**values)
    )


def test_a_replica_is_started_with_what_was_compiled_and_the_row_says_why(world: World) -> None:
    deployment = make_deployment(world, "tiny", model_version_id=weights(world).id, engine_profile={})
    found = row(world, deployment)
    assert (found.number, found.hardware, found.slo_class) == (1, "cpu", "interactive")
    assert found.digest == engine_digest(deployment)
    spec = replica_spec(deployment, new_id())
    assert spec["profile"] == found.settings == deployment.engine_profile
    chosen = {value["name"]: value for value in found.chosen}
    assert chosen["dtype"]["value"] == spec["profile"]["dtype"] == "float32"
    assert "resumed elsewhere" in chosen["dtype"]["reason"]
    assert spec["profile"]["kv_cache_bytes"] == chosen["kv_cache_bytes"]["value"]


def test_an_override_keeps_its_reason_through_other_changes_and_new_weights(world: World) -> None:
    deployment = make_deployment(
        world,
        "tiny",
        model_version_id=weights(world).id,
        engine_profile={"max_num_seqs": 8},
        profile_reasons={"max_num_seqs": "two cores only"},
    )
    change(world, deployment, max_replicas=3)
    longer = weights(world, "d" * 64, config=tiny_config(1024), max_model_len=1024)
    changed = change(world, deployment, model_version_id=longer.id)
    found = row(world, changed)
    told = {v["name"]: (v["value"], v["reason"]) for v in found.chosen if v["overridden"]}
    assert told == {"max_num_seqs": (8, "two cores only")}
    assert (found.number, changed.engine_profile["max_model_len"]) == (
        2,
        1024,
    )  # compiled anew, not carried over


def test_what_was_compiled_said_back_is_no_override(world: World) -> None:
    deployment = make_deployment(world, "tiny", model_version_id=weights(world).id, engine_profile={})
    same = change(world, deployment, engine_profile=dict(deployment.engine_profile))
    assert same.generation == deployment.generation
    other = change(world, deployment, engine_profile={**deployment.engine_profile, "max_num_seqs": 16})
    assert [v["name"] for v in row(world, other).chosen if v["overridden"]] == ["max_num_seqs"]


def test_going_back_to_former_settings_is_the_former_profile(world: World) -> None:
    deployment = make_deployment(world, "toy")
    change(world, deployment, engine_profile={"engine": "toy", "max_num_seqs": 8})
    back = change(world, deployment, engine_profile={"engine": "toy"})
    assert row(world, back).number == 1
    with tenant(world.organization.id):
        assert EngineProfile.objects.filter(deployment_id=deployment.id).count() == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kv_cache_bytes": 1 << 20}, "one sequence needs 2048"),
        (
            {"max_num_batched_tokens": 64, "max_num_seqs": 64, "tensor_parallel_size": 2},
            "tensor_parallel_size",
        ),
        ({"max_model_len": 8192}, "max_model_len"),
    ],
)
def test_an_override_the_compiler_refuses_is_a_400_with_the_remedy(
    world: World, given: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInputError, match="engine profile") as refused:
        make_deployment(world, "tiny", model_version_id=weights(world).id, engine_profile=given)
    assert words in refused.value.message
    assert refused.value.field == "engine_profile"


def test_a_gpu_cell_compiles_for_its_gpu(world: World, settings: Any) -> None:
    from dataclasses import replace

    settings.AUTOSCALER = replace(settings.AUTOSCALER, accelerator="2xl4")
    deployment = make_deployment(world, "tiny", model_version_id=weights(world).id, engine_profile={})
    found = row(world, deployment)
    assert found.hardware == "2xl4"
    assert deployment.engine_profile["gpu_memory_utilization"] == 0.94
    assert found.forecast["kv_tokens"] > 1e6
    with pytest.raises(InvalidInputError, match=r"without its config\.json"):
        make_deployment(
            world, "old", model_version_id=weights(world, "e" * 64, config=None).id, engine_profile={}
        )
