"""Service accounts and management tokens: who they are, what ends them, who can see them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.tenants import key_services
from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, ManagementToken, Role, ServiceAccount
from controlplane.tenants.rights import PERMISSIONS, Permission
from tests.world import World


def an_account(world: World, role: Role = Role.DEVELOPER, name: str = "ci") -> ServiceAccount:
    return accounts.create_service_account(organization_id=world.organization.id, name=name, role=role)


def a_token(world: World, account: ServiceAccount, **values: object) -> tuple[ManagementToken, str]:
    return accounts.create_token(
        organization_id=world.organization.id, account_id=account.id, name="main", **values
    )


def test_a_token_finds_its_caller_until_it_is_revoked(world: World) -> None:
    account = an_account(world)
    token, plaintext = a_token(world, account)
    caller = accounts.find_caller(plaintext)
    assert caller is not None
    assert (caller.organization_id, caller.token_id) == (world.organization.id, token.id)
    assert (caller.role, caller.scopes, caller.suspended_at) == (Role.DEVELOPER, None, None)
    accounts.revoke_token(organization_id=world.organization.id, token_id=token.id)
    assert accounts.find_caller(plaintext) is None


def test_a_token_differs_in_its_last_character_or_kind_finds_nobody(world: World) -> None:
    _, plaintext = a_token(world, an_account(world))
    other = "A" if plaintext[-1] != "A" else "B"
    assert accounts.find_caller(plaintext[:-1] + other) is None
    assert accounts.find_caller(plaintext.replace("mt-crl", "sk-crl")) is None
    assert accounts.find_caller("") is None
    _, api_key = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    assert accounts.find_caller(api_key) is None


def test_the_plaintext_is_stored_nowhere(world: World) -> None:
    _, plaintext = a_token(world, an_account(world))
    secret = plaintext.split("-", 3)[-1]
    with tenant(world.organization.id):
        stored = ManagementToken.objects.values().get()
    assert secret not in repr(stored)
    assert plaintext.endswith(stored["last4"])


def test_expiry_and_deletion_end_a_token(world: World) -> None:
    account = an_account(world)
    token, plaintext = a_token(world, account, expires_at=timezone.now() + timedelta(hours=1))
    assert accounts.find_caller(plaintext) is not None
    with tenant(world.organization.id):
        earlier = timezone.now() - timedelta(hours=2)
        ManagementToken.objects.filter(id=token.id).update(
            created_at=earlier, expires_at=earlier + timedelta(hours=1)
        )
    assert accounts.find_caller(plaintext) is None
    _, second = a_token(world, account)
    accounts.delete_service_account(organization_id=world.organization.id, account_id=account.id)
    assert accounts.find_caller(second) is None
    with pytest.raises(NotFoundError):
        a_token(world, account)
    assert an_account(world).name == "ci", "the name is free again"


def test_scopes_bind_a_token_and_cannot_exceed_its_role(world: World) -> None:
    account = an_account(world)
    _, plaintext = a_token(world, account, scopes=[Permission.KEYS_READ])
    caller = accounts.find_caller(plaintext)
    assert caller is not None
    assert caller.scopes == {Permission.KEYS_READ}
    for scopes, said in (
        (["keys:steal"], "keys:steal"),
        ([Permission.MEMBERS_WRITE], "role developer has no members:write"),
        ([], "at least one"),
    ):
        with pytest.raises(InvalidInputError, match=said) as refused:
            a_token(world, account, scopes=scopes)
        assert refused.value.field == "scopes"
    assert Permission.MEMBERS_WRITE not in PERMISSIONS[Role.DEVELOPER]


def test_names_expiries_and_numbers_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    account = an_account(world)
    with pytest.raises(ConflictError, match="ci"):
        an_account(world)
    with pytest.raises(InvalidInputError, match="name"):
        an_account(world, name=" ")
    with pytest.raises(InvalidInputError, match="expires_at"):
        a_token(world, account, expires_at=timezone.now() - timedelta(seconds=1))
    monkeypatch.setattr(accounts, "MAX_TOKENS", 1)
    a_token(world, account)
    with pytest.raises(InvalidInputError, match="revoke one"):
        a_token(world, account)


def test_a_stranger_reaches_nothing(world: World) -> None:
    account = an_account(world)
    token, plaintext = a_token(world, account)
    for refused in (
        lambda: accounts.service_account(organization_id=world.other_organization.id, account_id=account.id),
        lambda: accounts.revoke_token(organization_id=world.other_organization.id, token_id=token.id),
        lambda: accounts.delete_service_account(
            organization_id=world.other_organization.id, account_id=account.id
        ),
    ):
        with pytest.raises(NotFoundError):
            refused()
    assert accounts.find_caller(plaintext) is not None
    with tenant(world.other_organization.id):
        assert not ServiceAccount.objects.exists()
        assert not ManagementToken.objects.exists()
    assert not ManagementToken.objects.exists(), "without a tenant nothing is seen"
    assert not ApiKey.objects.exists()
