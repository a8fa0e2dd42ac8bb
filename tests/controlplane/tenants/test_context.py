"""The tenant of a transaction: nesting, ends and errors."""

import pytest
from django.db import connection, transaction

from controlplane.tenants.context import TenantMismatchError, current_tenant, tenant
from controlplane.tenants.models import Project
from tests.world import World


def setting() -> str:
    with connection.cursor() as cursor:
        cursor.execute("SELECT coalesce(current_setting('corral.organization_id', true), '')")
        return cursor.fetchone()[0]


def test_the_same_tenant_nests_and_the_outer_block_goes_on(world: World) -> None:
    with tenant(world.organization.id):
        with tenant(world.organization.id):
            assert Project.objects.count() == 1
        assert current_tenant() == world.organization.id
        assert Project.objects.count() == 1
    assert current_tenant() is None


def test_another_tenant_inside_is_a_bug_and_changes_nothing(world: World) -> None:
    with tenant(world.organization.id):
        with pytest.raises(TenantMismatchError), tenant(world.other_organization.id):
            pass
        assert setting() == str(world.organization.id)


def test_after_the_block_a_callers_transaction_sees_nothing(world: World) -> None:
    with transaction.atomic():
        with tenant(world.organization.id):
            assert Project.objects.exists()
        assert setting() == ""
        assert not Project.objects.exists()


def test_an_error_ends_the_tenant_too(world: World) -> None:
    with pytest.raises(ZeroDivisionError), tenant(world.organization.id):
        raise ZeroDivisionError
    assert current_tenant() is None
    assert setting() == ""
    with tenant(world.other_organization.id):
        assert Project.objects.count() == 1


def test_an_error_inside_a_nested_block_rolls_back_that_block_only(world: World) -> None:
    with tenant(world.organization.id):
        with pytest.raises(ZeroDivisionError), tenant(world.organization.id):
            Project.objects.update(name="never")
            raise ZeroDivisionError
        assert Project.objects.get().name == "Main"
