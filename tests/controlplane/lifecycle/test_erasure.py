"""Erasure: nothing personal of the tenant is left in any table or in Redis; bills and the audit chain stay whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from typing import Any

import psycopg
import pytest
import redis
from django.core.management import CommandError, call_command
from django.db import DatabaseError, connection, transaction
from django.utils import timezone

from billing.models import UsageEvent
from controlplane.audit import sealing
from controlplane.audit.models import Entry
from controlplane.deployments import sharing
from controlplane.errors import ConflictError, InvalidInputError, NotFoundError
from controlplane.identity import domains
from controlplane.lifecycle import erasure
from controlplane.lifecycle.models import Erasure
from controlplane.lifecycle.scrub import scrub
from controlplane.scim import groups, tokens, users
from controlplane.scim.users import Facts
from controlplane.tenants import key_services, services
from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Organization, Role, User
from infra.local.postgres import EmbeddedPostgres
from tests.booked import book_usage
from tests.controlplane.api.caller import Api, token_of
from tests.controlplane.console.conftest import signed_in
from tests.database import acting_as
from tests.records import packed
from tests.world import PASSWORD, World, build_world, make_deployment
from workers.keys import CellKeys

AsOperator = Callable[[], AbstractContextManager[None]]
KEYS = CellKeys("c0")
# In everything that Acme's people typed.
MARK = "zqx"


def stuffed() -> tuple[World, dict[str, Any]]:
    """Acme with the mark in all that it can name, one person of its own, and one who is elsewhere, too."""
    world = build_world()
    acme = world.organization.id
    services.update_organization(organization_id=acme, name=f"{MARK} Works", timezone="Europe/Berlin")
    with acting_as("corral_operator"):
        Organization.objects.filter(id=acme).update(slug=f"{MARK}-works")
    own = services.create_user(email=f"{MARK}@example.org", password=PASSWORD, name=f"Dr {MARK}")
    services.add_member(organization_id=acme, user=own, role=Role.ADMIN)
    services.add_member(organization_id=world.other_organization.id, user=world.bob, role=Role.VIEWER)
    project = services.create_project(organization_id=acme, name=f"{MARK} project", slug=f"{MARK}-project")
    deployment = make_deployment(world, f"{MARK}-chat", engine_profile={"engine": "toy"})
    key, plaintext = key_services.create_api_key(
        organization_id=acme, project_id=project.id, name=f"{MARK} key", created_by=own
    )
    account = accounts.create_service_account(organization_id=acme, name=f"{MARK} robot", role=Role.OWNER)
    accounts.create_token(organization_id=acme, account_id=account.id, name=f"{MARK} token")
    _provision(acme, world.other_organization.id)
    signed_in(own).get("/")
    book_usage(world, key_id=key.id, deployment_id=deployment.id, model=f"{MARK}-chat", cost_nano=777)
    with acting_as("corral_operator"):
        sharing.grant(
            organization_id=acme, deployment_id=deployment.id, grantee_id=world.other_organization.id
        )
    return world, {
        "own": own,
        "project": project,
        "deployment": deployment,
        "key": key,
        "plaintext": plaintext,
    }


def _provision(acme: Any, other: Any) -> None:
    """Acme's directory knows people: one it has deactivated, and one whom Other's directory knows, too."""
    for organization_id, domain in ((acme, f"{MARK}.example"), (other, "example.net")):
        row = domains.claim(organization_id=organization_id, name=domain)
        domains.mark_verified(organization_id=organization_id, domain_id=row.id)
    left = Facts(f"{MARK}-left", f"left@{MARK}.example", display_name=f"Left {MARK}")
    row = users.create_user(organization_id=acme, facts=left)
    users.change_user(organization_id=acme, scim_user_id=row.id, facts=replace(left, is_active=False))
    shared = users.create_user(organization_id=other, facts=Facts("shared", "shared@example.net"))
    users.change_user(
        organization_id=other,
        scim_user_id=shared.id,
        facts=Facts("shared", "shared@example.net", is_active=False),
    )
    services.add_member(organization_id=acme, user=shared.user, role=Role.VIEWER)
    groups.create_group(organization_id=acme, display_name=f"{MARK} group", members=[row.id])
    tokens.create_token(organization_id=acme, name=f"{MARK} directory")


def fill_redis(client: redis.Redis, world: World, made: dict[str, Any]) -> tuple[str, str]:
    """A finished request of Acme and one of Other, as gateways and machines leave them; their ids."""
    found = []
    for organization, project, key in (
        (world.organization, made["project"].id.hex, made["key"].id.hex),
        (world.other_organization, world.other_project.id.hex, "e" * 32),
    ):
        request = f"{len(found) + 1:032x}"
        admitted = packed(
            deployment=made["deployment"].id.hex, price_version="c" * 32, n_prompt_estimate=1, n_output_asked=1,
            money_held_nano=0, admitted_at_ms=1, band="1", n_output_expected=1, prefixes="", note="cp:",
            key=key, project=project, organization=organization.id.hex,
        )  # fmt: skip
        client.hset(KEYS.request(request), mapping={"state": "done", "adm": admitted})
        client.set(KEYS.body(request), f"{MARK} asks")
        client.rpush(KEYS.journal(request), f"{MARK} answer")
        client.set(f"c0:m:m1:body:{request}", f"{MARK} asks")
        client.rpush(f"c0:m:m1:jrn:{request}", f"{MARK} answer")
        client.set(KEYS.idempotency(project, "ab" * 16), request)
        for scope, scope_id in (("key", key), ("prj", project), ("org", organization.id.hex)):
            client.hset(KEYS.limits(scope, scope_id), "n", 1)
        found.append(request)
    return found[0], found[1]


def texts(server: EmbeddedPostgres) -> Iterator[tuple[str, str, str]]:
    """(table, column, value) of everything in the database that can hold text, as the superuser sees it."""
    with psycopg.connect(server.dsn("superuser"), autocommit=True) as superuser:
        columns = superuser.execute(
            "SELECT c.oid::regclass::text, a.attname, t.typname FROM pg_class c "
            "JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped "
            "JOIN pg_type t ON t.oid = a.atttypid "
            "WHERE c.relnamespace = 'public'::regnamespace AND c.relkind IN ('r', 'p') AND NOT c.relispartition "
            "AND t.typname IN ('text', 'varchar', 'bpchar', 'json', 'jsonb', 'bytea', '_text', '_varchar')"
        ).fetchall()
        assert len(columns) > 80
        for table, column, kind in columns:
            value = f"encode({column}, 'escape')" if kind == "bytea" else f"{column}::text"
            for (text,) in superuser.execute(f'SELECT {value} FROM {table} WHERE "{column}" IS NOT NULL'):
                yield table, column, text


def erase(world: World) -> None:
    """As the control worker does when it is due, until it is done."""
    with acting_as("corral_operator"):
        for _ in range(50):
            if erasure.advance(world.organization.id, quiet=timedelta(0)):
                return
    raise AssertionError("it never ends")


@pytest.mark.django_db(transaction=True)
def test_nothing_personal_is_left_in_any_table_or_in_redis(
    transactional_db: None, pg_server: EmbeddedPostgres, redis_url: str
) -> None:
    world, made = stuffed()
    with redis.Redis.from_url(redis_url) as client:
        ours, theirs = fill_redis(client, world, made)
        before = {(table, column) for table, column, text in texts(pg_server) if MARK in text}
        assert len(before) > 10, "the scan sees what is there"
        with acting_as("corral_operator"):
            while sealing.seal(world.organization.id):
                pass
            head = sealing.verify(world.organization.id)
        assert head.n_sealed > 5
        with tenant(world.organization.id):
            erasure.request(
                organization_id=world.organization.id, confirm=f"{MARK}-works", grace=timedelta(0)
            )
        erase(world)

        personal = [
            MARK, "Dr ", "Europe/Berlin", "alice@example.org", made["key"].lookup, made["plaintext"][-4:] + '"'
        ]  # fmt: skip
        left = [
            (table, column, text)
            for table, column, text in texts(pg_server)
            if any(each in text for each in personal) and table != "corral_change"
        ]
        assert not left
        assert not [key for key in client.scan_iter("*") if ours in key.decode()]
        for key in client.scan_iter("*"):
            for word in (world.organization.id, made["project"].id, made["key"].id):
                assert word.hex not in key.decode(), key
        assert client.exists(KEYS.request(theirs), KEYS.body(theirs), f"c0:m:m1:jrn:{theirs}") == 3, (
            "others' stays"
        )

    assert {user.email for user in User.objects.all()} == {
        "bob@example.org",
        "charlie@example.org",
        "shared@example.net",  # a directory of another organization keeps an entry, deactivated as it is
    }
    with acting_as("corral_operator"):
        assert list(Member.objects.values_list("organization__slug", flat=True).distinct()) == ["other"]
        [usage] = UsageEvent.objects.filter(organization_id=world.organization.id)
        assert (usage.model, usage.cost_nano, usage.api_key_id) == ("erased", 777, made["key"].id)
        row = Organization.objects.get(id=world.organization.id)
        assert (row.name, row.slug) == ("erased", f"erased-{row.id.hex}")
        while sealing.seal(row.id):
            pass
        verdict = sealing.verify(row.id)
        assert (verdict.problem, verdict.n_unsealed) == ("", 0)
        assert verdict.n_redacted >= head.n_sealed
        told = Entry.objects.filter(organization_id=row.id).exclude(changes={})
        assert set(told.values_list("kind", flat=True)) == {"erasure"}
        assert Erasure.objects.get().state == "erased"
        assert sealing.verify(world.other_organization.id).problem == ""


def test_it_can_be_cancelled_until_it_is_due(world: World, as_operator: AsOperator) -> None:
    organization_id = world.organization.id
    with pytest.raises(InvalidInputError, match="confirm"):
        erasure.request(organization_id=organization_id, confirm="other")
    with tenant(organization_id):
        with pytest.raises(NotFoundError):
            erasure.current(organization_id=organization_id)
        erasure.request(organization_id=organization_id, confirm="acme", grace=timedelta(days=3))
        again = erasure.request(organization_id=organization_id, confirm="acme", grace=timedelta(days=5))
        assert Erasure.objects.get().due_at == again.due_at
        erasure.request(organization_id=organization_id, confirm="acme", grace=timedelta(days=3))
    with as_operator():
        assert erasure.due(timezone.now()) == []
        assert erasure.due(timezone.now() + timedelta(days=3, seconds=1)) == [organization_id]
    with tenant(organization_id):
        erasure.cancel(organization_id=organization_id)
        erasure.request(organization_id=organization_id, confirm="acme", grace=timedelta(0))
    with as_operator():
        assert not erasure.advance(organization_id), "suspended, and quiet first"
        assert Organization.objects.get(id=organization_id).suspended_at is not None
        assert erasure.due(timezone.now()) == []
        assert User.objects.filter(email="alice@example.org").exists()
    with tenant(organization_id):
        with pytest.raises(ConflictError, match="has begun"):
            erasure.cancel(organization_id=organization_id)
        with pytest.raises(ConflictError, match="has begun"):
            erasure.request(organization_id=organization_id, confirm="acme")


def test_only_an_erasure_may_erase_or_redact(world: World, as_operator: AsOperator) -> None:
    """The functions refuse anybody else's organization, and the app role altogether."""
    entry = Entry.objects.filter(organization_id=world.organization.id)
    with as_operator():
        sealing.seal(world.organization.id)
        first = entry.first()
        for statement, values in (
            ("SELECT corral_erase(%s, '{}')", [world.organization.id]),
            ("SELECT corral_redact(%s, ARRAY[%s]::bigint[], ARRAY[%s]::bytea[])",
             [world.organization.id, first.pk, b"x" * 32]),
            ("UPDATE audit_entry SET changes = '{}' WHERE id = %s", [first.pk]),
            ("DELETE FROM audit_entry WHERE id = %s", [first.pk]),
        ):  # fmt: skip
            with pytest.raises(DatabaseError), transaction.atomic(), connection.cursor() as cursor:
                cursor.execute(statement, values)
        assert Entry.objects.get(pk=first.pk).changes == first.changes
    for statement in ("SELECT corral_erase(%s, '{}')", "SELECT corral_redact(%s, '{}', '{}')"):
        with (
            pytest.raises(DatabaseError, match="permission denied"),
            transaction.atomic(),
            connection.cursor() as cursor,
        ):
            cursor.execute(statement, [world.organization.id])


@pytest.mark.django_db(transaction=True)
def test_a_false_redaction_breaks_the_chain(transactional_db: None) -> None:
    world = build_world()
    with tenant(world.organization.id):
        erasure.request(organization_id=world.organization.id, confirm="acme", grace=timedelta(0))
    with acting_as("corral_operator"):
        Erasure.objects.update(state="erasing")
        sealing.seal(world.organization.id)
        found = sealing.redactable(world.organization.id)
        assert found
        assert all(each.salt for each in found)
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT corral_redact(%s, %s, %s)", [world.organization.id, [found[0].pk], [b"x" * 32]]
            )
        assert f"entry {found[0].pk}" in sealing.verify(world.organization.id).problem


def test_owners_ask_through_the_api_and_nobody_else(world: World) -> None:
    owner = Api(token_of(world.organization.id, Role.OWNER))
    admin = Api(token_of(world.organization.id, Role.ADMIN))
    body = {"confirm": "acme"}
    assert admin.call("PUT", "/organization/erasure", body).status_code == 403
    wrong = owner.call("PUT", "/organization/erasure", {"confirm": "Acme"})
    assert (wrong.status_code, wrong.body["errors"][0]["field"]) == (400, "confirm")
    made = owner.call("PUT", "/organization/erasure", body)
    assert (made.status_code, made.body["state"]) == (200, "requested")
    assert owner.get("/organization/erasure").body["id"] == made.body["id"]
    assert owner.get("/projects").status_code == 200, "it works on until it is due"
    assert owner.call("DELETE", "/organization/erasure").status_code == 204
    assert owner.get("/organization/erasure").status_code == 404


def test_the_command(world: World, as_operator: AsOperator) -> None:
    with as_operator():
        with pytest.raises(CommandError, match="confirm"):
            call_command("erase_organization", "acme")
        out = StringIO()
        call_command("erase_organization", "acme", "--confirm", "acme", "--json", stdout=out)
        assert json.loads(out.getvalue())["state"] == "requested"
        call_command("erase_organization", "acme", "--cancel", stdout=StringIO())
        with pytest.raises(CommandError, match="no erasure"):
            call_command("erase_organization", "acme", "--cancel")


def test_scrubbing_twice_is_scrubbing_once(world: World, redis_url: str) -> None:
    made = {"project": world.project, "key": world.project, "deployment": world.project}
    with redis.Redis.from_url(redis_url) as client:
        fill_redis(client, world, made)
        values = {"organization": world.organization.id.hex, "names": [world.project.id.hex]}
        assert scrub(client, KEYS, **values) > 5
        assert scrub(client, KEYS, **values) == 0
