"""Sums and requests of the REST API against booked events."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import pytest

from tests.booked import book_usage
from tests.controlplane.api.caller import Api
from tests.world import World

DAY_S = 86_400


def test_sums_are_those_of_the_span_and_filter(api: Api, world: World) -> None:
    for age_s, model, status in ((60, "a", 200), (120, "a", 500), (180, "b", 499), (40 * DAY_S, "a", 200)):
        book_usage(world, age_s=age_s, model=model, status=status)
    body = api.get("/usage?group_by=model").body
    assert [(row["group"], row["n_requests"], row["n_failed"]) for row in body["data"]] == [
        ("a", 2, 1),
        ("b", 1, 0),
    ]
    first = body["data"][0]
    assert (first["n_prompt_tokens"], first["n_cached_tokens"], first["n_completion_tokens"]) == (200, 80, 40)
    assert first["cost_nano"] == 30_000
    since = quote((datetime.now(UTC) - timedelta(days=60)).isoformat())
    assert api.get(f"/usage?group_by=model&since={since}").body["data"][0]["n_requests"] == 3
    (row,) = api.get("/usage?group_by=project&model=b").body["data"]
    assert (row["group"], row["n_requests"]) == (f"prj_{world.project.id.hex}", 1)
    assert api.get(f"/usage?project_id=prj_{'0' * 32}").body["data"] == []


def test_pages_of_requests_hold_everything_once(api: Api, world: World) -> None:
    at = datetime.now(UTC) - timedelta(minutes=1)
    booked = [book_usage(world, age_s=60, admitted_at=at) for _ in range(3)]  # at the same instant
    booked += [book_usage(world, age_s=90 + n) for n in range(2)]
    seen, cursor = [], ""
    while cursor is not None:
        body = api.get(f"/requests?limit=2{'&cursor=' + cursor if cursor else ''}").body
        seen += [row["id"] for row in body["data"]]
        cursor = body["next_cursor"]
    assert len(seen) == len(set(seen)) == 5
    assert set(seen) == {f"req_{event.request_id.hex}" for event in booked}
    one = api.get(f"/requests/{seen[0]}")
    assert (one.status_code, one.body["stage"], one.body["usage"]["id"]) == (200, "ended", seen[0])


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z", "since"),
        ("since=2020-01-01T00:00:00Z", "since"),
        ("until=2026-01-01T00:00:00", "until"),
        ("until=0001-01-01T00:00:00Z", "until"),
        ("group_by=colour", "group_by"),
    ],
)
def test_a_span_that_is_none_is_named(api: Api, query: str, field: str) -> None:
    response = api.get(f"/usage?{query}")
    assert response.status_code == 400
    assert [error["field"] for error in response.body["errors"]] == [field]


def test_any_offset_of_a_time_zone_is_understood(api: Api) -> None:
    for path in ("/usage", "/requests"):
        response = api.get(f"{path}?until=0391-02-28T15:39:35-23:28")
        assert response.status_code == 200, response.body
        assert response.body["data"] == []


def test_a_cursor_of_another_tenant_is_none(api: Api, stranger: Api, world: World) -> None:
    event = book_usage(world)
    assert api.get(f"/requests?cursor=req_{event.request_id.hex}").status_code == 200
    assert stranger.get(f"/requests?cursor=req_{event.request_id.hex}").status_code == 400
    assert stranger.get(f"/requests/req_{event.request_id.hex}").status_code == 404
