"""The audit log: every change is in it, nobody can take one out, and whoever forces it is found out."""

from __future__ import annotations

import json
from io import StringIO

import psycopg
import pytest
from django.core.management import call_command
from django.db import DatabaseError, connection

from controlplane.audit import sealing
from controlplane.audit.models import Entry, Seal
from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Project, Role
from infra.local.postgres import EmbeddedPostgres
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World, build_world


def log_of(world: World) -> list[Entry]:
    with tenant(world.organization.id):
        return list(Entry.objects.order_by("pk"))


@pytest.mark.django_db
def test_services_bulk_updates_and_raw_sql_are_in_it(world: World) -> None:
    n = len(log_of(world))
    key, plaintext = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    with tenant(world.organization.id):
        Project.objects.filter(id=world.project.id).update(name="By bulk", weight=7)
        with connection.cursor() as cursor:
            cursor.execute("UPDATE tenants_project SET name = 'By hand' WHERE id = %s", [world.project.id])
    created, bulk, raw = log_of(world)[n:]
    assert (created.action, created.kind, created.thing) == ("create", "api_key", key.id)
    assert created.changes["name"] == [None, "program"]
    assert [None, None] not in created.changes.values()
    assert "digest" not in created.changes
    assert key.lookup not in json.dumps(created.changes)
    assert plaintext[-43:-4] not in json.dumps(created.changes)
    assert (bulk.action, bulk.changes) == ("update", {"name": ["Main", "By bulk"], "weight": [100, 7]})
    assert raw.changes == {"name": ["By bulk", "By hand"]}
    assert raw.actor == "role corral_app"


@pytest.mark.django_db
def test_what_the_house_notes_all_the_time_is_not(world: World) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    n = len(log_of(world))
    with tenant(world.organization.id):
        ApiKey.objects.filter(id=key.id).update(last_used_at=key.created_at)
    assert len(log_of(world)) == n


@pytest.mark.django_db
def test_it_names_the_token_that_acted_and_a_change_undone_leaves_nothing(world: World) -> None:
    api = Api(token_of(world.organization.id, Role.OWNER))
    n = len(log_of(world))
    assert api.post("/projects", {"name": "Two", "slug": "two"}).status_code == 201
    assert api.post("/projects", {"name": "Two", "slug": "two"}).status_code == 409
    (entry,) = log_of(world)[n:]
    assert entry.actor.startswith("tok_")
    assert (entry.action, entry.kind) == ("create", "project")
    (shown,) = api.get("/audit?kind=project&limit=1").body["data"]
    assert (shown["actor"], shown["changes"]["slug"]) == (entry.actor, [None, "two"])
    assert shown["n"] is None, "not sealed yet"
    assert api.get(f"/audit?cursor={api.get('/audit?limit=1').body['next_cursor']}").status_code == 200
    assert api.get("/audit?cursor=" + "OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5").status_code == 400


@pytest.mark.django_db
def test_a_person_is_named_too(world: World, client) -> None:
    client.force_login(world.alice)
    n = len(log_of(world))
    response = client.post("/keys/create", {"name": "k", "project": world.project.id.hex, "expires": ""})
    assert response.status_code == 200, response.content[-500:]
    (entry,) = log_of(world)[n:]
    assert entry.actor == f"usr_{world.alice.id.hex}"


@pytest.mark.django_db
def test_a_stranger_sees_none_of_it(world: World) -> None:
    with tenant(world.other_organization.id):
        assert not Entry.objects.filter(organization_id=world.organization.id).exists()
    assert not Entry.objects.exists()


@pytest.mark.django_db
@pytest.mark.parametrize("role", ["corral_app", "corral_operator", "corral_owner"])
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit_entry SET actor = 'nobody'",
        "DELETE FROM audit_entry",
        "TRUNCATE audit_entry, audit_seal",
    ],
)
def test_no_role_changes_or_deletes_an_entry(world: World, role: str, statement: str) -> None:
    n = len(log_of(world))
    assert n > 0
    with (
        acting_as(role),
        pytest.raises(DatabaseError),
        tenant(world.organization.id),
        connection.cursor() as cursor,
    ):
        cursor.execute(statement)
    assert len(log_of(world)) == n


@pytest.fixture
def committed(transactional_db: None) -> World:
    return build_world()


@pytest.mark.django_db(transaction=True)
def test_the_chain_finds_what_was_forced(
    committed: World, pg_server: EmbeddedPostgres, capsys: pytest.CaptureFixture[str]
) -> None:
    organization_id = committed.organization.id
    with acting_as("corral_operator"):
        assert sealing.unsealed_organizations(10)
        n_sealed = sealing.seal(organization_id)
        assert n_sealed == Entry.objects.filter(organization_id=organization_id).count() > 2
        assert sealing.seal(organization_id) == 0, "once"
        services.create_project(organization_id=organization_id, name="Two", slug="two")
        whole = sealing.verify(organization_id)
        assert (whole.problem, whole.n_sealed, whole.n_unsealed) == ("", n_sealed, 1)
        assert sealing.seal(organization_id) == 1
        assert sealing.verify(organization_id).n_unsealed == 0
        rows = list(sealing.export(organization_id))
        assert [row["n"] for row in rows] == list(range(1, n_sealed + 2))
        assert rows[-1]["hash"] == sealing.verify(organization_id).head

    def forced(statement: str) -> str:
        """What verifying says after the owner of the table did this, and undid it."""
        with psycopg.connect(pg_server.dsn("owner")) as owner:
            for table in ("audit_entry", "audit_seal"):
                owner.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            owner.execute(statement, {"o": organization_id})
            owner.commit()
        with acting_as("corral_operator"):
            found = sealing.verify(organization_id).problem
            out = StringIO()
            with pytest.raises(SystemExit):
                call_command("audit", "verify", "--organization", "acme", stdout=out)
            assert "BROKEN" in out.getvalue()
        return found

    first = "(SELECT min(id) FROM audit_entry WHERE organization_id = %(o)s)"
    assert "link 1 was changed" in forced(f"UPDATE audit_entry SET actor = 'usr_1' WHERE id = {first}")
    assert "deleted" in forced(f"DELETE FROM audit_entry WHERE id = {first}")
    last = "(SELECT max(n) - 1 FROM audit_seal WHERE organization_id = %(o)s)"
    assert forced(f"DELETE FROM audit_seal WHERE organization_id = %(o)s AND n = {last}")


@pytest.mark.django_db(transaction=True)
def test_an_entry_waits_for_transactions_that_still_run(
    committed: World, pg_server: EmbeddedPostgres
) -> None:
    organization_id = committed.organization.id
    with psycopg.connect(pg_server.dsn("operator")) as other:
        other.execute("UPDATE tenants_project SET name = 'Late' WHERE id = %s", [committed.project.id])
        services.create_project(organization_id=organization_id, name="Two", slug="two")
        with acting_as("corral_operator"):
            sealing.seal(organization_id)
            assert sealing.verify(organization_id).n_unsealed >= 1, "an older one may still come"
        other.commit()
    with tenant(organization_id):
        assert Entry.objects.get(changes__name__1="Late").actor == "role corral_operator"
    with acting_as("corral_operator"):
        sealing.seal(organization_id)
        assert sealing.verify(organization_id).n_unsealed == 0
        assert (
            Seal.objects.filter(organization_id=organization_id).count()
            == Entry.objects.filter(organization_id=organization_id).count()
        )
