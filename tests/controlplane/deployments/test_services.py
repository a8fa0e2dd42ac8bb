"""Model versions and deployments as the services make, change and end them."""

from typing import Any

import pytest

from controlplane.deployments import selectors, services
from controlplane.deployments.models import Deployment, ModelSource, Phase
from controlplane.deployments.services import Change
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.tenants.context import tenant
from tests.world import World, make_deployment, make_version


def read(world: World, deployment: Deployment) -> Deployment:
    with tenant(world.organization.id):
        return selectors.deployment(organization_id=world.organization.id, deployment_id=deployment.id)


def change(world: World, deployment: Deployment, expected: int | None = None, **values: Any) -> Deployment:
    return services.update_deployment(
        organization_id=world.organization.id,
        deployment_id=deployment.id,
        change=Change(**values),
        expected_generation=expected,
    )


def test_the_profile_is_stored_whole_and_within_the_model(world: World, deployment: Deployment) -> None:
    assert deployment.engine == "toy"
    assert deployment.engine_profile["max_model_len"] == 2048
    assert deployment.engine_profile["max_num_seqs"] == 64
    short = make_version(world.organization.id, digest="b" * 64, max_model_len=512)
    second = make_deployment(world, "short", model_version_id=short.id)
    assert second.engine_profile["max_model_len"] == 512


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"engine": "toy", "max_num_seqs": 0}, "max_num_seqs = 0 is out of range; allowed: 1 to 4096"),
        ({"engine": "gpt"}, "engine = 'gpt'"),
        ({"engine": "toy", "colour": "red"}, "unknown knob 'colour'"),
        ({"engine": "toy", "max_model_len": 8192}, "at most 4096 tokens"),
        ({"engine": "toy", "max_model_len": "long"}, "engine profile"),
        ({"engine": "vllm"}, "needs weights"),
    ],
)
def test_a_bad_profile_is_refused_with_knob_value_and_range(
    world: World, profile: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match="engine profile") as refused:
        make_deployment(world, engine_profile=profile)
    assert message in refused.value.message
    assert refused.value.field == "engine_profile"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"min_replicas": -1}, "min_replicas"),
        ({"min_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"max_replicas": 0}, "max_replicas"),
        ({"max_replicas": 1001}, "max_replicas"),
        ({"idle_timeout_s": -5}, "idle_timeout_s"),
        ({"slo_class": "instant"}, "slo_class"),
        ({"queue_order": "lifo"}, "queue_order"),
        ({"locality_window_tokens": -1}, "locality_window_tokens"),
        ({"locality_window_tokens": 1_000_001}, "locality_window_tokens"),
        ({"price": "free"}, "price"),
    ],
)
def test_a_bad_value_is_named(world: World, values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError, match=field) as refused:
        make_deployment(world, **values)
    assert refused.value.field == field


def test_a_name_that_is_no_model_id_is_refused(world: World) -> None:
    for name in ("", " ", "-x", "a b", "x" * 65):
        with pytest.raises(InvalidInputError) as refused:
            make_deployment(world, name)
        assert refused.value.field == "name"


def test_a_name_is_taken_until_its_deployment_is_deleted(world: World, deployment: Deployment) -> None:
    with pytest.raises(ConflictError, match="toy-chat"):
        make_deployment(world)
    services.delete_deployment(organization_id=world.organization.id, deployment_id=deployment.id)
    with pytest.raises(NotFoundError):
        read(world, deployment)
    with tenant(world.organization.id):
        deleted = Deployment.objects.get(id=deployment.id)
    assert (deleted.phase, deleted.generation) == (Phase.DELETED, 2)
    assert make_deployment(world).id != deployment.id


def test_a_change_raises_the_generation_and_a_non_change_does_not(
    world: World, deployment: Deployment
) -> None:
    assert change(world, deployment, max_replicas=3).generation == 2
    assert change(world, deployment, max_replicas=3).generation == 2
    assert read(world, deployment).max_replicas == 3


def test_a_change_of_what_has_changed_meanwhile_is_refused(world: World, deployment: Deployment) -> None:
    change(world, deployment, max_replicas=3)
    with pytest.raises(ConflictError) as refused:
        change(world, deployment, expected=1, max_replicas=4)
    assert refused.value.field == "generation"
    assert read(world, deployment).max_replicas == 3
    assert change(world, deployment, expected=2, max_replicas=4).generation == 3


def test_a_bad_change_changes_nothing(world: World, deployment: Deployment) -> None:
    with pytest.raises(InvalidInputError):
        change(world, deployment, min_replicas=9, idle_timeout_s=10)
    assert read(world, deployment).generation == 1


def test_a_shorter_model_is_compiled_for_and_an_override_must_fit_it(
    world: World, deployment: Deployment
) -> None:
    short = make_version(world.organization.id, digest="b" * 64, max_model_len=512)
    changed = change(world, deployment, model_version_id=short.id)
    assert changed.engine_profile["max_model_len"] == 512
    insists = make_deployment(world, "long", engine_profile={"engine": "toy", "max_model_len": 1024})
    with pytest.raises(InvalidInputError, match="at most 512"):
        change(world, insists, model_version_id=short.id)


def test_a_stranger_cannot_change_delete_or_use_it(world: World, deployment: Deployment) -> None:
    stranger = world.other_organization.id
    with pytest.raises(NotFoundError):
        services.delete_deployment(organization_id=stranger, deployment_id=deployment.id)
    with pytest.raises(NotFoundError):
        services.update_deployment(
            organization_id=stranger, deployment_id=deployment.id, change=Change(max_replicas=5)
        )
    with pytest.raises(NotFoundError, match="model version"):
        services.create_deployment(
            organization_id=stranger,
            project_id=world.other_project.id,
            name="borrowed",
            model_version_id=deployment.model_version_id,
            engine_profile={"engine": "toy"},
        )
    with tenant(stranger):
        assert selectors.deployments(organization_id=stranger) == []


def test_registering_the_same_weights_twice_is_one_version(world: World) -> None:
    assert make_version(world.organization.id).id == make_version(world.organization.id, name="again").id
    assert make_version(world.other_organization.id).id != make_version(world.organization.id).id


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"digest": "A" * 64}, "digest"),
        ({"size_bytes": -1}, "size_bytes"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"source_kind": "ftp"}, "source_kind"),
        ({"name": ""}, "name"),
    ],
)
def test_bad_weights_are_named(world: World, values: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        make_version(world.organization.id, **values)
    assert refused.value.field == field


def test_setting_up_twice_changes_nothing_and_a_difference_is_applied(world: World) -> None:
    version = make_version(world.organization.id)

    def set_up(**values: Any) -> Deployment:
        return services.ensure_deployment(
            organization_id=world.organization.id,
            project_id=world.project.id,
            name="demo",
            model_version_id=version.id,
            engine_profile={"engine": "toy"},
            **values,
        )

    assert (set_up().id, set_up().generation) == (set_up().id, 1)
    assert set_up(max_replicas=4).generation == 2


def test_deployments_of_weights_with_an_engine_that_needs_them(world: World) -> None:
    weights = make_version(
        world.organization.id,
        digest="c" * 64,
        source_kind=ModelSource.DIRECTORY,
        source_uri="file:///models/x",
    )
    assert make_deployment(world, "real", model_version_id=weights.id, engine_profile={}).engine == "vllm"


def test_order_and_window_of_the_queue_can_be_changed(world: World, deployment: Deployment) -> None:
    assert (deployment.queue_order, deployment.locality_window_tokens) == ("edf", 2_000)
    changed = change(world, deployment, queue_order="sjf", locality_window_tokens=0)
    assert (changed.queue_order, changed.locality_window_tokens, changed.generation) == ("sjf", 0, 2)
    with pytest.raises(InvalidInputError, match="queue_order"):
        change(world, deployment, queue_order="lifo")
