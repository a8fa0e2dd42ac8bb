"""Servers for every test: real PostgreSQL and Redis, throwaway, shared by the whole run.

`pg_server` has roles corral_owner (may create databases here), corral_app, corral_operator and an empty
database `corral` of the owner's; CORRAL_PG_DSN_* and CORRAL_REDIS_URL lead to them. pytest-django must not
load the settings earlier than this file, hence no DJANGO_SETTINGS_MODULE in pyproject.toml.
"""

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from infra.local.postgres import EmbeddedPostgres
from infra.local.redis import EmbeddedRedis
from tests.database import as_operator, django_db_setup  # noqa: F401 - fixtures
from tests.servers import SERVERS  # importing it puts their addresses into the environment
from tests.world import deployment, world  # noqa: F401 - fixtures

# How long an example or its making takes says something of the machine, nothing of what is tested.
settings.register_profile("corral", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corral")


def pytest_configure(config: pytest.Config) -> None:
    """Load the settings now; pytest-django, which configures last, then sets Django up."""
    from django.conf import settings

    settings.DATABASES  # noqa: B018


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, then those that start a whole stack, then the browser's.

    Playwright's synchronous API keeps an event loop running in this thread until the run ends, and no asyncio
    test can start after that.
    """
    items.sort(
        key=lambda item: (bool(item.get_closest_marker("browser")), bool(item.get_closest_marker("stack")))
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the servers, also after a run that was interrupted."""
    SERVERS.destroy()


@pytest.fixture(scope="session")
def pg_server() -> EmbeddedPostgres:
    """The run's PostgreSQL, bootstrapped."""
    SERVERS.start(SERVERS.postgres)
    SERVERS.postgres.bootstrap()
    return SERVERS.postgres


@pytest.fixture(scope="session")
def redis_server() -> EmbeddedRedis:
    """The run's Redis."""
    SERVERS.start(SERVERS.redis)
    return SERVERS.redis


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> Iterator[str]:
    """URL of the trusted user; all keys, and all users but ours, are gone before and after the test."""
    _empty(redis_server)
    yield redis_server.url()
    _empty(redis_server)


def _empty(server: EmbeddedRedis) -> None:
    with server.connect() as client:
        client.flushall()
        for user in client.acl_users():
            if user not in ("default", "corral"):
                client.acl_deluser(user)
