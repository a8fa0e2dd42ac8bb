"""Exports: everything of the tenant, nothing of others, no secrets; written in parts, read by owners, gone in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.utils import timezone

from controlplane.errors import ConflictError, NotFoundError
from controlplane.lifecycle import belongings, exports
from controlplane.lifecycle.models import Export, ExportPart
from controlplane.operations import advance
from controlplane.operations.models import Operation
from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Organization, Role, User
from tests.booked import book_usage
from tests.controlplane.api.caller import Api, token_of
from tests.world import World, make_deployment

AsOperator = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def key(world: World) -> tuple[ApiKey, str]:
    make_deployment(world, "acme-chat")
    book_usage(world, model="acme-chat")
    services.create_project(organization_id=world.other_organization.id, name="Theirs alone", slug="theirs")
    return key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="acme-key"
    )


def lines_of(world: World) -> list[dict[str, Any]]:
    return [json.loads(line) for line in belongings.everything(world.organization.id)]


def run(as_operator: AsOperator) -> None:
    """The control worker, until nothing is due."""
    with as_operator():
        for _ in range(100):
            if not advance.advance_due(10):
                return
    raise AssertionError("it never ends")


def test_it_holds_everything_and_nothing_of_others(
    world: World, key: tuple[ApiKey, str], as_operator: AsOperator
) -> None:
    with as_operator():
        rows = lines_of(world)
    text = json.dumps(rows)
    kinds = {row["table"] for row in rows}
    assert {
        "tenants.Organization",
        "tenants.User",
        "tenants.ApiKey",
        "billing.UsageEvent",
        "audit.Entry",
    } <= kinds
    assert {row["row"]["email"] for row in rows if row["table"] == "tenants.User"} == {
        "alice@example.org",
        "bob@example.org",
    }
    assert "acme-key" in text
    assert "acme-chat" in text
    for strange in ("charlie@example.org", "Theirs alone", world.other_organization.id.hex):
        assert strange not in text
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_it_holds_no_secret(world: World, key: tuple[ApiKey, str], as_operator: AsOperator) -> None:
    row, plaintext = key
    with as_operator():
        text = json.dumps(lines_of(world))
        password = User.objects.get(id=world.alice.id).password
    for secret in (row.lookup, bytes(row.digest).hex(), plaintext, plaintext[-43:-4], password):
        assert secret not in text


def test_every_tenant_table_is_in_it_but_those_named() -> None:
    from tests.controlplane.tenants.test_rls import tenant_models

    told = set(belongings.kinds())
    left_out = {model._meta.label for model in tenant_models() if model not in told}
    assert left_out == {"tenants.IdempotentWrite", "lifecycle.Export", "lifecycle.ExportPart"}


def test_an_owner_exports_and_reads_and_deletes(
    world: World, key: tuple[ApiKey, str], as_operator: AsOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "ROWS_A_PART", 3)
    owner = Api(token_of(world.organization.id, Role.OWNER))
    admin = Api(token_of(world.organization.id, Role.ADMIN))
    stranger = Api(token_of(world.other_organization.id, Role.OWNER))
    made = owner.post("/organization/exports")
    assert (made.status_code, made.body["state"], made.body["progress"]) == (201, "pending", 0)
    path = f"/organization/exports/{made.body['id']}"
    assert owner.post("/organization/exports").status_code == 409, "one at a time"
    run(as_operator)
    done = owner.get(path).body
    assert (done["state"], done["progress"]) == ("succeeded", 100)
    assert done["n_parts"] > 5
    rows = [row for n in range(done["n_parts"]) for row in owner.get(f"{path}/parts/{n}").body["rows"]]
    assert len(rows) == done["n_rows"]
    with as_operator():
        tables_now = {row["table"] for row in lines_of(world)}
    assert {row["table"] for row in rows} == tables_now
    assert len({json.dumps(row) for row in rows}) == len(rows), "no row twice"
    assert owner.get(f"{path}/parts/{done['n_parts']}").status_code == 404
    for other, status in ((admin, 403), (stranger, 404)):
        assert other.get(path).status_code == status
        assert other.get(f"{path}/parts/0").status_code == status
        assert other.call("DELETE", path).status_code == status
    assert owner.call("DELETE", path).status_code == 204
    assert owner.get(path).status_code == 404
    with as_operator():
        assert not ExportPart.objects.exists()


def test_a_worker_that_dies_costs_no_row_and_doubles_none(
    world: World, key: tuple[ApiKey, str], as_operator: AsOperator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "ROWS_A_PART", 2)
    with tenant(world.organization.id):
        export = exports.begin(organization_id=world.organization.id)
    n = 0
    keep = exports._keep

    def dying(found: Export, lines: list[str]) -> None:
        nonlocal n
        n += 1
        if n == 4:
            raise ZeroDivisionError
        keep(found, lines)

    monkeypatch.setattr(exports, "_keep", dying)
    with as_operator():
        advance.advance_due(1)
        Operation.objects.update(next_at=timezone.now())
    run(as_operator)
    with tenant(world.organization.id):
        export.refresh_from_db()
        parts = [
            exports.part(organization_id=world.organization.id, export_id=export.id, n=n)
            for n in range(export.n_parts)
        ]
    lines = [line for part in parts for line in part.splitlines() if b'"operations.Operation"' not in line]
    assert len(set(lines)) == len(lines)
    assert Operation.objects.filter(state="failed").count() == 0
    assert sum(len(part.splitlines()) for part in parts) == export.n_rows


def test_it_expires_and_no_more_than_three_are_kept(world: World, as_operator: AsOperator) -> None:
    organization_id = world.organization.id
    with tenant(organization_id):
        for _ in range(3):
            export = exports.begin(organization_id=organization_id)
            with as_operator():
                Operation.objects.update(state="succeeded", progress=100, finished_at=timezone.now())
        with pytest.raises(ConflictError, match="3 exports"):
            exports.begin(organization_id=organization_id)
        Export.objects.filter(id=export.id).update(expires_at=timezone.now() - timedelta(seconds=1))
        with pytest.raises(NotFoundError):
            exports.export(organization_id=organization_id, export_id=export.id)
    with as_operator():
        assert exports.forget_expired() == 1
        assert Export.objects.count() == 2


def test_the_command(world: World, key: tuple[ApiKey, str], as_operator: AsOperator, tmp_path: Path) -> None:
    with as_operator():
        out, file = StringIO(), tmp_path / "acme.jsonl"
        call_command("export_organization", "acme", "--to", "-", stdout=out)
        call_command("export_organization", "acme", "--to", str(file))
        assert file.read_text() == out.getvalue()
        assert file.stat().st_mode & 0o077 == 0
        for wrong in (["acme", "--to", str(file)], ["nobody", "--to", "-"]):
            with pytest.raises(CommandError):
                call_command("export_organization", *wrong)
        assert Organization.objects.filter(slug="acme").exists()
