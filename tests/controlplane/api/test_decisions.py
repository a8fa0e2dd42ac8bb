"""Requests explained over the API: by whose token, filtered, and never with their text."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import redis
from django.db import connection

from controlplane import ids
from controlplane.tenants.models import Role
from tests.controlplane.decisions.test_intake import refusal, run, tell
from tests.world import World

if TYPE_CHECKING:
    from tests.controlplane.api.caller import Api


def test_a_refusal_is_explained_to_its_organization_and_to_nobody_else(
    world: World, api: Api, stranger: Api, redis_url: str
) -> None:
    from tests.controlplane.api.caller import Api, token_of

    request, admitted = ids.new_id(), ids.new_id()
    with redis.Redis.from_url(redis_url) as client:
        tell(client, refusal(world, request.hex))
        tell(
            client,
            refusal(world, admitted.hex, outcome="queued", status=0, code="", at_ms=int(time.time() * 1000)),
        )
        run(client)
    teammate = Api(token_of(world.organization.id, Role.VIEWER))
    for caller in (api, teammate):
        found = caller.get(f"/requests/req_{request.hex}")
        assert (found.status_code, found.body["stage"]) == (200, "refused")
        (decision,) = found.body["decisions"]
        assert decision["prediction"]["ttft_p90_s"] == 2.6
        assert [c["cost"] for c in decision["candidates"]] == [41_000.0, 52_000.0]
        assert any("Refused with 503" in line for line in found.body["words"])
    assert stranger.get(f"/requests/req_{request.hex}").status_code == 404
    assert stranger.get("/request-decisions").body["data"] == []
    assert api.get("/requests/req_1").status_code == 404
    listed = api.get("/request-decisions").body["data"]
    assert [row["request_id"] for row in listed] == [f"req_{admitted.hex}", f"req_{request.hex}"]
    refused = api.get("/request-decisions?outcome=refused&code=slo_unattainable").body["data"]
    assert [row["request_id"] for row in refused] == [f"req_{request.hex}"]
    assert api.get("/request-decisions?code=other").body["data"] == []


def test_without_a_tenant_the_role_of_the_web_reads_no_decision(world: World, redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        tell(client, refusal(world, ids.new_id().hex))
        run(client)
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM decisions_requestdecision")
        assert cursor.fetchone() == (0,)


def test_a_request_held_at_zero_tells_the_stage_and_what_is_left_of_its_eta(
    world: World, api: Api, redis_url: str
) -> None:
    import msgspec
    from django.conf import settings

    from workers.keys import CellKeys
    from workers.records import Admitted

    keys, request, did = CellKeys(settings.ENV.cell), ids.new_id(), ids.new_id().hex
    now_ms = int(time.time() * 1000)
    admitted = Admitted(did, "", 1, 1, 0, now_ms, "0", 1, "", "", "", "", world.organization.id.hex)
    with redis.Redis.from_url(redis_url) as client:
        record = {"state": "queued", "adm": msgspec.msgpack.encode(admitted)}
        client.hset(keys.request(request.hex), mapping=record)
        waiting = api.get(f"/requests/req_{request.hex}").body
        assert (waiting["stage"], waiting["waits_for"], waiting["eta_ms"]) == ("queued", "", None)
        client.hset(
            keys.stage(did), mapping={"stage": "loading_model", "eta_ms": 60_000, "at_ms": now_ms - 20_000}
        )
        waiting = api.get(f"/requests/req_{request.hex}").body
        assert waiting["waits_for"] == "loading_model"
        assert 0 < waiting["eta_ms"] <= 40_000
        assert any(
            "Nothing serves its deployment yet: loading model, for about" in w for w in waiting["words"]
        )
        client.hset(keys.stage(did), mapping={"stage": "launching_machine", "eta_ms": ""})
        waiting = api.get(f"/requests/req_{request.hex}").body
        assert (waiting["waits_for"], waiting["eta_ms"]) == ("launching_machine", None)
        client.hset(keys.stage(did), "stage", "ready")
        assert api.get(f"/requests/req_{request.hex}").body["waits_for"] == ""
