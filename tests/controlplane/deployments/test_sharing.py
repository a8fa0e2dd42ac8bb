"""A deployment that others may call: who sees it under which name and price, who sees the grant, how it ends."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from io import StringIO
from typing import Any

import msgspec
import pytest
from django.core.management import CommandError, call_command
from django.db import transaction

from billing.money import NanoPerMillion, Rates
from billing.prices import create_price_version
from controlplane.deployments import selectors, services, sharing
from controlplane.deployments.models import Deployment, Grant
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.gateway.directory import KeyRecord
from controlplane.gateway.keycontext import context_of
from controlplane.tenants import invalidation, key_services
from controlplane.tenants import services as tenants
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization
from tests.controlplane.tenants.test_key_lookup import look_up
from tests.world import World, make_deployment, make_version

AsOperator = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def stranger(world: World) -> Organization:
    """A third tenant, who is given nothing."""
    return tenants.create_organization(name="Third", slug="third", owner=world.charlie)


@pytest.fixture
def shared(world: World, deployment: Deployment, as_operator: AsOperator) -> Grant:
    """Acme's `toy-chat`, shared with all of Other."""
    with as_operator():
        return sharing.grant(
            organization_id=world.organization.id,
            deployment_id=deployment.id,
            grantee_id=world.other_organization.id,
        )


def callable_by(organization: Organization, project_slug: str = "main") -> dict[str, Any]:
    """What a key of that project may call, by the name it sends."""
    return {served["name"]: served for served in record_of(organization, project_slug)["deployments"]}


def record_of(organization: Organization, project_slug: str = "main") -> Any:
    """What a gateway is told of a new key of that project."""
    project = tenants.ensure_project(
        organization_id=organization.id, name=project_slug.title(), slug=project_slug
    )
    key, _ = key_services.create_api_key(organization_id=organization.id, project_id=project.id, name="k")
    return look_up(key.lookup)


def test_the_owner_the_grantee_and_a_stranger(world: World, shared: Grant, stranger: Organization) -> None:
    assert set(callable_by(world.organization)) == {"toy-chat"}
    granted = callable_by(world.other_organization)
    assert set(granted) == {"acme/toy-chat"}
    assert granted["acme/toy-chat"]["id"] == shared.deployment_id.hex
    assert set(callable_by(world.other_organization, "second")) == {"acme/toy-chat"}
    assert callable_by(stranger) == {}


def test_leave_for_one_project_is_for_that_project_only(
    world: World, deployment: Deployment, as_operator: AsOperator
) -> None:
    with as_operator():
        sharing.grant(
            organization_id=world.organization.id,
            deployment_id=deployment.id,
            grantee_id=world.other_organization.id,
            project_id=world.other_project.id,
        )
    assert set(callable_by(world.other_organization)) == {"acme/toy-chat"}
    assert callable_by(world.other_organization, "second") == {}


def test_both_sides_read_the_grant_and_nobody_else(
    world: World, shared: Grant, stranger: Organization
) -> None:
    with tenant(world.organization.id):
        assert selectors.grants_given(organization_id=world.organization.id) == [shared]
    with tenant(world.other_organization.id):
        assert selectors.grants_held(organization_id=world.other_organization.id) == [shared]
        assert not Deployment.objects.exists()  # the deployment itself stays its owner's
    with tenant(stranger.id):
        assert not Grant.objects.exists()


def test_the_grantee_can_neither_take_nor_give_leave(world: World, shared: Grant) -> None:
    with tenant(world.other_organization.id):
        with pytest.raises(NotFoundError):
            sharing.withdraw(organization_id=world.other_organization.id, grant_id=shared.id)
        assert Grant.objects.filter(id=shared.id).delete() == (0, {})
        with pytest.raises(Exception, match="permission denied"), transaction.atomic():
            Grant.objects.create(
                organization=world.other_organization,
                deployment_id=shared.deployment_id,
                grantee=world.other_organization,
                name="mine",
            )


def test_the_owner_takes_it_back(world: World, shared: Grant) -> None:
    with tenant(world.organization.id):
        sharing.withdraw(organization_id=world.organization.id, grant_id=shared.id)
    assert callable_by(world.other_organization) == {}


def test_a_deleted_deployment_is_shared_no_more(world: World, shared: Grant) -> None:
    services.delete_deployment(organization_id=world.organization.id, deployment_id=shared.deployment_id)
    assert callable_by(world.other_organization) == {}
    with tenant(world.organization.id):
        assert not Grant.objects.exists()


def test_a_suspended_owner_shares_nothing(world: World, shared: Grant) -> None:
    tenants.suspend_organization(organization_id=world.organization.id, suspended=True)
    assert callable_by(world.other_organization) == {}


def test_the_caller_pays_its_own_price(world: World, shared: Grant, as_operator: AsOperator) -> None:
    assert callable_by(world.other_organization)["acme/toy-chat"]["price"]["output_nano_per_million"] == 4e8
    for owner, rate in ((world.organization, 1), (world.other_organization, 7)):
        with as_operator():
            create_price_version(
                name="standard",
                rates=Rates(NanoPerMillion(rate), NanoPerMillion(rate), NanoPerMillion(rate)),
                valid_from=datetime(2026, 1, 2, tzinfo=UTC),
                organization_id=owner.id,
            )
    assert callable_by(world.other_organization)["acme/toy-chat"]["price"]["output_nano_per_million"] == 7


def test_an_own_deployment_of_that_name_goes_first(world: World, shared: Grant) -> None:
    own = services.create_deployment(
        organization_id=world.other_organization.id,
        project_id=world.other_project.id,
        name="acme/toy-chat",
        model_version_id=make_version(world.other_organization.id).id,
        engine_profile={"engine": "toy"},
    )
    record = msgspec.convert(record_of(world.other_organization), KeyRecord)
    assert context_of(record).deployments["acme/toy-chat"].id == own.id.hex


def test_what_cannot_be_shared_is_refused(
    world: World, deployment: Deployment, shared: Grant, as_operator: AsOperator
) -> None:
    second = tenants.create_project(organization_id=world.organization.id, name="Second", slug="second")
    namesake = services.create_deployment(
        organization_id=world.organization.id,
        project_id=second.id,
        name=deployment.name,
        model_version_id=deployment.model_version_id,
        engine_profile={"engine": "toy"},
    )
    long = make_deployment(world, "n" * 60, model_version_id=deployment.model_version_id)
    mine, other = world.organization.id, world.other_organization.id
    with as_operator():
        again = sharing.grant(organization_id=mine, deployment_id=deployment.id, grantee_id=other)
        assert again == shared
        with pytest.raises(ConflictError, match="acme/toy-chat"):
            sharing.grant(organization_id=mine, deployment_id=namesake.id, grantee_id=other)
        with pytest.raises(InvalidInputError, match="64"):
            sharing.grant(organization_id=mine, deployment_id=long.id, grantee_id=other)
        with pytest.raises(InvalidInputError, match="own"):
            sharing.grant(
                organization_id=mine,
                deployment_id=deployment.id,
                grantee_id=mine,
                project_id=world.project.id,
            )
        with pytest.raises(NotFoundError):  # a project of somebody else
            sharing.grant(
                organization_id=mine, deployment_id=deployment.id, grantee_id=other, project_id=second.id
            )


def test_gateways_hear_of_it_at_once(
    world: World, deployment: Deployment, as_operator: AsOperator, monkeypatch: pytest.MonkeyPatch,
    django_capture_on_commit_callbacks,
) -> None:  # fmt: skip
    published: list[str] = []
    monkeypatch.setattr(invalidation, "_publish", published.extend)
    ref = invalidation.organization_ref(world.other_organization.id)
    with as_operator(), django_capture_on_commit_callbacks(execute=True):
        held = sharing.grant(
            organization_id=world.organization.id,
            deployment_id=deployment.id,
            grantee_id=world.other_organization.id,
        )
    assert published == [ref]
    with as_operator(), django_capture_on_commit_callbacks(execute=True):
        sharing.withdraw(organization_id=world.organization.id, grant_id=held.id)
    assert published == [ref, ref]


def test_the_command_shares_lists_and_withdraws(
    world: World, deployment: Deployment, as_operator: AsOperator
) -> None:
    def run(*args: str) -> str:
        out = StringIO()
        with as_operator():
            call_command("share", deployment.name, "--project", "main", *args, stdout=out)
        return " ".join(out.getvalue().split())

    with tenant(world.organization.id):  # of the same name, in another cell: not meant
        Deployment.objects.filter(id=deployment.id).update(cell="c1")
        make_deployment(world, deployment.name, model_version_id=deployment.model_version_id)
    assert run() == "nobody else toy-chat"
    assert run("--with", "other/main") == "other/main acme/toy-chat"
    with as_operator():
        assert Grant.objects.get().deployment.cell == "c0"
    assert run("--with", "other/main", "--withdraw") == "nobody else toy-chat"
    for mistake, says in (
        (("--with", "nobody"), "no organization"),
        (("--with", "other/none"), "no project other/none"),
        (("--with", "other", "--withdraw"), "is not shared"),
        (("--withdraw",), "--with"),
    ):
        with pytest.raises(CommandError, match=says):
            run(*mistake)
