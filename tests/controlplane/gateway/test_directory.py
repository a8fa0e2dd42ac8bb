"""The directory on a real Postgres: what the gateway reads is what the console wrote, and a revoke is seen in
time."""

import hashlib
import os
from collections.abc import AsyncIterator

import pytest
from asgiref.sync import sync_to_async

from controlplane.gateway.auth import KeyCache
from controlplane.gateway.directory import DirectoryUnavailable, PgDirectory
from controlplane.gateway.errors import ApiError
from controlplane.gateway.feed import ChangeFeed
from controlplane.tenants import api_keys, key_services
from controlplane.tenants.context import tenant
from controlplane.tenants.limits import Limits
from controlplane.tenants.models import ApiKey
from infra.local.postgres import EmbeddedPostgres
from tests.controlplane.gateway.harness import running, until
from tests.world import World, build_world, make_deployment

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def committed(transactional_db: None) -> World:
    world = build_world()
    make_deployment(world)
    return world


@pytest.fixture
async def directory(pg_server: EmbeddedPostgres) -> AsyncIterator[PgDirectory]:
    it = PgDirectory(pg_server.dsn("app"))
    await it.open()
    yield it
    await it.close()


def pepper() -> bytes:
    return bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"])


@sync_to_async
def new_key(world: World, limits: Limits | None = None) -> tuple[object, str]:
    return key_services.create_api_key(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name="ci",
        **({"limits": limits} if limits else {}),
    )


async def test_key_of_the_console_is_the_gateways(committed: World, directory: PgDirectory) -> None:
    row, plaintext = await new_key(committed, Limits(rpm=60, budget_nano=5))
    cache = KeyCache(directory, pepper())
    context = await cache.authenticate(b"Bearer " + plaintext.encode(), None)
    assert context.key == row.id.hex  # type: ignore[attr-defined]
    assert context.organization == committed.organization.id.hex
    assert context.project == committed.project.id.hex
    assert context.scopes[0][2] == (60, -1, -1, -1, 5)
    (deployment,) = context.deployments.values()
    assert deployment.name == "toy-chat"
    assert deployment.context_tokens > 0
    assert deployment.rates.output > 0
    assert await directory.find("x" * 12, (bytes(32),)) is None


async def test_an_imported_key_is_rehashed_once_and_only_by_who_knows_its_digest(
    committed: World, directory: PgDirectory
) -> None:
    """What a gateway may write: the digest of a key that was made elsewhere, in place of the one it knows."""
    row, plaintext = await new_key(committed)
    text = "sk-made_Elsewhere-123"
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    lookup = api_keys.foreign_lookup(pepper(), sha256)
    foreign = {"lookup": lookup, "digest": api_keys.foreign_digest(pepper(), sha256), "origin": "litellm"}

    @sync_to_async
    def change(**values: object) -> ApiKey:
        with tenant(committed.organization.id):
            ApiKey.objects.filter(id=row.id).update(**values)  # type: ignore[attr-defined]
            return ApiKey.objects.get(id=row.id)  # type: ignore[attr-defined]

    before = await change()
    new = bytes(range(32))
    await directory.rehash(before.lookup, bytes(before.digest), "z" * 12, new, "")
    assert bytes((await change()).digest) == bytes(before.digest), (
        "it was made here: its lookup part is its own"
    )
    await change(**foreign)
    cache = KeyCache(directory, pepper())
    context = await cache.authenticate(b"Bearer " + text.encode(), None)
    assert context.key == row.id.hex  # type: ignore[attr-defined]
    ours = api_keys.digest(pepper(), text)

    async def stored() -> bool:
        return bytes((await change()).digest) == ours

    await until(stored)
    await directory.rehash(lookup, foreign["digest"], lookup, new, "")  # type: ignore[arg-type]
    assert bytes((await change()).digest) == ours
    fresh = KeyCache(directory, pepper())
    assert (await fresh.authenticate(b"Bearer " + text.encode(), None)).key == context.key
    with pytest.raises(ApiError, match="invalid_api_key"):
        await fresh.authenticate(b"Bearer " + plaintext.encode(), None)


async def test_spent_money_is_asked_by_scope(committed: World, directory: PgDirectory) -> None:
    for scope in ("key", "prj", "org"):
        assert await directory.spent_nano(scope, "0" * 32) == 0
    with pytest.raises(DirectoryUnavailable):
        await directory.spent_nano("moon", "0" * 32)


async def test_revoke_in_the_console_reaches_the_cache_without_redis(
    committed: World, directory: PgDirectory
) -> None:
    row, plaintext = await new_key(committed)
    cache = KeyCache(directory, pepper())
    feed = ChangeFeed(directory, cache, poll_s=0.1)
    await feed.poll()
    header = b"Bearer " + plaintext.encode()
    await cache.authenticate(header, None)
    await sync_to_async(key_services.revoke_api_key)(
        organization_id=committed.organization.id,
        key_id=row.id,  # type: ignore[attr-defined]
    )
    feed.start()

    async def refused() -> bool:
        from controlplane.gateway.errors import ApiError

        try:
            await cache.authenticate(header, None)
        except ApiError as error:
            return error.code == "revoked_api_key"
        return False

    await until(refused)
    await feed.close()


async def test_gateway_on_postgres_lists_the_models(
    committed: World, pg_server: EmbeddedPostgres, redis_url: str
) -> None:
    _, plaintext = await new_key(committed)
    directory = PgDirectory(pg_server.dsn("app"))
    await directory.open()
    try:
        async with running(redis_url, key_pepper=pepper()) as gw:
            gw.gateway.key_cache._directory = directory
            response = await gw.http.get("/v1/models", headers=gw.auth(plaintext))
            assert [m["id"] for m in response.json()["data"]] == ["toy-chat"]
    finally:
        await directory.close()


async def test_postgres_that_restarts_is_found_again(
    pg_server: EmbeddedPostgres, directory: PgDirectory
) -> None:
    """Its connections are cut; the next question that works lifts the outage."""
    import psycopg

    assert (await directory.changes(None)).watermark
    with psycopg.connect(pg_server.dsn("superuser"), autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'corral-gateway'"
        )

    async def answers() -> bool:
        try:
            return bool((await directory.changes(None)).watermark)
        except DirectoryUnavailable:
            return False

    await until(answers)
    assert directory.up
