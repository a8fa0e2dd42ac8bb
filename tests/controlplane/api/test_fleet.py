"""Replicas, machines, decisions, operations, grants and limits: what a tenant sees of them and may ask for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from autoscaler.house import build_cell
from autoscaler.models import Decision
from autoscaler.policyversion import policy_version
from controlplane.deployments import services as deployments
from controlplane.deployments import sharing
from controlplane.operations.advance import advance
from controlplane.operations.models import Operation
from tests.controlplane.api.caller import Api
from tests.database import acting_as
from tests.world import World, make_deployment, make_replica, make_version


@pytest.fixture
def cell(redis_url: str) -> Any:
    build_cell.cache_clear()
    yield build_cell()
    build_cell.cache_clear()


def step(name: str) -> Operation:
    """One step of the control worker."""
    import autoscaler.longoperations  # noqa: F401

    with acting_as("corral_operator"):
        found = Operation.objects.get(id=name.removeprefix("opn_"))
        Operation.objects.filter(pk=found.pk).update(next_at=found.created_at)
        advance(found.pk)
        return Operation.objects.get(pk=found.pk)


def test_lists_are_filtered(api: Api, world: World, cell: Any) -> None:
    one = make_deployment(world)
    replica, decision = make_replica(one)
    ended, _ = make_replica(one, phase="failed", reason_code="engine_died")
    cell.redis.hset(cell.keys.replica(replica.id.hex), mapping={"used": 3, "slots": 8})
    assert [(r["id"], r["n_running"]) for r in api.get("/replicas?live=true").body["data"]] == [
        (f"rep_{replica.id.hex}", 3)
    ]
    (failed,) = api.get("/replicas?phase=failed").body["data"]
    assert (failed["id"], failed["reason_code"], failed["n_running"]) == (
        f"rep_{ended.id.hex}",
        "engine_died",
        0,
    )
    assert api.get(f"/replicas?deployment_id=dep_{'0' * 32}").body["data"] == []
    first = api.get(f"/decisions?deployment_id=dep_{one.id.hex}&limit=1").body
    assert first["next_cursor"]
    assert first["data"][0]["reasons"] == ["1 request waits"]
    assert "of somebody" not in str(api.get(f"/decisions/dec_{decision.id.hex}").body)


def test_a_decision_tells_what_it_weighed_but_no_machines_of_the_house_and_is_replayed(
    api: Api, world: World
) -> None:
    _, decision = make_replica(make_deployment(world))
    with acting_as("corral_owner"):
        Decision.objects.filter(pk=decision.pk).update(
            policy_version="0" * 16,
            alternatives=[
                {"question": "replicas", "subject": "2", "chosen": True, "why": "1 request waits"},
                {"question": "machine", "subject": "of somebody", "chosen": False, "why": "full"},
            ],
        )
    told = api.get(f"/decisions/dec_{decision.id.hex}").body
    assert [a["question"] for a in told["alternatives"]] == ["replicas"]
    assert told["policy_version"] == "0" * 16
    again = api.get(f"/decisions/dec_{decision.id.hex}/replay").body
    assert (again["same"], again["policy_version_then"]) == (False, "0" * 16)
    assert again["policy_version_now"] == policy_version()
    assert again["words"].startswith("the policy has changed since")


def test_projects_members_keys_and_deployments_are_filtered_too(api: Api, world: World, cell: Any) -> None:
    make_deployment(world)
    ids = [
        api.post("/keys", {"project_id": f"prj_{world.project.id.hex}", "name": name}).body["id"]
        for name in ("one", "two")
    ]
    api.call("DELETE", f"/keys/{ids[0]}")
    for path, found in (
        ("/projects?slug=main", 1),
        ("/projects?slug=other", 0),
        ("/members?role=developer", 1),
        ("/members?role=viewer", 0),
        ("/keys?revoked=false", 1),
        ("/keys?revoked=true", 1),
        ("/keys", 2),
        ("/deployments?name=toy-chat&phase=pending", 1),
        ("/deployments?phase=ready", 0),
    ):
        assert len(api.get(path).body["data"]) == found, path
    assert api.get("/deployments?phase=happy").status_code == 400


def test_a_tenant_sees_machines_of_its_own_replicas_and_nothing_of_others(
    api: Api, stranger: Api, world: World, cell: Any
) -> None:
    replica, _ = make_replica(make_deployment(world))
    mine = f"/machines/mch_{replica.machine_id.hex}"
    (machine,) = api.get("/machines").body["data"]
    assert (machine["n_replicas"], machine["n_cpus"]) == (1, 8)
    assert stranger.get("/machines").body["data"] == []
    assert stranger.get(mine).status_code == 404
    # The stranger moves in: each sees one replica, and nobody may drain what serves the other.
    theirs = deployments.create_deployment(
        organization_id=world.other_organization.id,
        project_id=world.other_project.id,
        name="theirs",
        model_version_id=make_version(world.other_organization.id).id,
        engine_profile={"engine": "toy"},
    )
    make_replica(theirs, machine=replica.machine)
    for caller in (api, stranger):
        assert caller.get(mine).body["n_replicas"] == 1
        refused = caller.post(f"{mine}/drain")
        assert (refused.status_code, refused.body["code"]) == (403, "not_permitted")


def test_a_drained_replica_is_followed_to_its_end(api: Api, world: World, cell: Any) -> None:
    replica, _ = make_replica(make_deployment(world))
    path = f"/replicas/rep_{replica.id.hex}"
    begun = api.post(f"{path}/drain")
    assert (begun.status_code, begun.body["state"], begun.body["progress"]) == (202, "pending", 0)
    assert begun["Operation-Location"] == f"/api/v1/operations/{begun.body['id']}"
    assert api.post(f"{path}/drain").body["id"] == begun.body["id"]
    assert step(begun.body["id"]).state == "running"
    assert api.get(path).body["phase"] == "draining"
    with acting_as("corral_operator"):
        type(replica).objects.filter(pk=replica.pk).update(phase="stopped")
    step(begun.body["id"])
    done = api.get(f"/operations/{begun.body['id']}").body
    assert (done["state"], done["progress"], done["error"]) == ("succeeded", 100, None)
    assert api.post(f"{path}/drain").status_code == 409


def test_a_machine_of_ones_own_is_drained(api: Api, world: World, cell: Any) -> None:
    replica, _ = make_replica(make_deployment(world))
    begun = api.post(f"/machines/mch_{replica.machine_id.hex}/drain").body
    assert step(begun["id"]).message == "takes nothing new"
    assert api.get(f"/machines/mch_{replica.machine_id.hex}").body["state"] == "draining"
    assert step(begun["id"]).message == "1 replica still to end"
    with acting_as("corral_operator"):
        type(replica).objects.filter(pk=replica.pk).update(phase="stopped")
    assert step(begun["id"]).state == "succeeded"


def test_a_machine_that_others_came_to_meanwhile_is_not_drained(api: Api, world: World, cell: Any) -> None:
    replica, _ = make_replica(make_deployment(world))
    begun = api.post(f"/machines/mch_{replica.machine_id.hex}/drain").body
    theirs = deployments.create_deployment(
        organization_id=world.other_organization.id,
        project_id=world.other_project.id,
        name="theirs",
        model_version_id=make_version(world.other_organization.id).id,
        engine_profile={"engine": "toy"},
    )
    make_replica(theirs, machine=replica.machine)
    assert step(begun["id"]).error_code == "conflict"
    assert api.get(f"/machines/mch_{replica.machine_id.hex}").body["state"] == "ready"


def test_a_rollout_ends_when_what_runs_is_what_was_wanted(api: Api, world: World, cell: Any) -> None:
    one = make_deployment(world)
    old, _ = make_replica(one)
    path = f"/deployments/dep_{one.id.hex}"
    same = api.call("PATCH", path, {})
    assert "Operation-Location" not in same, "nothing changed"
    change = {"engine_profile": {"engine": "toy", "max_num_seqs": 3}, "min_replicas": 1}
    first = api.call("PATCH", path, change, **{"Idempotency-Key": "k"})
    again = api.call("PATCH", path, change, **{"Idempotency-Key": "k"})
    name = first["Operation-Location"].split("/")[-1]
    assert again["Operation-Location"] == first["Operation-Location"]
    row = step(name)
    assert (row.state, row.progress, row.message) == ("running", 0, "0 of 1 ready, 1 replica to end")
    with acting_as("corral_operator"):
        type(old).objects.filter(pk=old.pk).update(phase="stopped")
        fresh = type(one).objects.select_related("model_version").get(pk=one.pk)
    make_replica(fresh)
    assert step(name).state == "succeeded"
    later = api.call("PATCH", path, {"min_replicas": 2})["Operation-Location"].split("/")[-1]
    last = api.call("DELETE", path)["Operation-Location"].split("/")[-1]
    assert step(later).error_code == "superseded"
    assert step(last).message == "1 replica still to end"
    rows = api.get(f"/operations?subject=dep_{one.id.hex}&state=failed").body["data"]
    assert [row["id"] for row in rows] == [later]


def test_limits_say_what_is_used_and_left(api: Api, world: World, cell: Any) -> None:
    api.call("PUT", "/organization/limits", {"rpm": 60, "max_concurrency": 4, "budget_nano": 1000})
    fresh = api.get("/organization/limits").body
    assert fresh["rpm"] == {"limit": 60, "used": 0, "remaining": 60, "reset_s": 0.0}
    assert fresh["input_tpm"] == {"limit": None, "used": None, "remaining": None, "reset_s": None}
    counters = {"rq": 9.5, "ms": time.time() * 1000 + 60_000, "conc": 3, "spent": 900, "held": 50}
    cell.redis.hset(cell.keys.limits("org", world.organization.id.hex), mapping=counters)
    used = api.get("/organization/limits").body
    assert (used["rpm"]["used"], used["rpm"]["remaining"], used["rpm"]["reset_s"]) == (51, 9, 50.5)
    assert used["max_concurrency"] == {"limit": 4, "used": 3, "remaining": 1, "reset_s": None}
    assert used["budget_nano"] == {"limit": 1000, "used": 950, "remaining": 50, "reset_s": None}


def test_limits_without_redis_are_null_not_an_error(
    api: Api, world: World, cell: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    def away(*_: object) -> None:
        raise redis.ConnectionError

    monkeypatch.setattr(cell.redis, "hmget", away)
    api.call("PUT", f"/projects/prj_{world.project.id.hex}/limits", {"rpm": 60})
    found = api.get(f"/projects/prj_{world.project.id.hex}/limits").body
    assert found["rpm"] == {"limit": 60, "used": None, "remaining": None, "reset_s": None}


def test_who_gave_leave_takes_it_back_and_who_has_it_sees_it(
    api: Api, stranger: Api, world: World, cell: Any
) -> None:
    one = make_deployment(world)
    with acting_as("corral_operator"):
        sharing.grant(
            organization_id=world.organization.id,
            deployment_id=one.id,
            grantee_id=world.other_organization.id,
        )
    (given,) = api.get(f"/grants?deployment_id=dep_{one.id.hex}").body["data"]
    (held,) = stranger.get("/grants-held").body["data"]
    assert held == given
    assert (held["name"], held["project_id"]) == ("acme/toy-chat", None)
    assert stranger.get("/grants").body["data"] == api.get("/grants-held").body["data"] == []
    assert stranger.call("DELETE", f"/grants/{held['id']}").status_code == 404
    planned = api.call("DELETE", f"/grants/{held['id']}?plan=true").body["disrupts"]
    assert planned["grants"] == [{"name": "acme/toy-chat", "grantee_id": held["grantee_id"]}]
    assert api.call("DELETE", f"/grants/{given['id']}").status_code == 204
    assert stranger.get("/grants-held").body["data"] == []


def test_a_retired_model_serves_nothing_new(api: Api, world: World, cell: Any) -> None:
    one = make_deployment(world)
    path = f"/model-versions/mdl_{one.model_version_id.hex}"
    retired = api.post(f"{path}/retire")
    assert (retired.status_code, bool(retired.body["retired_at"])) == (200, True)
    body = {
        "project_id": f"prj_{world.project.id.hex}",
        "name": "new",
        "model_version_id": path.split("/")[-1],
        "engine_profile": {"engine": "toy"},
    }
    refused = api.post("/deployments", body)
    assert (refused.status_code, refused.body["errors"][0]["field"]) == (400, "model_version_id")
    assert api.call("PATCH", f"/deployments/dep_{one.id.hex}", {"max_replicas": 3}).status_code == 200
    assert api.get("/model-versions?retired=false").body["data"] == []
    make_version(world.organization.id)
    assert len(api.get("/model-versions?retired=false").body["data"]) == 1
