"""The pepper changes while keys and tokens work: both are accepted, what is used is kept under the new one."""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import replace
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.test import override_settings

from controlplane.gateway.auth import KeyCache
from controlplane.gateway.directory import PgDirectory
from controlplane.gateway.errors import ApiError
from controlplane.gateway.feed import ChangeFeed
from controlplane.tenants import api_keys, key_services
from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, ManagementToken, Role
from infra.local.postgres import EmbeddedPostgres
from tests.controlplane.api.caller import Api, token_of
from tests.controlplane.gateway.harness import until
from tests.world import World, build_world

OLD = bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"])
NEW = secrets.token_bytes(32)


def with_peppers(settings: Any, present: bytes, **also: bytes) -> Any:
    values = {f"key_pepper_{name}": pepper for name, pepper in also.items()}
    return override_settings(ENV=replace(settings.ENV, key_pepper=present, **values))


def test_a_token_is_kept_under_the_new_pepper_when_it_is_used(world: World, settings: Any) -> None:
    used, unused = token_of(world.organization.id, Role.OWNER), token_of(world.organization.id, Role.VIEWER)
    with with_peppers(settings, NEW):
        assert accounts.find_caller(used) is None
    with with_peppers(settings, OLD, next=NEW):  # first everybody learns of it
        assert Api(used).get("/projects").status_code == 200
    with with_peppers(settings, NEW, previous=OLD):  # then it is written
        for _ in range(2):
            assert Api(used).get("/projects").status_code == 200
        assert accounts.find_caller(used[:-2] + "xx") is None
        made = token_of(world.organization.id, Role.BILLING)
    with with_peppers(settings, NEW):
        assert Api(used).get("/projects").status_code == 200
        assert accounts.find_caller(made) is not None
        assert accounts.find_caller(unused) is None, (
            "what was never used meanwhile is gone with the old pepper"
        )
    with tenant(world.organization.id):
        stored = dict(ManagementToken.objects.values_list("last4", "pepper"))
    assert stored[used[-4:]] == stored[made[-4:]] == api_keys.pepper_id(NEW)
    assert stored[unused[-4:]] == api_keys.pepper_id(OLD)


@pytest.mark.django_db(transaction=True)
async def test_gateways_of_both_phases_serve_a_key_side_by_side(
    transactional_db: None, pg_server: EmbeddedPostgres
) -> None:
    """One has still to learn that the upcoming pepper is the present one, the other has: whatever is stored, both know
    the key; at last only the new is needed."""
    world = await sync_to_async(build_world)()
    _, key = await sync_to_async(key_services.create_api_key)(
        organization_id=world.organization.id, project_id=world.project.id, name="k"
    )
    directory = PgDirectory(pg_server.dsn("app"))
    await directory.open()
    header = b"Bearer " + key.encode()

    def gateway(present: bytes, **also: bytes) -> KeyCache:
        return KeyCache(directory, api_keys.Peppers(present, **also), fresh_s=0.0, unknown_s=0.0)

    async def stored() -> str:
        def read() -> str:
            with tenant(world.organization.id):
                return str(ApiKey.objects.get().pepper)

        return await sync_to_async(read)()

    try:
        before, after = gateway(OLD, upcoming=NEW), gateway(NEW, previous=OLD)
        await before.authenticate(header, None)
        assert await stored() == api_keys.pepper_id(OLD), "nothing is written before everybody knows"
        await after.authenticate(header, None)

        async def is_rehashed() -> bool:
            return await stored() == api_keys.pepper_id(NEW)

        await until(is_rehashed)
        for cache in (before, after, before, gateway(NEW)):
            assert (await cache.authenticate(header, None)).project == world.project.id.hex
        with pytest.raises(ApiError, match="invalid_api_key"):
            await gateway(OLD).authenticate(header, None)
        with pytest.raises(ApiError, match="invalid_api_key"):
            await after.authenticate(header[:-2] + b"xx", None)
        assert await stored() == api_keys.pepper_id(NEW), "an old gateway does not write it back"
    finally:
        await directory.close()


@pytest.mark.django_db(transaction=True)
async def test_an_imported_key_moves_with_its_lookup_part_and_can_be_revoked_at_once(
    transactional_db: None, pg_server: EmbeddedPostgres
) -> None:
    """Its lookup part is a hash under the pepper, too: whoever cached it under the former one hears of the move."""
    world = await sync_to_async(build_world)()
    text, which = "sk-from-elsewhere", {"organization_id": world.organization.id}
    sha256 = hashlib.sha256(text.encode()).hexdigest()

    def arrange() -> ApiKey:
        row, _ = key_services.create_api_key(**which, project_id=world.project.id, name="k")
        with tenant(world.organization.id):
            ApiKey.objects.update(
                lookup=api_keys.foreign_lookup(OLD, sha256),
                digest=api_keys.foreign_digest(OLD, sha256),
                origin="litellm",
                pepper="",
            )
        return row

    row = await sync_to_async(arrange)()
    directory = PgDirectory(pg_server.dsn("app"))
    await directory.open()
    header = b"Bearer " + text.encode()
    before = KeyCache(directory, api_keys.Peppers(OLD, upcoming=NEW), unknown_s=0.0)
    after = KeyCache(directory, api_keys.Peppers(NEW, previous=OLD), fresh_s=0.0, unknown_s=0.0)
    feed = ChangeFeed(directory, before, poll_s=0.05)

    async def moved() -> bool:
        return (
            await directory.find(api_keys.foreign_lookup(NEW, sha256), (api_keys.digest(NEW, text),))
            is not None
        )

    try:
        await feed.poll()
        await before.authenticate(header, None)

        async def is_moved_by_use() -> (
            bool
        ):  # `before` may just be keeping it under the former pepper: the next use does
            await after.authenticate(header, None)
            return await moved()

        await until(is_moved_by_use)
        await feed.poll()
        for cache in (before, after, KeyCache(directory, NEW)):
            assert (await cache.authenticate(header, None)).project == world.project.id.hex
        assert await moved(), "who has still to learn of it leaves it alone"
        await sync_to_async(key_services.revoke_api_key)(**which, key_id=row.id)
        await feed.poll()
        with pytest.raises(ApiError, match="revoked_api_key"):
            await before.authenticate(header, None)
    finally:
        await directory.close()


@pytest.mark.django_db(transaction=True)
async def test_what_was_changed_meanwhile_is_not_written_over(
    transactional_db: None, pg_server: EmbeddedPostgres
) -> None:
    world = await sync_to_async(build_world)()
    row, _ = await sync_to_async(key_services.create_api_key)(
        organization_id=world.organization.id, project_id=world.project.id, name="k"
    )
    stored = bytes(row.digest)
    directory = PgDirectory(pg_server.dsn("app"))
    await directory.open()
    try:
        await directory.rehash(row.lookup, b"x" * 32, row.lookup, b"y" * 32, "00000000")
        await directory.rehash(
            row.lookup, stored, "z" * 12, b"y" * 32, "00000000"
        )  # ours: the lookup part is its own
        assert await directory.find(row.lookup, (stored,)) is not None
    finally:
        await directory.close()
