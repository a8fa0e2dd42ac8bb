"""Suspension: every surface refuses, gateways within a second and without Redis, machines go, nothing is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.management import CommandError, call_command
from django.db import DatabaseError, transaction

from controlplane.audit.models import Entry
from controlplane.deployments import sharing
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.gateway.auth import KeyCache
from controlplane.gateway.directory import PgDirectory
from controlplane.gateway.errors import ApiError
from controlplane.gateway.feed import ChangeFeed
from controlplane.lifecycle import suspension
from controlplane.lifecycle.models import Suspension
from controlplane.tenants import key_services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization, Role
from tests.controlplane.api.caller import Api, token_of
from tests.controlplane.console.conftest import signed_in
from tests.controlplane.gateway.harness import until
from tests.database import acting_as
from tests.world import World, build_world, make_deployment

AsOperator = Callable[[], AbstractContextManager[None]]


def test_it_begins_and_ends_once_with_a_reason(world: World, as_operator: AsOperator) -> None:
    organization_id = world.organization.id
    with as_operator():
        with pytest.raises(InvalidInputError, match="reason"):
            suspension.suspend(organization_id=organization_id, reason=" ")
        suspension.suspend(organization_id=organization_id, reason="unpaid since March")
        first = Organization.objects.get(id=organization_id).suspended_at
        with pytest.raises(ConflictError, match="already"):
            suspension.suspend(organization_id=organization_id, reason="again")
        assert suspension.reason_of(organization_id=organization_id) == "unpaid since March"
        assert Organization.objects.get(id=organization_id).suspended_at == first
        suspension.lift(organization_id=organization_id)
        assert Organization.objects.get(id=organization_id).suspended_at is None
        assert suspension.reason_of(organization_id=organization_id) == ""
        with pytest.raises(ConflictError, match="not suspended"):
            suspension.lift(organization_id=organization_id)
        suspension.suspend(organization_id=organization_id, reason="and again")
        kinds = list(Entry.objects.filter(kind="suspension").order_by("id").values_list("action", flat=True))
    assert kinds == ["create", "update", "create"]


def test_no_tenant_can_suspend_or_lift(world: World, as_operator: AsOperator) -> None:
    """Not even with raw SQL: the role of the web process may only read."""
    with as_operator():
        suspension.suspend(organization_id=world.organization.id, reason="unpaid")
    with tenant(world.organization.id):
        assert Suspension.objects.count() == 1
        for change in (
            lambda: Suspension.objects.update(lifted_at="2026-01-01T00:00Z"),
            lambda: Suspension.objects.create(organization=world.organization, reason="x"),
        ):
            with pytest.raises(DatabaseError, match="permission denied"), transaction.atomic():
                change()
    with tenant(world.other_organization.id):
        assert not Suspension.objects.exists()


def test_api_and_console_say_it(world: World, as_operator: AsOperator, redis_url: str) -> None:
    api, alice = Api(token_of(world.organization.id, Role.OWNER)), signed_in(world.alice)
    with as_operator():
        suspension.suspend(organization_id=world.organization.id, reason="unpaid <since March>")
    refused = api.get("/projects")
    assert (refused.status_code, refused.body["code"]) == (403, "organization_suspended")
    page = alice.get("/keys")
    assert "suspended: unpaid &lt;since March&gt;." in page.content.decode()
    made = alice.post("/keys/create", {"name": "k", "project": world.project.id.hex, "expires": ""})
    assert made.status_code == 403
    with as_operator():
        suspension.lift(organization_id=world.organization.id)
    assert api.get("/projects").status_code == 200
    assert "suspended" not in alice.get("/keys").content.decode()


def test_the_command(world: World, as_operator: AsOperator) -> None:
    with as_operator():
        out = StringIO()
        call_command("suspend", "acme", "--reason", "unpaid", "--json", stdout=out)
        assert json.loads(out.getvalue())["suspended_at"]
        for wrong in (["nobody"], ["acme", "--reason", "x"], ["acme", "--lift", "--reason", "x"], ["other"]):
            with pytest.raises(CommandError):
                call_command("suspend", *wrong)
        out = StringIO()
        call_command("suspend", "acme", "--lift", stdout=out)
    assert "may work again" in out.getvalue()


@pytest.mark.django_db(transaction=True)
async def test_gateways_refuse_within_a_second_without_redis(transactional_db: None, pg_server: Any) -> None:
    """The organization's own keys, and a partner's use of its deployment; and both work again when it is lifted."""

    def arrange() -> tuple[World, str, str]:
        world = build_world()
        shared = make_deployment(world, "shared")
        with acting_as("corral_operator"):
            sharing.grant(
                organization_id=world.organization.id,
                deployment_id=shared.id,
                grantee_id=world.other_organization.id,
            )
        _, own = key_services.create_api_key(
            organization_id=world.organization.id, project_id=world.project.id, name="k"
        )
        _, partners = key_services.create_api_key(
            organization_id=world.other_organization.id, project_id=world.other_project.id, name="k"
        )
        return world, own, partners

    def change(what: Callable[..., Any], **values: Any) -> None:
        with acting_as("corral_operator"):
            what(**values)

    world, own, partners = await sync_to_async(arrange)()
    directory = PgDirectory(pg_server.dsn("app"), cell="c0")
    await directory.open()
    cache = KeyCache(directory, bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"]))
    feed = ChangeFeed(directory, cache, poll_s=0.1)

    async def refusal() -> str:
        try:
            await cache.authenticate(b"Bearer " + own.encode(), None)
        except ApiError as error:
            return error.code
        return ""

    async def models() -> list[str]:
        return list((await cache.authenticate(b"Bearer " + partners.encode(), None)).deployments)

    async def is_closed() -> bool:
        return await refusal() == "organization_suspended" and await models() == []

    async def is_open() -> bool:
        return await refusal() == "" and await models() == ["acme/shared"]

    try:
        await feed.poll()
        assert await is_open()
        feed.start()
        what = {"organization_id": world.organization.id}
        await sync_to_async(change)(suspension.suspend, reason="unpaid", **what)
        await until(is_closed, 5.0)
        await sync_to_async(change)(suspension.lift, **what)
        await until(is_open, 5.0)
    finally:
        await feed.close()
        await directory.close()
