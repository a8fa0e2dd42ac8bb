"""Attaching endpoints elsewhere: what is accepted, what is sealed, and whose prompts may go there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from django.conf import settings

from controlplane.audit.models import Entry
from controlplane.deployments import services as deployments
from controlplane.deployments import sharing
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.lifecycle import belongings
from controlplane.outbound import allowed_networks
from controlplane.tenants.context import tenant
from controlplane.upstreams import selectors, services
from controlplane.upstreams.models import Upstream, UpstreamSecrets
from controlplane.upstreams.services import Change
from tests.database import acting_as
from tests.world import World, make_version


@pytest.fixture
def deployment(world: World) -> Deployment:
    version = make_version(world.organization.id)
    return deployments.create_deployment(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name="served",
        model_version_id=version.id,
        engine_profile={"engine": "toy"},
    )


def attach(deployment: Deployment, **values: Any) -> Upstream:
    known = {"name": "elsewhere", "base_url": "https://api.example.org/v1", "model": "m", "role": "overflow"}
    known |= {name: values.pop(name) for name in list(values) if name in known}
    return services.attach(
        organization_id=deployment.organization_id,
        deployment_id=deployment.id,
        **known,
        change=Change(**values),
    )


def test_key_and_headers_are_sealed_and_shown_nowhere(world: World, deployment: Deployment) -> None:
    made = attach(deployment, api_key="sk-very-secret", headers={"X-Team": "hidden-team"})
    assert (made.has_api_key, made.header_names, made.secrets_version) == (True, ["X-Team"], 1)
    with tenant(world.organization.id):
        kept = UpstreamSecrets.objects.get(upstream=made)
        assert services.secret_of(kept).api_key == "sk-very-secret"
    with acting_as("corral_operator"):
        told = [str(entry.changes) for entry in Entry.objects.all()]
        told += belongings.everything(world.organization.id)
    for secret in ("sk-very-secret", "hidden-team"):
        assert secret.encode() not in bytes(kept.sealed_secret)
        assert secret not in "".join(told)
        assert secret not in repr(Change(api_key=secret, headers={"a": secret}))
    changed = services.change_upstream(
        organization_id=world.organization.id, upstream_id=made.id, change=Change(headers={}, slots=3)
    )
    assert (changed.secrets_version, changed.header_names, changed.has_api_key, changed.slots) == (
        2,
        [],
        True,
        3,
    )
    unchanged = services.change_upstream(
        organization_id=world.organization.id, upstream_id=made.id, change=Change(api_key="sk-very-secret")
    )
    assert unchanged.secrets_version == 2


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"base_url": "http://169.254.169.254/v1"}, "base_url"),
        ({"base_url": "http://[::ffff:10.0.0.1]/v1"}, "base_url"),
        ({"base_url": "http://localhost:8000/v1"}, "base_url"),
        ({"base_url": "https://me:pw@example.org/v1"}, "base_url"),
        ({"base_url": "https://example.org/v1?x=1"}, "base_url"),
        ({"base_url": "ftp://example.org/v1"}, "base_url"),
        ({"role": "boss"}, "role"),
        ({"name": "no spaces"}, "name"),
        ({"slots": 0}, "slots"),
        ({"shadow_ppm": 0}, "shadow_ppm"),
        ({"first_token_ms": 1}, "first_token_ms"),
        ({"n_retries": 6}, "n_retries"),
        ({"output_nano_per_million": -1}, "output_nano_per_million"),
        ({"max_tokens_field": "n"}, "max_tokens_field"),
        ({"headers": {"X-A": "a\r\nHost: b"}}, "headers"),
        ({"headers": {"Transfer-Encoding": "chunked"}}, "headers"),
        ({"headers": {"Authorization": "x"}, "api_key": "k"}, "headers"),
        ({"headers": {f"X-{n}": "" for n in range(17)}}, "headers"),
        ({"api_key": "a\nb"}, "api_key"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    world: World, deployment: Deployment, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as refused:
        attach(deployment, **values)
    assert refused.value.field == field


def test_an_operator_may_allow_private_addresses(
    world: World, deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "ENV", replace(settings.ENV, outbound_allow=allowed_networks("10.0.0.0/8")))
    assert attach(deployment, base_url="http://10.1.2.3:8000/v1").slots == 16


def test_names_are_taken_once_and_a_deleted_deployment_takes_its_endpoints_along(
    world: World, deployment: Deployment
) -> None:
    made = attach(deployment)
    with pytest.raises(ConflictError):
        attach(deployment)
    with pytest.raises(NotFoundError):
        services.detach(organization_id=world.other_organization.id, upstream_id=made.id)
    deployments.delete_deployment(organization_id=world.organization.id, deployment_id=deployment.id)
    with tenant(world.organization.id):
        assert not selectors.upstreams(organization_id=world.organization.id).exists()
        assert not UpstreamSecrets.objects.exists()


def test_prompts_of_others_go_elsewhere_only_where_they_agreed(world: World, deployment: Deployment) -> None:
    mine, theirs = world.organization.id, world.other_organization.id

    def share() -> Any:
        with acting_as("corral_operator"):
            return sharing.grant(organization_id=mine, deployment_id=deployment.id, grantee_id=theirs)

    grant = share()
    with pytest.raises(ConflictError, match="has not agreed"):
        attach(deployment)
    sharing.withdraw(organization_id=mine, grant_id=grant.id)
    made = attach(deployment)
    with pytest.raises(ConflictError, match="have not agreed"):
        share()
    services.set_consent(organization_id=theirs, agreed=True)
    share()
    with pytest.raises(ConflictError, match="acme/served"):
        services.set_consent(organization_id=theirs, agreed=False)
    services.detach(organization_id=mine, upstream_id=made.id)
    services.set_consent(organization_id=theirs, agreed=False)
    with tenant(theirs):
        assert not selectors.has_agreed(organization_id=theirs)
