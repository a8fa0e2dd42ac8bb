"""Pooled connections: what one request leaves behind must not reach the next, and a dead one is replaced."""

from collections.abc import Iterator

import pytest
from django.db import OperationalError, connections
from django.db.backends.postgresql.base import DatabaseWrapper

from controlplane.settings import database
from controlplane.tenants.context import tenant
from infra.local.postgres import EmbeddedPostgres
from tests.world import build_world

pytestmark = pytest.mark.django_db(transaction=True)

# What Django fills in for the databases of the settings.
DEFAULTS = {"ATOMIC_REQUESTS": False, "AUTOCOMMIT": True, "TIME_ZONE": None}


@pytest.fixture
def pool(pg_server: EmbeddedPostgres) -> Iterator[DatabaseWrapper]:
    """The alias `pooled`: the settings of the web process, with one connection, so that the next gets it."""
    settings = database(pg_server.dsn("app"), statement_timeout_s=10, pool_size=2)
    settings["OPTIONS"]["pool"] |= {"max_size": 1, "timeout": 5}
    wrapper = connections["pooled"] = DatabaseWrapper(settings | DEFAULTS, alias="pooled")
    yield wrapper
    wrapper.close()
    wrapper.close_pool()
    del connections["pooled"]


def see(pool: DatabaseWrapper) -> tuple[int, str, int]:
    """Connection, setting, projects in sight."""
    with pool.cursor() as cursor:
        cursor.execute(
            "SELECT pg_backend_pid(), coalesce(current_setting('corral.organization_id', true), ''), "
            "(SELECT count(*) FROM tenants_project)"
        )
        pid, setting, n_projects = cursor.fetchone()
    return pid, setting, n_projects


def test_the_next_user_of_a_connection_is_in_no_tenant(pool: DatabaseWrapper) -> None:
    world = build_world()
    with tenant(world.organization.id, using="pooled"):
        pid, _, n_projects = see(pool)
        assert n_projects == 1
    pool.close()  # back to the pool
    assert see(pool) == (pid, "", 0)
    pool.close()
    with pytest.raises(ZeroDivisionError), tenant(world.organization.id, using="pooled"):
        raise ZeroDivisionError
    pool.close()
    assert see(pool) == (pid, "", 0)
    pool.close()
    with tenant(world.other_organization.id, using="pooled"):
        assert see(pool) == (pid, str(world.other_organization.id), 1)


def test_a_connection_that_died_in_the_pool_is_replaced(
    pool: DatabaseWrapper, pg_server: EmbeddedPostgres
) -> None:
    pid, _, _ = see(pool)
    pool.close()
    with pg_server.connect() as superuser:
        superuser.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
    new_pid, _, _ = see(pool)
    assert new_pid != pid


def test_an_endless_statement_is_ended_by_the_server(pg_server: EmbeddedPostgres) -> None:
    settings = database(pg_server.dsn("app"), statement_timeout_s=10, pool_size=0)
    settings["OPTIONS"]["options"] = settings["OPTIONS"]["options"].replace("=10000", "=50")
    wrapper = DatabaseWrapper(settings | DEFAULTS, alias="short")
    try:
        with pytest.raises(OperationalError, match="statement timeout"), wrapper.cursor() as cursor:
            cursor.execute("SELECT pg_sleep(30)")
    finally:
        wrapper.close()
