"""Behind a real PgBouncer in transaction mode: no tenant reaches the next transaction of a shared connection, and the
web process, the gateways' directory and intake work.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
import redis
from django.db import connections
from django.test import Client

from billing.booking import Books
from billing.intake import Intake
from billing.models import UsageEvent
from billing.usage_streams import UsageStreams
from controlplane.gateway.auth import KeyCache
from controlplane.gateway.directory import PgDirectory
from controlplane.gateway.feed import ChangeFeed
from controlplane.settings import Environment, database
from controlplane.tenants import key_services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role
from infra.local.postgres import EmbeddedPostgres
from tests.billing.usage import KEYS, Tenant, deliver, event
from tests.controlplane.api.caller import Api, token_of
from tests.pooler import PROGRAM, Pooler, pooler
from tests.world import PASSWORD, World, build_world

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "operator"]),
    pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed: apt-get install pgbouncer"),
]
DEFAULTS = {"ATOMIC_REQUESTS": False, "AUTOCOMMIT": True, "TIME_ZONE": None}


@pytest.fixture(scope="module")
def pool(pg_server: EmbeddedPostgres) -> Iterator[Pooler]:
    """Two server connections for each role: any three clients share them."""
    with pooler(pg_server, pool_size=2) as found:
        yield found


@pytest.fixture
def world(transactional_db: None) -> World:
    return build_world()


@contextmanager
def through(found: Pooler, alias: str, role: str) -> Iterator[None]:
    """Django's connections of this alias, in every thread, as the processes make them with CORRAL_PG_POOLER."""
    before = connections.settings[alias]
    connections[alias].close()
    del connections[alias]
    pooled = database(found.dsn(role), statement_timeout_s=10, pool_size=0, pooler="transaction") | DEFAULTS
    connections.settings[alias] = {**before, **pooled}
    try:
        yield
    finally:
        connections[alias].close()
        del connections[alias]
        connections.settings[alias] = before


def test_what_postgres_sees_is_shared(pool: Pooler, world: World) -> None:
    """The premise: two clients get the same server connection, one after the other."""
    with (
        psycopg.connect(pool.dsn("app"), autocommit=True) as a,
        psycopg.connect(pool.dsn("app"), autocommit=True) as b,
    ):
        pids = {c.execute("SELECT pg_backend_pid()").fetchone() for _ in range(3) for c in (a, b)}
    assert len(pids) <= 2
    with pytest.raises(psycopg.OperationalError, match="unsupported startup parameter"):
        psycopg.connect(pool.dsn("app"), options="-c statement_timeout=1000")


def test_no_table_shows_a_row_without_a_tenant(pool: Pooler, world: World) -> None:
    """Every table of the catalogue, on a server connection that a tenant's transaction has just left."""
    from tests.controlplane.tenants.test_rls import READABLE_WITHOUT_TENANT

    with psycopg.connect(pool.dsn("app")) as member, psycopg.connect(pool.dsn("app"), autocommit=True) as app:
        tables = app.execute(
            "SELECT c.oid::regclass::text, EXISTS (SELECT 1 FROM pg_attribute a WHERE a.attrelid = c.oid "
            "AND a.attname = 'organization_id') FROM pg_class c WHERE c.relnamespace = 'public'::regnamespace "
            "AND c.relkind IN ('r', 'p', 'v', 'm', 'f') AND has_table_privilege(c.oid, 'SELECT') ORDER BY 1"
        ).fetchall()
        assert len(tables) > 20
        for table, has_tenant in tables:
            set_local = "SELECT set_config('corral.organization_id', %s, true)"
            member.execute(set_local, [str(world.organization.id)])
            member.execute(f"SELECT 1 FROM {table} LIMIT 1")
            member.commit()
            where = "WHERE organization_id IS NOT NULL" if has_tenant else ""  # prices may be everybody's
            found = app.execute(f"SELECT 1 FROM {table} {where} LIMIT 1").fetchall()
            assert not found or table in READABLE_WITHOUT_TENANT, table


def test_interleaved_transactions_never_see_each_others_tenant(pool: Pooler, world: World) -> None:
    """Twelve threads on two server connections, each in a tenant, in the other, or in none, at random."""
    tenants = {world.organization.id: "acme", world.other_organization.id: "other"}
    wrong: list[Any] = []
    pids: set[int] = set()
    start = threading.Barrier(12)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            start.wait(10)
            for _ in range(20):
                chosen = chance.choice([*tenants, None])
                if chosen is None:
                    seen, expected = look(), []
                else:
                    try:
                        with tenant(chosen):
                            seen, expected = look(), [tenants[chosen]]
                            if chance.random() < 0.3:
                                raise ZeroDivisionError  # rolled back: the setting must go with it
                    except ZeroDivisionError:
                        pass
                if seen != expected:
                    wrong.append((seed, chosen, seen))
        finally:
            connections["default"].close()

    def look() -> list[str]:
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid(), array(SELECT slug::text FROM tenants_organization)")
            pid, slugs = cursor.fetchone()
        pids.add(pid)
        return list(slugs)

    with through(pool, "default", "app"), ThreadPoolExecutor(12) as threads:
        for done in [threads.submit(work, seed) for seed in range(12)]:
            done.result(30)
    assert not wrong
    assert len(pids) <= 2


def test_the_roles_own_limits_hold_where_startup_options_are_refused(pool: Pooler) -> None:
    for role in ("app", "operator"):
        with psycopg.connect(pool.dsn(role), autocommit=True) as client:
            for name, value in (
                ("statement_timeout", "10s"),
                ("lock_timeout", "3s"),
                ("idle_in_transaction_session_timeout", "30s"),
            ):
                assert client.execute(f"SHOW {name}").fetchone() == (value,)


def test_the_web_process_serves_two_tenants_at_once(pool: Pooler, world: World, redis_url: str) -> None:
    """Console and API, reads and writes with idempotency keys (which lock), from eight threads."""
    callers = [
        (Api(token_of(each.id, Role.OWNER)), project)
        for each, project in (
            (world.organization, world.project),
            (world.other_organization, world.other_project),
        )
    ]

    def work(n: int) -> None:
        api, project = callers[n % 2]
        mine = Api(api.token, Client(raise_request_exception=False))
        try:
            for i in range(4):
                body = {"project_id": f"prj_{project.id.hex}", "name": f"k{n}-{i}"}
                made = mine.post("/keys", body, **{"Idempotency-Key": f"{n}-{i}"})
                assert made.status_code == 201, made.body
                again = mine.post("/keys", body, **{"Idempotency-Key": f"{n}-{i}"})
                assert again.body == made.body
                listed = mine.get("/projects").body["data"]
                assert [row["id"] for row in listed] == [f"prj_{project.id.hex}"]
        finally:
            connections["default"].close()

    with through(pool, "default", "app"):
        client = Client()
        assert client.post("/login", {"email": "alice@example.org", "password": PASSWORD}).status_code == 302
        with ThreadPoolExecutor(8) as threads:
            for done in [threads.submit(work, n) for n in range(8)]:
                done.result(60)
        page = client.get("/keys").content.decode()
        assert "k0-0" in page
        assert "k1-0" not in page
        assert client.get("/usage.csv").status_code == 200  # a cursor that is read in parts


async def test_the_gateways_directory_follows_changes(pool: Pooler, world: World) -> None:
    from asgiref.sync import sync_to_async

    key, plaintext = await sync_to_async(key_services.create_api_key)(
        organization_id=world.organization.id, project_id=world.project.id, name="k"
    )
    directory = PgDirectory(pool.dsn("app"), pooled=True)
    await directory.open()
    try:
        cache = KeyCache(directory, bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"]))
        feed = ChangeFeed(directory, cache, poll_s=0.05)
        await feed.poll()
        context = await cache.authenticate(b"Bearer " + plaintext.encode(), None)
        assert context.organization == world.organization.id.hex
        await sync_to_async(key_services.revoke_api_key)(organization_id=world.organization.id, key_id=key.id)
        await feed.poll()
        with pytest.raises(Exception, match="revoked_api_key"):
            await cache.authenticate(b"Bearer " + plaintext.encode(), None)
    finally:
        await directory.close()


def test_intake_books_through_it(pool: Pooler, redis_url: str) -> None:
    machine, whose = "f" * 32, Tenant()
    with redis.Redis.from_url(redis_url) as client, through(pool, "operator", "operator"):
        events = [event(whose, machine) for _ in range(5)]
        for each in (*events, *events):
            deliver(client, machine, each)
        report = Intake(UsageStreams(client, KEYS), Books(connections["operator"])).run([machine], 5.0)
        assert report.n_booked == 5
        assert UsageEvent.objects.using("operator").count() == 5


def test_the_setting_is_checked() -> None:
    assert Environment.read({"CORRAL_PG_POOLER": "transaction"}).pg_pooler == "transaction"
    with pytest.raises(Exception, match="CORRAL_PG_POOLER='session'"):
        Environment.read({"CORRAL_PG_POOLER": "session"})
    options = database("postgresql://u:p@h/d", statement_timeout_s=1, pool_size=2, pooler="transaction")
    assert "options" not in options["OPTIONS"]
    assert options["DISABLE_SERVER_SIDE_CURSORS"]
