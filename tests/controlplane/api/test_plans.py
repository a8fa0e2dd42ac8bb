"""`?plan=true`: what it says, and that nothing of it happens, for every write of the document."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from django.db import connection, transaction

from controlplane.audit.models import Entry
from controlplane.deployments import services as deployments
from controlplane.tenants import key_services, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import IdempotentWrite, Role
from tests.controlplane.api.caller import Api, token_of
from tests.controlplane.api.test_matrix import Acme, operations
from tests.database import acting_as
from tests.world import World, make_replica, make_version

PLAN = "application/vnd.corral.plan+json"
WRITING_COMMANDS = (
    "set",
    "hset",
    "publish",
    "xadd",
    "del",
    "eval",
    "evalsha",
    "lpush",
    "rpush",
    "zadd",
    "incr",
)
# Writes that here change nothing which the audit log keeps: their plans say whether they would be refused. A new write
# that fails for want of a line here lacks the audit trigger on its table, or belongs here with a reason.
NO_CHANGES = {
    "delete_export": "a copy of data, no configuration",
    "try_webhook": "a message, no configuration",
    "verify_domain": "the record is not in the DNS of tests, and nothing is changed without it",
    "replay_delivery": "likewise",
    "clear_quota": "the house's stays in force, Acme has set none",
    "order_rollout": "Acme's has ended, and nothing is asked of it",
}


def fields(change: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {field["field"]: (field["before"], field["after"]) for field in change["fields"]}


def counts() -> dict[str, int]:
    """Rows of every table, whoever's."""
    with acting_as("corral_owner"), connection.cursor() as cursor:
        cursor.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') "
            "AND NOT relispartition"
        )
        names = [name for (name,) in cursor.fetchall()]
        cursor.execute(" UNION ALL ".join(f"SELECT '{name}', count(*) FROM \"{name}\"" for name in names))
        return dict(cursor.fetchall())


def writes_of(server: redis.Redis) -> int:
    stats = server.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in WRITING_COMMANDS)


def test_every_write_can_be_planned_and_a_plan_changes_nothing(world: World, redis_server: Any) -> None:
    acme, caller = Acme(world), Api(token_of(world.organization.id, Role.OWNER))
    names = [each for each in operations() if each[1] != "GET"]
    assert len(names) >= 18
    before, waiting = counts(), len(connection.run_on_commit)
    with redis_server.connect() as server:
        n_writes = writes_of(server)
        for name, method, path, _ in names:
            path = f"{acme.path(path)}?plan=true"
            answer = caller.call(method, path, acme.body(name), **{"Idempotency-Key": name})
            assert answer.status_code == 200, (name, answer.body)
            assert answer["Content-Type"] == PLAN, name
            assert answer.body["status"] in (200, 201, 202, 204), name
            assert bool(answer.body["changes"]) is (name not in NO_CHANGES), (name, answer.body)
            assert answer.body["n_changes"] == len(answer.body["changes"])
            assert "crl-" not in answer.content.decode(), (name, "a secret")
        assert writes_of(server) == n_writes
    assert counts() == before
    assert len(connection.run_on_commit) == waiting, "nothing is told to anybody"


def test_a_plan_is_no_answer_to_the_call_itself(api: Api, world: World) -> None:
    body = {"name": "Two", "slug": "two"}
    for _ in range(2):
        planned = api.post("/projects?plan=true", body, **{"Idempotency-Key": "k"})
        assert planned["Content-Type"] == PLAN
    made = api.post("/projects", body, **{"Idempotency-Key": "k"})
    assert (made.status_code, made.get("Idempotency-Replayed")) == (201, None)
    with tenant(world.organization.id):
        assert IdempotentWrite.objects.count() == 1


def test_a_plan_names_fields_and_what_they_become(api: Api, world: World) -> None:
    path = f"/projects/prj_{world.project.id.hex}"
    (change,) = api.call("PATCH", f"{path}?plan=true", {"name": "Neu", "weight": 200}).body["changes"]
    assert (change["action"], change["kind"], change["id"]) == ("update", "project", path.split("/")[-1])
    assert fields(change) == {"name": ("Main", "Neu"), "weight": (100, 200)}
    (made,) = api.post("/projects?plan=true", {"name": "Two", "slug": "two"}).body["changes"]
    assert (made["action"], made["id"], made["name"]) == ("create", None, "Two")
    assert fields(made)["slug"] == (None, "two")


def test_what_would_be_refused_is_refused(api: Api, world: World) -> None:
    taken = api.post("/projects?plan=true", {"name": "Two", "slug": "main"})
    assert (taken.status_code, taken.body["code"]) == (409, "conflict")
    viewer = Api(token_of(world.organization.id, Role.VIEWER))
    assert viewer.post("/projects?plan=true", {"name": "Two", "slug": "two"}).status_code == 403
    wrong = api.post("/projects?plan=maybe", {"name": "Two", "slug": "two"})
    assert (wrong.status_code, wrong.body["errors"][0]["field"]) == (400, "plan")
    stale = api.call(
        "PATCH", f"/projects/prj_{world.project.id.hex}?plan=true", {"name": "N"}, **{"If-Match": '"x"'}
    )
    assert stale.status_code == 412
    with tenant(world.organization.id):
        assert [row.slug for row in world.organization.projects.all()] == ["main"]


def test_a_plan_tells_its_own_entries_only(api: Api, world: World) -> None:
    services.update_project(
        organization_id=world.organization.id, project_id=world.project.id, weight=7
    )  # in the same transaction, before
    planned = api.call("PATCH", "/organization?plan=true", {"name": "Neu"}).body
    assert [change["kind"] for change in planned["changes"]] == ["organization"]


def test_keys_that_stop_working_are_named(api: Api, world: World) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    path = f"/keys/key_{key.id.hex}"
    hit = api.call("DELETE", f"{path}?plan=true").body["disrupts"]
    assert [(k["name"], k["ends_at"]) for k in hit["keys"]] == [("program", None)]
    assert hit["summary"] == ["key program stops working at once"]
    hit = api.post(f"{path}/rotate?plan=true", {"overlap_s": 60}).body["disrupts"]
    assert hit["keys"][0]["ends_at"] is not None
    limits = api.call("PUT", f"{path}/limits?plan=true", {"rpm": 5}).body
    assert fields(limits["changes"][0]) == {"rpm": (None, 5)}
    assert limits["disrupts"]["keys"] == []


def test_what_a_key_may_no_longer_do_is_named(api: Api, world: World) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    path = f"/keys/key_{key.id.hex}"
    (hit,) = api.call("PUT", f"{path}/scopes?plan=true", {"models": ["chat"]}).body["disrupts"]["narrowed"]
    assert (hit["name"], hit["loses"]) == ("program", ["models other than chat"])
    api.call("PUT", f"{path}/scopes", {"models": ["chat", "code"], "routes": []})
    api.call("PATCH", path, {"aliases": {"gpt-4o": "chat"}})
    planned = api.call("PUT", f"{path}/scopes?plan=true", {"models": ["chat"], "routes": ["chat"]}).body
    assert planned["disrupts"]["summary"] == ["key program loses the models code"]
    (hit,) = api.call("PATCH", f"{path}?plan=true", {"aliases": {}}).body["disrupts"]["narrowed"]
    assert hit["loses"] == ["the alias gpt-4o"]
    wider = api.call("PUT", f"{path}/scopes?plan=true", {}).body["disrupts"]
    assert wider["narrowed"] == wider["keys"] == []


def test_people_who_lose_rights_are_named(api: Api, world: World) -> None:
    bob = next(m for m in api.get("/members").body["data"] if m["email"] == "bob@example.org")
    path = f"/members/{bob['id']}?plan=true"
    (hit,) = api.call("PATCH", path, {"role": "viewer"}).body["disrupts"]["members"]
    assert (hit["email"], hit["loses"]) == (
        "bob@example.org",
        ["deployments:write", "keys:write", "models:use", "upstreams:read"],
    )
    (hit,) = api.call("DELETE", path).body["disrupts"]["members"]
    assert "projects:read" in hit["loses"]
    assert api.call("PATCH", path, {"role": "admin"}).body["disrupts"]["members"] == []


def test_tokens_of_an_account_that_ends_are_named(api: Api, world: World) -> None:
    acme = Acme(world)
    hit = api.call("DELETE", f"/service-accounts/{acme.ids['account_id']}?plan=true").body["disrupts"]
    assert [token["id"] for token in hit["tokens"]] == [acme.ids["token_id"]]


@pytest.fixture
def running(world: World, redis_url: str, settings: Any) -> Any:
    """A deployment of up to 3 replicas with 3 running: 5, 0 and 2 requests; a machine costs $1 an hour, holds 4."""
    from dataclasses import replace

    from autoscaler.house import build_cell

    build_cell.cache_clear()
    settings.AUTOSCALER = replace(settings.AUTOSCALER, machine_nano_per_h=10**9, replicas_per_machine=4)
    version = make_version(world.organization.id)
    deployment = deployments.create_deployment(
        organization_id=world.organization.id,
        project_id=world.project.id,
        name="chat",
        model_version_id=version.id,
        engine_profile={"engine": "toy"},
        max_replicas=3,
    )
    cell, machine = build_cell(), None
    for used in (5, 0, 2):
        row, _ = make_replica(deployment, machine=machine)
        machine = row.machine
        cell.redis.hset(cell.keys.replica(row.id.hex), mapping={"used": used, "slots": 8})
    yield deployment
    build_cell.cache_clear()


def test_replicas_and_their_streams_are_named_and_priced(api: Api, running: Any) -> None:
    path = f"/deployments/dep_{running.id.hex}?plan=true"
    fewer = api.call("PATCH", path, {"max_replicas": 1}).body
    assert [(hit["why"], hit["n_streams"]) for hit in fewer["disrupts"]["replicas"]] == [
        ("surplus", 0),
        ("surplus", 2),
    ]
    assert fewer["disrupts"]["n_streams"] == 2
    assert fewer["cost"]["most_nano_per_h"] == {"before": 750_000_000, "after": 250_000_000}
    assert fewer["cost"]["least_nano_per_h"] == {"before": 0, "after": 0}
    other = api.call("PATCH", path, {"engine_profile": {"engine": "toy", "max_num_seqs": 3}}).body
    assert [hit["why"] for hit in other["disrupts"]["replicas"]] == ["replaced"] * 3
    assert (other["disrupts"]["n_streams"], other["cost"]) == (7, None)
    gone = api.call("DELETE", path).body
    assert gone["disrupts"]["summary"] == [
        "3 replicas of chat are drained",
        "7 running requests on them finish or move on",
    ]
    assert gone["cost"]["most_nano_per_h"] == {"before": 750_000_000, "after": 0}
    drained = api.post(f"/replicas/{gone['disrupts']['replicas'][0]['id']}/drain?plan=true").body
    assert [hit["why"] for hit in drained["disrupts"]["replicas"]] == ["drained"]
    assert [(change["kind"], change["fields"][0]["after"]) for change in drained["changes"]] == [
        ("operation", "drain_replica")
    ]
    calm = api.call("PATCH", path, {"idle_timeout_s": 60}).body
    assert (calm["disrupts"]["replicas"], calm["cost"]) == ([], None)


def test_a_replica_is_priced_by_the_kind_of_machine_that_holds_it_most_cheaply(
    api: Api, running: Any, settings: Any
) -> None:
    """The cheapest machine holds none, the next one place at 0.30 $, the big one four at 1.00 $; spot is cheaper still,
    and not counted on."""
    from dataclasses import replace

    from django.utils import timezone

    from autoscaler.models import Offer

    settings.AUTOSCALER = replace(settings.AUTOSCALER, accelerator="l4")
    kinds = [("t4", 1, False, 0.1), ("l4", 1, False, 0.3), ("l4", 4, False, 1.0), ("l4", 1, True, 0.05)]
    with acting_as("corral_operator"):
        for n, (gpu, n_gpus, is_spot, usd) in enumerate(kinds):
            Offer.objects.create(
                cell="c0", provider=settings.AUTOSCALER.provider, name=f"o{n}", instance_type=f"t{n}", zone="z",
                is_spot=is_spot, gpu=gpu, n_gpus=n_gpus, price_nano_per_h=int(usd * 1e9), priced_at=timezone.now(),
            )  # fmt: skip
    path = f"/deployments/dep_{running.id.hex}?plan=true"
    cost = api.call("PATCH", path, {"max_replicas": 6}).body["cost"]
    assert (cost["machine_nano_per_h"], cost["replicas_per_machine"]) == (1_000_000_000, 4)
    assert cost["most_nano_per_h"] == {"before": 750_000_000, "after": 1_500_000_000}
    with acting_as("corral_operator"):
        Offer.objects.filter(name="o2").delete()
    cost = api.call("PATCH", path, {"max_replicas": 6}).body["cost"]
    assert (cost["machine_nano_per_h"], cost["replicas_per_machine"]) == (300_000_000, 1)
    assert cost["most_nano_per_h"] == {"before": 900_000_000, "after": 1_800_000_000}


def test_streams_that_cannot_be_asked_are_null(
    api: Api, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler.house import build_cell

    def away(_: object) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(build_cell(), "read_replicas", away)
    gone = api.call("DELETE", f"/deployments/dep_{running.id.hex}?plan=true").body
    assert gone["disrupts"]["n_streams"] is None
    assert len(gone["disrupts"]["replicas"]) == 3
    with transaction.atomic():
        assert Entry.objects.filter(kind="deployment", action="update").count() == 0
