"""Adapters over REST, by command, and as gateways are told of them: who has which, and when one is served."""

from __future__ import annotations

import json
from datetime import timedelta
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.core.management import CommandError, call_command
from django.db import connection
from django.utils import timezone

from controlplane.adapters import purging, receiving, selectors, services
from controlplane.adapters.models import Adapter, AdapterState
from controlplane.audit.models import Entry
from controlplane.deployments import importing
from controlplane.deployments import services as deployments
from controlplane.deployments.models import Deployment
from controlplane.errors import InvalidInputError
from controlplane.operations.advance import advance
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.workers.adapter_files import write_adapter
from tests.world import World, make_adapter, make_deployment, make_version

TOY = {"engine": "toy", "max_loras": 2, "max_lora_rank": 8}


@pytest.fixture
def var(tmp_path: Path, settings: Any) -> Path:
    from dataclasses import replace

    settings.ENV = replace(settings.ENV, var=tmp_path)
    return tmp_path


@pytest.fixture
def chat(world: World) -> Deployment:
    return make_deployment(world, "chat", engine_profile=TOY)


@pytest.fixture
def api(world: World) -> Api:
    return Api(token_of(world.organization.id, Role.DEVELOPER))


def found(world: World, adapter_id: UUID | None = None) -> Adapter:
    """As its tenant reads it; the only one where no id is given."""
    with tenant(world.organization.id):
        rows = selectors.adapters(organization_id=world.organization.id)
        return rows.get(id=adapter_id) if adapter_id else rows.get()


def served_to(project_id: UUID, cell: str = "c0") -> list[str]:
    """Names of the adapters that a key of the project is told of, as any role."""
    record = json.dumps({"project": {"id": project_id.hex}})
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_with_adapters(%s::jsonb, %s)", [record, cell])
        return [each["name"] for each in json.loads(cursor.fetchone()[0]).get("adapters", [])]


def test_from_registration_to_the_end(world: World, chat: Deployment, api: Api, var: Path) -> None:
    made = api.post("/adapters", {"deployment_id": str(chat), "name": "formal"})
    assert made.status_code == 201
    assert (made.body["model"], made.body["state"], made.body["upload"]) == (
        "chat:formal",
        "awaiting_upload",
        None,
    )
    assert served_to(world.project.id) == []
    path = f"/adapters/{made.body['id']}"
    ready = receiving.receive(found(world), write_adapter(var / "a", r=4))
    assert (ready.state, ready.rank, ready.modules) == ("ready", 4, ["q_proj", "v_proj"])
    assert served_to(world.project.id) == ["chat:formal"]
    shown = api.get(path)
    assert (shown.body["state"], shown.body["not_served_because"], shown.body["rank"]) == ("ready", "", 4)
    assert shown.body["digest"] == ready.digest
    assert importing.store(var).has(ready.digest)
    planned = api.call("DELETE", f"{path}?plan=true")
    assert planned.body["changes"][0]["kind"] == "adapter"
    assert api.call("DELETE", path, **{"If-Match": '"other"'}).status_code == 412
    assert served_to(world.project.id) == ["chat:formal"]
    assert api.call("DELETE", path).status_code == 204
    assert api.call("DELETE", path).status_code == 204  # twice is once
    assert served_to(world.project.id) == []
    assert api.get(path).body["state"] == "retired"
    again = api.post("/adapters", {"deployment_id": str(chat), "name": "formal"})
    assert again.status_code == 201  # the name is free
    listed = api.get("/adapters?state=retired").body["data"]
    assert [each["id"] for each in listed] == [made.body["id"]]
    with acting_as("corral_operator"):
        kinds = Entry.objects.filter(kind="adapter").values_list("action", flat=True)
        assert sorted(set(kinds)) == ["create", "update"]


@pytest.mark.parametrize(
    ("body", "field", "word"),
    [
        ({"name": "a:b"}, "name", "match"),
        ({"name": "x" * 48 + "y"}, "name", "match"),
        ({"name": "ok", "rank": 4}, "rank", "xtra"),
    ],
)
def test_bad_names_are_refused(chat: Deployment, api: Api, body: Any, field: str, word: str) -> None:
    refused = api.post("/adapters", {"deployment_id": str(chat), **body})
    assert (refused.status_code, refused.body["errors"][0]["field"]) == (400, field)
    assert word in refused.body["detail"]


def test_what_cannot_be_served_is_refused_before_anything_is_uploaded(
    world: World, chat: Deployment, api: Api
) -> None:
    version = chat.model_version_id
    plain = make_deployment(world, "plain", model_version_id=version)
    refused = api.post("/adapters", {"deployment_id": str(plain), "name": "formal"})
    assert (refused.status_code, "max_loras" in refused.body["detail"]) == (400, True)
    long = make_deployment(world, "x" * 60, model_version_id=version, engine_profile=TOY)
    refused = api.post("/adapters", {"deployment_id": str(long), "name": "formal"})
    assert (refused.status_code, "at most 3" in refused.body["detail"]) == (400, True)
    make_adapter(chat, "formal")
    taken = api.post("/adapters", {"deployment_id": str(chat), "name": "formal"})
    assert (taken.status_code, taken.body["errors"][0]["field"]) == (409, "name")


def test_refused_files_say_why_and_free_the_name(world: World, chat: Deployment, api: Api, var: Path) -> None:
    row = services.register(organization_id=world.organization.id, deployment_id=chat.id, name="wide")
    with pytest.raises(InvalidInputError, match="max_lora_rank 8"):
        receiving.receive(row, write_adapter(var / "wide", r=16))
    shown = api.get(f"/adapters/{row}").body
    assert (shown["state"], shown["error_code"]) == ("refused", "rank_too_high")
    assert "max_lora_rank 8" in shown["not_served_because"]
    assert served_to(world.project.id) == []
    assert not importing.store(var).digests()  # nothing was kept
    services.register(organization_id=world.organization.id, deployment_id=chat.id, name="wide")
    assert api.post(f"/adapters/{row}/complete").status_code == 409


def test_it_is_served_with_the_weights_it_was_made_for_only(world: World, chat: Deployment) -> None:
    row = make_adapter(chat, rank=8)

    def change(**values: Any) -> str:
        deployments.update_deployment(
            organization_id=world.organization.id,
            deployment_id=chat.id,
            change=deployments.Change(**values),
        )
        now = found(world)
        why = selectors.why_not_served(now)
        assert (served_to(world.project.id) == []) == bool(why)
        with tenant(world.organization.id):
            assert (selectors.served(now.deployment) == []) == bool(why)
        return why

    assert served_to(world.project.id) == ["chat:formal"]
    other = make_version(world.organization.id, digest="b" * 64)
    assert "another model version" in change(model_version_id=other.id)
    assert change(model_version_id=chat.model_version_id) == ""
    assert "max_loras" in change(engine_profile={"engine": "toy"})
    assert "rank 8" not in change(engine_profile=TOY)
    with tenant(world.organization.id):
        Adapter.objects.filter(id=row.id).update(rank=16)
    assert "max_lora_rank 8" in change(idle_timeout_s=10)
    assert served_to(world.project.id, cell="c9") == []


def test_another_tenant_sees_and_touches_nothing(world: World, chat: Deployment) -> None:
    row = make_adapter(chat)
    stranger = Api(token_of(world.other_organization.id, Role.OWNER))
    assert stranger.get("/adapters").body["data"] == []
    for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/complete")):
        assert stranger.call(method, f"/adapters/{row}{path}").status_code == 404
    assert stranger.post("/adapters", {"deployment_id": str(chat), "name": "x"}).status_code == 404
    assert served_to(world.other_project.id) == []
    with tenant(world.other_organization.id):
        assert not Adapter.objects.exists()
        assert Adapter.objects.filter(id=row.id).update(state=AdapterState.RETIRED) == 0
    with connection.cursor() as cursor:  # without a tenant
        cursor.execute("SELECT count(*) FROM adapters_adapter")
        assert cursor.fetchone()[0] == 0


def test_the_command_publishes_a_directory(world: World, chat: Deployment, var: Path) -> None:
    out = StringIO()
    with acting_as("corral_operator"):
        made = write_adapter(var / "a", r=4)
        call_command("publish_adapter", str(made), "--deployment", "chat", "--name", "formal", stdout=out)
        assert "chat:formal is served: rank 4, q_proj, v_proj" in out.getvalue()
        with pytest.raises(CommandError, match="already"):
            call_command("publish_adapter", str(made), "--deployment", "chat", "--name", "formal")
        with pytest.raises(CommandError, match="no deployment"):
            call_command("publish_adapter", str(made), "--deployment", "no", "--name", "formal")
        (made / "adapter_model.bin").write_bytes(b"")
        with pytest.raises(CommandError, match="pickled"):
            call_command("publish_adapter", str(made), "--deployment", "chat", "--name", "second")
    assert served_to(world.project.id) == ["chat:formal"]


def test_without_an_object_store_an_upload_fails_and_says_what_to_do(
    world: World, chat: Deployment, api: Api, var: Path
) -> None:
    made = api.post("/adapters", {"deployment_id": str(chat), "name": "formal"}).body
    begun = api.post(f"/adapters/{made['id']}/complete")
    assert (begun.status_code, begun.body["kind"]) == (202, "receive_adapter")
    assert api.post(f"/adapters/{made['id']}/complete").body["id"] == begun.body["id"]
    with acting_as("corral_operator"):
        assert advance(UUID(hex=begun.body["id"].removeprefix("opn_")))
    ended = api.get(f"/operations/{begun.body['id']}").body
    assert ended["state"] == "failed"
    assert "publish_adapter" in api.get(f"/adapters/{made['id']}").body["error_message"]


def test_files_of_a_retired_one_go_after_a_while_unless_another_has_them(
    world: World, chat: Deployment, var: Path
) -> None:
    store, rows = importing.store(var), []
    for name in ("one", "twin"):
        row = services.register(organization_id=world.organization.id, deployment_id=chat.id, name=name)
        rows.append(receiving.receive(row, write_adapter(var / "a")))
    digest = rows[0].digest
    assert rows[1].digest == digest
    later = timezone.now() + services.RETENTION + timedelta(seconds=1)
    services.retire(organization_id=world.organization.id, adapter_id=rows[0].id)
    with acting_as("corral_operator"):
        assert purging.purge_retired(timezone.now()) == 0
        assert purging.purge_retired(later) == 1
        assert store.has(digest)  # the twin's
        purging.purge_organization(world.organization.id, timezone.now())
    assert not store.has(digest)
    with tenant(world.organization.id):
        assert set(Adapter.objects.values_list("state", flat=True)) == {"retired"}


def test_who_never_uploads_loses_the_name(world: World, chat: Deployment) -> None:
    row = services.register(organization_id=world.organization.id, deployment_id=chat.id, name="slow")
    with acting_as("corral_operator"):
        assert purging.give_up_waiting(timezone.now()) == 0
        assert purging.give_up_waiting(timezone.now() + services.UPLOAD_TIME + timedelta(seconds=1)) == 1
    now = found(world, row.id)
    assert (now.state, now.error_code) == ("refused", "not_uploaded")
