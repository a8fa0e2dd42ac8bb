"""The tenant of a transaction: nesting, ends, errors, and pooled connections that must not remember it."""

import pytest
from django.db import connection, connections, transaction
from django.db.backends.postgresql.base import DatabaseWrapper

from controlplane.settings import database
from controlplane.tenants.context import TenantMismatchError, current_tenant, tenant
from controlplane.tenants.models import Project
from infra.local.postgres import EmbeddedPostgres
from tests.world import World, build_world

# What Django fills in for the databases of the settings.
POOLED = {"ATOMIC_REQUESTS": False, "AUTOCOMMIT": True, "CONN_HEALTH_CHECKS": False, "TIME_ZONE": None}


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


@pytest.mark.django_db(transaction=True)
def test_a_pooled_connection_does_not_remember_the_tenant_before(pg_server: EmbeddedPostgres) -> None:
    world = build_world()
    settings = database(pg_server.dsn("app"), statement_timeout_s=10, pool_size=2)
    settings["OPTIONS"]["pool"]["max_size"] = 1  # one connection, so that the next user gets this very one
    connections["pooled"] = DatabaseWrapper(settings | POOLED, alias="pooled")

    def see() -> tuple[int, str, int]:
        """Connection, setting, projects in sight."""
        with connections["pooled"].cursor() as cursor:
            cursor.execute(
                "SELECT pg_backend_pid(), coalesce(current_setting('corral.organization_id', true), ''), "
                "(SELECT count(*) FROM tenants_project)"
            )
            return cursor.fetchone()

    try:
        with tenant(world.organization.id, using="pooled"):
            pid, _, n_projects = see()
            assert n_projects == 1
        connections["pooled"].close()
        assert see() == (pid, "", 0)
        connections["pooled"].close()
        with pytest.raises(ZeroDivisionError), tenant(world.organization.id, using="pooled"):
            raise ZeroDivisionError
        connections["pooled"].close()
        assert see() == (pid, "", 0)
        connections["pooled"].close()
        with tenant(world.other_organization.id, using="pooled"):
            assert see() == (pid, str(world.other_organization.id), 1)
    finally:
        connections["pooled"].close()
        connections["pooled"].close_pool()
        del connections["pooled"]
