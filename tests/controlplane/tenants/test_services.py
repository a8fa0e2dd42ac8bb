"""Organizations, projects, keys and members as the services make them."""

from datetime import timedelta

import pytest
from django.utils import timezone

from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.tenants import api_keys, key_services, limit_services, rights, selectors, services
from controlplane.tenants.context import tenant
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import Role, User
from tests.world import PASSWORD, World


def new_key(world: World, **values):
    return key_services.create_api_key(
        **{
            "organization_id": world.organization.id,
            "project_id": world.project.id,
            "name": "ci",
            "created_by": world.alice,
            **values,
        }
    )


def test_a_key_is_shown_once_and_stored_as_digest(world: World, settings) -> None:
    key, plaintext = new_key(world)
    with tenant(world.organization.id):
        stored = selectors.api_key(organization_id=world.organization.id, key_id=key.id)
    assert api_keys.lookup_of(plaintext) == stored.lookup
    assert api_keys.matches(settings.ENV.key_pepper, plaintext, bytes(stored.digest))
    assert plaintext.endswith(stored.last4)
    secret = plaintext.split("-", 3)[3]  # it may have hyphens in it
    assert len(secret) > 40
    assert not any(secret in str(value) for value in vars(stored).values())


def test_a_stranger_can_neither_see_nor_revoke_a_key(world: World) -> None:
    key, _ = new_key(world)
    stranger = world.other_organization.id
    with tenant(stranger):
        assert selectors.api_keys(organization_id=stranger) == []
    with pytest.raises(NotFoundError):
        key_services.revoke_api_key(organization_id=stranger, key_id=key.id)
    with tenant(world.organization.id):
        assert selectors.api_key(organization_id=world.organization.id, key_id=key.id).revoked_at is None


def test_a_key_for_a_project_of_another_tenant_is_not_made(world: World) -> None:
    with pytest.raises(NotFoundError, match="project"):
        new_key(world, project_id=world.other_project.id)


def test_revoking_twice_keeps_the_first_time(world: World) -> None:
    key, _ = new_key(world)
    first = key_services.revoke_api_key(organization_id=world.organization.id, key_id=key.id)
    again = key_services.revoke_api_key(organization_id=world.organization.id, key_id=key.id)
    assert first.revoked_at == again.revoked_at
    assert not again.is_active(timezone.now())


def test_an_expired_key_cannot_be_made(world: World) -> None:
    with pytest.raises(InvalidInputError) as refused:
        new_key(world, expires_at=timezone.now() - timedelta(seconds=1))
    assert refused.value.field == "expires_at"


@pytest.mark.parametrize(
    ("limits", "field"),
    [
        (Limits(rpm=-1), "rpm"),
        (Limits(budget_nano=1 << 63), "budget_nano"),
        (Limits(input_tpm=1 << 31), "input_tpm"),
    ],
)
def test_a_limit_out_of_range_is_named(world: World, limits: Limits, field: str) -> None:
    with pytest.raises(InvalidInputError, match=field) as refused:
        new_key(world, limits=limits)
    assert refused.value.field == field


def test_limits_are_replaced_whole(world: World) -> None:
    key, _ = new_key(world, limits=Limits(rpm=10, budget_nano=5))
    limit_services.set_api_key_limits(
        organization_id=world.organization.id, key_id=key.id, limits=Limits(max_concurrency=3)
    )
    limit_services.set_project_limits(
        organization_id=world.organization.id, project_id=world.project.id, limits=Limits(rpm=7)
    )
    with tenant(world.organization.id):
        key = selectors.api_key(organization_id=world.organization.id, key_id=key.id)
        assert key.limits == Limits(max_concurrency=3)
        assert key.project.limits == Limits(rpm=7)


def test_taken_names_are_conflicts_that_name_the_field(world: World) -> None:
    with pytest.raises(ConflictError, match="acme") as organization:
        services.create_organization(name="Acme again", slug="acme", owner=world.bob)
    with pytest.raises(ConflictError) as project:
        services.create_project(organization_id=world.organization.id, name="x", slug="main")
    with pytest.raises(ConflictError) as user:
        services.create_user(email="Alice@Example.org", password=PASSWORD)
    with pytest.raises(ConflictError) as member:
        services.add_member(organization_id=world.organization.id, user=world.bob, role=Role.ADMIN)
    fields = [caught.value.field for caught in (organization, project, user, member)]
    assert fields == ["slug", "slug", "email", "user"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"slug": "Not a slug"}, "slug"),
        ({"name": ""}, "name"),
        ({"name": "x" * 121}, "name"),
        ({"timezone": "Mars/Olympus"}, "timezone"),
    ],
)
def test_bad_organization_values_are_named(world: World, values: dict, field: str) -> None:
    good = {"name": "New", "slug": "new", "owner": world.alice}
    with pytest.raises(InvalidInputError) as refused:
        services.create_organization(**{**good, **values})
    assert refused.value.field == field


def test_a_weak_password_is_refused(db: None) -> None:
    with pytest.raises(InvalidInputError) as refused:
        services.create_user(email="dora@example.org", password="password")
    assert refused.value.field == "password"


def test_setting_up_twice_changes_nothing(world: World, as_operator) -> None:
    def set_up() -> tuple:
        user = services.ensure_user(email="admin@example.org", password=PASSWORD)
        organization = services.ensure_organization(name="Demo", slug="demo", owner=user)
        return (
            user,
            organization,
            services.ensure_project(organization_id=organization.id, name="Demo", slug="demo"),
        )

    with as_operator():
        assert set_up() == set_up()
    assert [m.role for m in selectors.memberships_of(user_id=set_up_user().id)] == [Role.OWNER]


def set_up_user() -> User:
    return User.objects.get(email="admin@example.org")


def test_memberships_name_every_organization_of_the_user_and_no_other(world: World) -> None:
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.VIEWER)
    of_bob = [(m.organization_slug, m.role) for m in selectors.memberships_of(user_id=world.bob.id)]
    assert of_bob == [("acme", Role.DEVELOPER), ("other", Role.VIEWER)]
    assert [m.organization_slug for m in selectors.memberships_of(user_id=world.charlie.id)] == ["other"]


def test_the_last_owner_cannot_leave(world: World) -> None:
    with tenant(world.organization.id):
        members = {m.user_id: m.id for m in selectors.members(organization_id=world.organization.id)}
    services.remove_member(organization_id=world.organization.id, member_id=members[world.bob.id])
    assert selectors.memberships_of(user_id=world.bob.id) == ()
    with pytest.raises(InvalidInputError, match="last owner"):
        services.remove_member(organization_id=world.organization.id, member_id=members[world.alice.id])


def test_roles_may_what_the_table_says() -> None:
    can = rights.Permission
    assert rights.may(Role.DEVELOPER, can.DEPLOYMENTS_WRITE)
    assert not rights.may(Role.VIEWER, can.KEYS_WRITE)
    assert not rights.may(Role.BILLING, can.MODELS_USE)
    assert not rights.may(Role.ADMIN, can.OWNERS_WRITE)
    assert rights.PERMISSIONS.keys() == set(Role)
    assert all(permission.sentence for permission in can)
    reads = {permission for permission in can if permission.endswith(":read")}
    assert rights.PERMISSIONS[Role.VIEWER] < reads, "a viewer changes nothing"


def test_weights_are_set_at_each_level_and_bad_ones_named(world: World) -> None:
    key, _ = new_key(world, weight=50)
    organization = world.organization.id
    limit_services.set_weight(organization_id=organization, weight=200)
    limit_services.set_weight(organization_id=organization, project_id=world.project.id, weight=300)
    with tenant(organization):
        assert selectors.organization(organization_id=organization).weight == 200
        assert selectors.project(organization_id=organization, project_id=world.project.id).weight == 300
        assert selectors.api_key(organization_id=organization, key_id=key.id).weight == 50
    limit_services.set_weight(organization_id=organization, key_id=key.id, weight=1)
    with tenant(organization):
        assert selectors.api_key(organization_id=organization, key_id=key.id).weight == 1
    for weight in (0, -1, 10_001):
        with pytest.raises(InvalidInputError, match="1 to 10000") as refused:
            limit_services.set_weight(organization_id=organization, weight=weight)
        assert refused.value.field == "weight"
        with pytest.raises(InvalidInputError, match="1 to 10000"):
            new_key(world, weight=weight)


def test_a_stranger_cannot_change_a_weight(world: World) -> None:
    key, _ = new_key(world)
    with pytest.raises(NotFoundError):
        limit_services.set_weight(organization_id=world.other_organization.id, key_id=key.id, weight=9_999)
