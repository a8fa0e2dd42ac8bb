"""The playground's page and its short-lived keys."""

from datetime import datetime, timedelta

import pytest
from django.test import Client
from django.utils import timezone

from controlplane.console.views.playground import KEY_NAME, is_playground_key
from controlplane.deployments.models import Deployment, Phase
from controlplane.errors import ConflictError
from controlplane.tenants import api_keys, key_services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey
from tests.world import World, make_deployment


def ask(client: Client, deployment: Deployment):
    return client.post("/playground/key", {"deployment": str(deployment)})


def keys(world: World) -> list[ApiKey]:
    with tenant(world.organization.id):
        return list(ApiKey.objects.order_by("created_at"))


def test_a_key_works_for_an_hour_in_the_deployments_project(
    owner: Client, world: World, deployment: Deployment
) -> None:
    answer = ask(owner, deployment).json()
    [key] = keys(world)
    assert api_keys.lookup_of(answer["api_key"]) == key.lookup
    assert key.project_id == deployment.project_id
    assert key.expires_at == datetime.fromisoformat(answer["expires_at"])
    assert timedelta(minutes=59) < key.expires_at - timezone.now() <= timedelta(hours=1)
    assert is_playground_key(key)


def test_a_session_has_one_key_at_a_time(
    owner: Client, developer: Client, world: World, deployment: Deployment
) -> None:
    ask(owner, deployment)
    ask(developer, deployment)
    ask(owner, deployment)
    first, second, third = keys(world)
    assert first.revoked_at is not None
    assert second.revoked_at is None  # another session's
    assert third.revoked_at is None


def test_a_refusal_leaves_nothing_written(
    owner: Client, world: World, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ConflictError("changed since")

    monkeypatch.setattr("controlplane.console.views.playground._replace_earlier", refuse)
    assert ask(owner, deployment).status_code == 409
    assert keys(world) == []


def test_its_answer_is_not_kept_anywhere(owner: Client, deployment: Deployment) -> None:
    response = ask(owner, deployment)
    assert "no-store" in response.headers["Cache-Control"]
    plaintext = response.json()["api_key"]
    assert plaintext not in str(dict(owner.session))
    assert plaintext not in owner.get("/playground").content.decode()


@pytest.mark.parametrize("text", ["", "x", "dep_" + "0" * 32])
def test_without_a_deployment_there_is_no_key(
    owner: Client, world: World, deployment: Deployment, text: str
) -> None:
    assert owner.post("/playground/key", {"deployment": text}).status_code == 404
    assert keys(world) == []


def test_a_stranger_gets_no_key_for_our_deployment(
    stranger: Client, world: World, deployment: Deployment
) -> None:
    assert ask(stranger, deployment).status_code == 404
    assert keys(world) == []


def test_the_list_of_keys_flags_live_ones_and_drops_dead_ones(
    owner: Client, world: World, deployment: Deployment
) -> None:
    ask(owner, deployment)
    ask(owner, deployment)
    text = owner.get("/keys").content.decode()
    assert text.count(f">{KEY_NAME}<") == 1
    assert text.count('class="tag"') == 1


def test_a_key_of_that_name_with_a_longer_life_is_not_one(world: World) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name=KEY_NAME
    )
    assert not is_playground_key(key)


def test_the_page_names_the_gateway_and_starts_with_what_answers(
    owner: Client, world: World, settings
) -> None:
    broken = make_deployment(world, "a-broken")
    ready = make_deployment(world, "b-ready")
    idle = make_deployment(world, "c-idle")
    for deployment, phase in ((broken, Phase.FAILED), (ready, Phase.READY), (idle, Phase.IDLE)):
        with tenant(world.organization.id):
            Deployment.objects.filter(id=deployment.id).update(phase=phase)
    text = owner.get("/playground").content.decode()
    assert f'data-base-url="{settings.ENV.gateway_url}/v1"' in text
    assert f'value="{ready}" data-model="b-ready" selected' in text
    asked = owner.get("/playground", {"model": str(idle)}).content.decode()
    assert f'value="{idle}" data-model="c-idle" selected' in asked


def test_with_nothing_deployed_the_page_says_what_to_do(stranger: Client) -> None:
    assert "Nothing to talk to yet" in stranger.get("/playground").content.decode()
