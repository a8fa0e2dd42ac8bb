"""Django's database in the tests: the real schema under real row-level security.

Tests run as corral_app, the role of the web process, so a query outside of a tenant finds nothing. The login
behind it may also become operator or owner, in the same connection and transaction: `as_operator` uses that,
so that a test can arrange what only the house may write and still be rolled back. The database is the one
that CORRAL_PG_DSN_* name: a test with committed rows (`django_db(transaction=True)`) can let other processes
read.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import pytest
from psycopg import sql
from pytest_django import DjangoDbBlocker

from infra.local import roles
from infra.local.postgres import EmbeddedPostgres

LOGIN = "corral_test"
# Rows that migrations put there.
SEEDED = (
    "deployments_sloclass",
    "billing_priceversion",
    "corral_change_horizon",
    "django_migrations",
    "django_content_type",
    "auth_permission",
)


@pytest.fixture(scope="session")
def django_db_setup(pg_server: EmbeddedPostgres, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Migrate as owner, then point Django's `default` at a login that acts as corral_app."""
    from django.conf import settings
    from django.core.management import call_command
    from django.db import connections
    from django.test import TransactionTestCase

    password = secrets.token_urlsafe(16)
    with pg_server.connect() as superuser:
        superuser.execute(
            sql.SQL("CREATE ROLE {} LOGIN NOINHERIT PASSWORD {}").format(
                sql.Identifier(LOGIN), sql.Literal(password)
            )
        )
        for role in roles.ROLES:
            superuser.execute(
                sql.SQL("GRANT {} TO {} WITH INHERIT FALSE, SET TRUE").format(
                    sql.Identifier(role), sql.Identifier(LOGIN)
                )
            )
        superuser.execute(
            sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(
                sql.Identifier(roles.DATABASE), sql.Identifier(LOGIN)
            )
        )
    with django_db_blocker.unblock():
        call_command("migrate", database="owner", verbosity=0)
        connections["owner"].close()
    default = settings.DATABASES["default"]
    default.update(USER=LOGIN, PASSWORD=password)
    default["OPTIONS"] = {**default["OPTIONS"], "assume_role": roles.APP}
    default["OPTIONS"].pop("pool", None)  # test_pool.py makes pools of its own
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    # Django empties tables after a test that committed by TRUNCATE, which only the owner may.
    TransactionTestCase._fixture_teardown = lambda _self: _empty_tables(pg_server)  # type: ignore[attr-defined]
    yield
    with django_db_blocker.unblock():
        connections.close_all()


@pytest.fixture
def as_operator() -> Callable[[], AbstractContextManager[None]]:
    """`with as_operator(): …` acts as corral_operator; what it writes is part of the test's transaction."""
    return lambda: acting_as(roles.OPERATOR)


@contextmanager
def acting_as(role: str) -> Iterator[None]:
    """Become another role on the default connection, and corral_app again afterwards."""
    from django.db import connection

    def become(name: str) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET ROLE {name}")

    become(role)
    try:
        yield
    finally:
        # After an error inside a transaction nothing can be executed; its rollback takes SET ROLE back too.
        if not (connection.in_atomic_block and connection.needs_rollback):
            become(roles.APP)


def _empty_tables(server: EmbeddedPostgres) -> None:
    """One transaction of DELETEs: all our foreign keys are deferred, so their order does not matter, and on
    tables of a few rows it beats TRUNCATE, which could not spare the global prices.
    """
    with psycopg.connect(server.dsn("owner")) as owner:
        tables = owner.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace "
            "AND relkind IN ('r', 'p') AND NOT relispartition AND relname <> ALL(%s)",
            [list(SEEDED)],
        ).fetchall()
        for table in ("audit_entry", "audit_seal"):
            owner.execute(sql.SQL("ALTER TABLE {} DISABLE TRIGGER USER").format(sql.Identifier(table)))
        owner.execute("DELETE FROM billing_priceversion WHERE organization_id IS NOT NULL")
        for (name,) in tables:
            owner.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(name)))
        for table in ("audit_entry", "audit_seal"):  # append-only; only who owns them can do this
            owner.execute(sql.SQL("ALTER TABLE {} ENABLE TRIGGER USER").format(sql.Identifier(table)))
        owner.execute("DELETE FROM corral_change")  # notes of the deletions above
