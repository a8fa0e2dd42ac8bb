"""Servers for every test: real PostgreSQL and Redis, throwaway, shared by the whole run.

`pg_server` has roles corral_owner (may create databases here), corral_app, corral_operator and an empty
database `corral` of the owner's; CORRAL_PG_DSN_* and CORRAL_REDIS_URL lead to them. pytest-django must not
load the settings earlier than this file, hence no DJANGO_SETTINGS_MODULE in pyproject.toml.
"""

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from schemathesis.pytest.plugin import SchemathesisFunction

from infra.local.postgres import EmbeddedPostgres
from infra.local.redis import EmbeddedRedis
from tests.database import as_operator, django_db_setup  # noqa: F401 - fixtures
from tests.servers import SERVERS  # importing it puts their addresses into the environment
from tests.world import deployment, world  # noqa: F401 - fixtures

ONE_STACK = ("tests/e2e", "tests/browser")

# How long an example or its making takes says something of the machine, nothing of what is tested.
settings.register_profile("corral", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("corral")


def pytest_configure(config: pytest.Config) -> None:
    """Load the settings now; pytest-django, which configures last, then sets Django up."""
    from django.conf import settings

    settings.DATABASES  # noqa: B018


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Each process of a run has servers of its own, so none may load the settings before it knows them."""
    del os.environ["DJANGO_SETTINGS_MODULE"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files go to the processes of a run, in the order below; tests that share a stack go together."""
    from xdist.scheduler.loadfile import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            folder, _, _ = file.rpartition("/")
            return folder if folder in ONE_STACK else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, then those that start a whole stack, then the browser's.

    Playwright's synchronous API keeps an event loop running in this thread until the run ends, and no asyncio
    test can start after that.
    """
    _name_apart(items)
    items.sort(
        key=lambda item: (bool(item.get_closest_marker("browser")), bool(item.get_closest_marker("stack")))
    )


def _name_apart(items: list[pytest.Item]) -> None:
    """A process is told by name what to run: of two tests of one name it would run one and be silent of the other."""
    for item in items:
        if isinstance(item, SchemathesisFunction):  # the operation is in its name and not in its id
            item._id = item._id.with_params(item.operation_label)
    twice = [name for name, n in Counter(item.nodeid for item in items).items() if n > 1]
    if twice:
        raise pytest.UsageError(f"tests of the same name: {', '.join(twice[:5])}")


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
