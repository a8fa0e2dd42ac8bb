"""Service levels over the API: rules, attainment, alerts."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from django.utils import timezone

from tests.controlplane.slo.test_attainment import fill
from tests.world import World

if TYPE_CHECKING:
    from tests.controlplane.api.caller import Api


def test_rules_are_made_listed_and_deleted(world: World, api: Api, stranger: Api) -> None:
    project = f"prj_{world.project.id.hex}"
    made = api.post("/slo-rules", {"project_id": project, "slo_class": "interactive", "ttft_ms": 400})
    assert (made.status_code, made.body["ttft_ms"], made.body["objective_ppm"]) == (201, 400, None)
    again = api.post("/slo-rules", {"project_id": project, "slo_class": "interactive"})
    assert (again.status_code, again.body["errors"][0]["field"]) == (409, "slo_class")
    out_of_range = api.post(
        "/slo-rules", {"project_id": project, "slo_class": "batch", "objective_ppm": 1_000_000}
    )
    assert (out_of_range.status_code, out_of_range.body["errors"][0]["field"]) == (400, "objective_ppm")
    assert [rule["id"] for rule in api.get("/slo-rules").body["data"]] == [made.body["id"]]
    assert stranger.get("/slo-rules").body["data"] == []
    assert stranger.call("DELETE", f"/slo-rules/{made.body['id']}").status_code == 404
    assert api.call("DELETE", f"/slo-rules/{made.body['id']}").status_code == 204
    assert api.get("/slo-rules").body["data"] == []


def test_a_rule_is_changed_field_by_field(world: World, api: Api, stranger: Api) -> None:
    project = f"prj_{world.project.id.hex}"
    body = {"project_id": project, "slo_class": "interactive", "ttft_ms": 400, "itl_ms": 90}
    path = f"/slo-rules/{api.post('/slo-rules', body).body['id']}"
    changed = api.call("PATCH", path, {"ttft_ms": None, "is_default": True})
    assert (changed.status_code, changed.body["ttft_ms"], changed.body["itl_ms"]) == (200, None, 90)
    assert changed.body["is_default"] is True
    other = api.post("/slo-rules", {"project_id": project, "slo_class": "batch"}).body["id"]
    taken = api.call("PATCH", f"/slo-rules/{other}", {"is_default": True})
    assert (taken.status_code, taken.body["errors"][0]["field"]) == (409, "is_default")
    wrong = api.call("PATCH", path, {"slo_class": "batch"})
    assert (wrong.status_code, wrong.body["errors"][0]["field"]) == (400, "slo_class")
    assert stranger.call("PATCH", path, {"ttft_ms": 1}).status_code == 404


def test_attainment_says_what_was_kept_what_is_left_and_how_fast_it_burns(
    world: World, api: Api, stranger: Api
) -> None:
    now: datetime = timezone.now()
    fill(world, n=1_000, n_bad=5, ago_s=1_200, now=now)
    fill(world, n=100, n_bad=20, ago_s=20, now=now, slo_class="batch")
    fill(world, n=900, n_bad=25, ago_s=(timedelta(days=5)).total_seconds(), now=now)
    (batch, interactive) = api.get("/slo/attainment?window=30d").body["data"]
    assert interactive["slo_class"] == "interactive"
    assert (interactive["n_requests"], interactive["n_good"]) == (1_900, 1_870)
    assert interactive["attainment"] == pytest.approx(1_870 / 1_900)
    assert interactive["objective"] == pytest.approx(0.99)
    assert interactive["budget_requests"] == pytest.approx(19)
    assert interactive["budget_left"] == pytest.approx(1 - 30 / 19)
    assert interactive["misses"] == {"failed": 30, "ttft": 0, "itl": 0, "deadline": 0, "refused": 0}
    assert interactive["burn_rates"]["1h"] == pytest.approx(0.5)
    assert interactive["burn_rates"]["5m"] == 0
    assert (interactive["burning"], batch["burning"]) == (None, "page")
    hour = api.get(f"/slo/attainment?window=1h&class=interactive&project_id=prj_{world.project.id.hex}")
    assert [row["n_requests"] for row in hour.body["data"]] == [1_000]
    assert api.get(f"/slo/attainment?project_id=prj_{world.other_project.id.hex}").body["data"] == []
    assert stranger.get("/slo/attainment").body["data"] == []
    assert api.get("/slo/attainment?window=2h").status_code == 400
