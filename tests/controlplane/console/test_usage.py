"""Usage figures, lists and exports: right sums, in the tenant's days, and nobody else's."""

import csv
import io
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from django.test import Client
from django.utils import timezone

from controlplane.console import usage
from controlplane.tenants import key_services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization
from tests.world import World


def text_of(client: Client, path: str) -> str:
    return " ".join(client.get(path).content.decode().split())


def exported(client: Client, query: str = "") -> list[dict[str, str]]:
    response = client.get(f"/usage.csv{query}")
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    return list(csv.DictReader(io.StringIO(response.content.decode())))


def test_totals_and_days_add_up(owner: Client, usage_event) -> None:
    for _ in range(3):
        usage_event()
    usage_event(model="other", cost_nano=1_000_000_000)
    usage_event(status=503, finish_reason="error", cost_nano=0)
    usage_event(status=499, finish_reason="abort", cost_nano=0)  # the client stopped it: no failure
    text = text_of(owner, "/usage")
    assert "$1.000045 exactly" in text
    assert '6</p><p class="sub">1 failed' in text
    assert "40 % from the prefix cache" in text
    assert '<td class="side-note">other</td>' in text


def test_a_day_is_a_day_of_the_organization(world: World, usage_event) -> None:
    """23:30 UTC is the next day in Tokyo."""
    late = datetime.now(tz=UTC).replace(hour=23, minute=30, second=0) - timedelta(days=2)
    usage_event(age_s=(timezone.now() - late).total_seconds())
    with tenant(world.organization.id):
        rows = {
            zone: usage.by_day(
                organization_id=world.organization.id, first=late.date() - timedelta(days=1), zone=zone
            )
            for zone in ("UTC", "Asia/Tokyo")
        }
    assert [row.day for row in rows["UTC"]] == [late.date()]
    assert [row.day for row in rows["Asia/Tokyo"]] == [late.date() + timedelta(days=1)]


def test_today_begins_at_midnight_of_the_organization(world: World, usage_event) -> None:
    zone = "Pacific/Auckland"
    now = timezone.now()
    midnight = now.astimezone(ZoneInfo(zone)).replace(hour=0, minute=0, second=0, microsecond=0)
    usage_event(age_s=(now - midnight).total_seconds() + 60, cost_nano=7)
    usage_event(age_s=max((now - midnight).total_seconds() - 1, 0), cost_nano=11)
    with tenant(world.organization.id):
        assert usage.spent_today_nano(organization_id=world.organization.id, now=now, zone=zone) == 11


def test_another_tenants_usage_is_nowhere(stranger: Client, world: World, usage_event) -> None:
    event = usage_event(model="secret-model")
    for page in ("/usage", "/usage?days=90", "/usage.csv", "/"):
        text = stranger.get(page).content.decode()
        assert "secret-model" not in text
        assert str(event) not in text
    with tenant(world.other_organization.id):
        rows = usage.by_day(
            organization_id=world.organization.id, first=timezone.now().date() - timedelta(days=3), zone="UTC"
        )
        traffic = usage.traffic(organization_id=world.organization.id, now=timezone.now())
    assert rows == []  # row-level security, were the filter wrong
    assert traffic.n_requests == 0


def test_filters_narrow_the_list_and_the_export(owner: Client, world: World, usage_event) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="ci"
    )
    by_key = usage_event(key_id=key.id)
    failed = usage_event(status=503, finish_reason="error", first_token_ms=None)
    other = usage_event(model="other")
    for query, expected in (
        (f"?key={key}", by_key),
        ("?outcome=failed", failed),
        ("?model=other", other),
    ):
        rows = exported(owner, query)
        assert [row["request_id"] for row in rows] == [str(expected)]
        text = owner.get(f"/usage{query}").content.decode()
        assert [str(each) in text for each in (by_key, failed, other)] == [
            each is expected for each in (by_key, failed, other)
        ]


def test_the_export_has_every_figure(owner: Client, usage_event) -> None:
    event = usage_event(cost_nano=1_234_000_000_000_001)
    [row] = exported(owner)
    assert row["cost_usd"] == "1234000.000000001"
    assert (row["prompt_tokens"], row["cached_tokens"], row["completion_tokens"]) == ("100", "40", "20")
    assert (row["ttft_ms"], row["duration_ms"], row["status"]) == ("80", "900", "200")
    assert datetime.fromisoformat(row["admitted_at"]) == event.admitted_at.replace(
        microsecond=event.admitted_at.microsecond // 1000 * 1000
    )


@pytest.mark.parametrize("model", ["=1+1", "+cmd", "-2", "@sum"])
def test_an_exported_cell_is_never_a_formula(owner: Client, usage_event, model: str) -> None:
    usage_event(model=model)
    assert exported(owner)[0]["model"] == f"'{model}"


def test_the_list_is_paged_without_gaps(owner: Client, usage_event) -> None:
    events = [usage_event(age_s=10 + number) for number in range(55)]
    first = owner.get("/usage").content.decode()
    assert sum(str(event) in first for event in events) == 50
    query = first.split("?days=7&amp;before=")[1].split("#")[0]
    second = owner.get(f"/usage?days=7&before={query}").content.decode()
    assert [str(event) in second for event in events] == [False] * 50 + [True] * 5


@pytest.mark.parametrize(
    "query",
    [
        "days=0",
        "days=1e9",
        "days=-7",
        "before=yesterday",
        "before=2026-01-01",
        "key=x",
        "model=%00",
        "outcome=x",
    ],
)
def test_a_malformed_query_filters_nothing(owner: Client, usage_event, query: str) -> None:
    event = usage_event()
    assert str(event) in owner.get(f"/usage?{query}").content.decode()


def test_an_unused_organization_sees_an_explanation(stranger: Client) -> None:
    assert "Nothing used in these 7 days" in text_of(stranger, "/usage")


def test_traffic_is_binned_by_the_end_of_a_request(world: World, usage_event) -> None:
    # It began 11 minutes ago and ended five minutes ago; the other one ended before the window.
    usage_event(age_s=660, duration_ms=360_000, n_completion_tokens=900)
    usage_event(age_s=700, duration_ms=1_000)
    usage_event(age_s=30, duration_ms=0, status=500, finish_reason="error", first_token_ms=None)
    now = timezone.now()
    with tenant(world.organization.id):
        traffic = usage.traffic(organization_id=world.organization.id, now=now)
    assert (traffic.n_requests, traffic.n_failed, traffic.n_tokens) == (2, 1, 920)
    [ended] = [index for index, n in enumerate(traffic.tokens) if n == 900]
    assert 28 <= ended <= 31
    assert traffic.ttft_p50_ms == 80
    assert set(traffic.ttft_bins_ms) == {0.0, 80.0}
    assert 0 < traffic.requests_per_s <= 1 / 60


def test_a_suspended_organization_is_told_on_every_page(owner: Client, world: World) -> None:
    with tenant(world.organization.id):
        Organization.objects.filter(id=world.organization.id).update(suspended_at=timezone.now())
    assert "is suspended" in text_of(owner, "/usage")
