"""Shadows in the records: whose requests gateways are told to copy, what is kept of the copies, and what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import redis
from django.db import connection

from controlplane import ids
from controlplane.deployments import services as deployments
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role
from controlplane.upstreams import intake, services
from controlplane.upstreams.models import ShadowResult, ShadowSkip, Upstream, UpstreamDay
from controlplane.upstreams.services import Change
from controlplane.upstreams.wire import FIELD, Batch, Result, Skips, encode
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.world import World, make_deployment
from workers.keys import CellKeys

KEYS = CellKeys("c0")


@pytest.fixture
def chat(world: World) -> Deployment:
    return make_deployment(world, "chat")


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url, socket_timeout=5) as found:
        yield found


def attach(chat: Deployment, target: Deployment | None = None, **changes: Any) -> Upstream:
    where = (
        {"base_url": "https://api.example.org/v1", "model": "m"}
        if target is None
        else {"target_deployment_id": target.id}
    )
    return services.attach(
        organization_id=chat.organization_id,
        deployment_id=chat.id,
        name="copies",
        role="shadow",
        change=Change(**changes),
        **where,
    )


def told(world: World, chat: Deployment, cell: str = "c0", **project: Any) -> list[dict[str, Any]]:
    """The shadows that a key of Acme's project is told of, as the gateway's role."""
    record = {
        "organization": {"id": world.organization.id.hex},
        "project": {"id": world.project.id.hex, "zero_retention": False} | project,
        "deployments": [{"id": chat.id.hex}],
    }
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_with_shadows(%s::jsonb, %s)", [json.dumps(record), cell])
        found: list[dict[str, Any]] = json.loads(cursor.fetchone()[0]).get("shadows", [])
        return found


def changes_since(watermark: str | None = None) -> tuple[str, set[str]]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT corral_changes_since(%s)", [watermark])
        found = json.loads(cursor.fetchone()[0])
    return found["watermark"], set(found["changes"])


def test_only_who_agreed_is_copied_and_gateways_hear_of_it(world: World, chat: Deployment) -> None:
    mine = world.organization.id
    with pytest.raises(ConflictError, match="agree first"):
        attach(chat)
    services.set_consent(organization_id=mine, agreed=True)
    mark, _ = changes_since()
    made = attach(
        chat, shadow_ppm=500, shadow_rpm=7, shadow_budget_nano=9, slots=3, output_nano_per_million=11
    )
    [shadow] = told(world, chat)
    assert (shadow["id"], shadow["deployment"], shadow["target"]) == (made.id.hex, chat.id.hex, "")
    assert (shadow["organization"], shadow["project"]) == (mine.hex, world.project.id.hex)
    assert [shadow[n] for n in ("share_ppm", "rpm", "budget_nano", "slots")] == [500, 7, 9, 3]
    assert shadow["output_nano_per_million"] == 11
    assert told(world, chat, zero_retention=True) == []
    mark, refs = changes_since(mark)
    assert f"dep:{chat.id.hex}" in refs
    services.change_upstream(organization_id=mine, upstream_id=made.id, change=Change(enabled=False))
    assert told(world, chat) == []
    services.change_upstream(organization_id=mine, upstream_id=made.id, change=Change(enabled=True))
    services.set_consent(organization_id=mine, agreed=False)
    mark, refs = changes_since(mark)
    assert {f"dep:{chat.id.hex}", f"org:{mine.hex}"} <= refs
    assert told(world, chat) == []
    with pytest.raises(ConflictError, match="agree first"):  # nor by turning another into one
        services.change_upstream(organization_id=mine, upstream_id=made.id, change=Change(slots=4))


def test_a_second_deployment_is_copied_to_within_its_project_only(world: World, chat: Deployment) -> None:
    services.set_consent(organization_id=world.organization.id, agreed=True)
    version = chat.model_version_id
    second = make_deployment(world, "second", model_version_id=version)
    made = attach(chat, second)
    [shadow] = told(world, chat)
    assert shadow["target"] == second.id.hex
    assert told(world, chat, cell="c9") == []
    assert told(world, chat, id=ids.new_id().hex) == []  # another project that the deployment is shared with
    for role in ("replica", "overflow"):
        with pytest.raises(InvalidInputError, match="can only be a shadow"):
            services.change_upstream(
                organization_id=world.organization.id, upstream_id=made.id, change=Change(role=role)
            )
    with pytest.raises(InvalidInputError, match="its own shadow"):
        attach(chat, chat)
    with pytest.raises(InvalidInputError, match="called without"):
        attach(chat, second, api_key="sk-1")
    with pytest.raises(InvalidInputError, match="not both"):
        services.attach(
            organization_id=world.organization.id, deployment_id=chat.id, name="both", role="shadow",
            base_url="https://api.example.org/v1", model="m", target_deployment_id=second.id, change=Change(),
        )  # fmt: skip
    deployments.delete_deployment(organization_id=world.organization.id, deployment_id=second.id)
    with tenant(world.organization.id):
        assert not Upstream.objects.exists()


def spent(upstream_id: UUID, since: datetime) -> int:
    from_ms = int(since.timestamp() * 1000)
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT corral_budget_spent(%s, %s, %s, 0, 'c0')", [upstream_id, from_ms, from_ms + 86_400_000]
        )
        found = json.loads(cursor.fetchone()[0])
    return sum(found.values())


def test_what_a_day_of_copies_cost_is_known_when_redis_forgot(world: World, chat: Deployment) -> None:
    services.set_consent(organization_id=world.organization.id, agreed=True)
    made = attach(chat)
    day = datetime.now(tz=UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    assert spent(made.id, day) == 0
    with acting_as("corral_operator"):
        for days, cost_nano in ((0, 40), (1, 500)):
            UpstreamDay.objects.create(
                organization=world.organization,
                upstream_id=made.id,
                day=(day - timedelta(days=days)).date(),
                cost_nano=cost_nano,
            )
    assert spent(made.id, day) == 40
    assert spent(ids.new_id(), day) == 0


def result(made: Upstream, n: int, **values: Any) -> Result:
    known = Result(
        organization=made.organization_id.hex, upstream=made.id.hex, request=ids.new_id().hex,
        at_ms=int(datetime.now(tz=UTC).timestamp() * 1000), status=200, duration_ms=200 + n, finish="stop",
        first_token_ms=20 + n, itl_us=1_000, n_prompt=7, n_completion=3, cost_nano=5, own_finish="stop",
        own_first_token_ms=10, own_itl_us=900, own_duration_ms=100, own_n_completion=3, is_same=True,
        similarity_ppm=1_000_000,
    )  # fmt: skip
    from msgspec.structs import replace as replace_struct

    return replace_struct(known, **values)


def send(client: redis.Redis, results: list[Result], skips: list[Skips] | None = None) -> None:
    now_ms = int(datetime.now(tz=UTC).timestamp() * 1000)
    client.xadd(KEYS.shadows, {FIELD: encode(Batch(now_ms, results, skips or []))})


def test_results_are_kept_once_summed_and_shown(world: World, chat: Deployment, client: redis.Redis) -> None:
    services.set_consent(organization_id=world.organization.id, agreed=True)
    made = attach(chat)
    path = f"/upstreams/{made}"
    api = Api(token_of(world.organization.id, Role.OWNER))
    empty = api.get(f"{path}/shadow-summary").body
    assert (empty["n"], empty["same_ppm"], empty["first_token_ms"]["difference_p99"]) == (0, None, None)
    told = [result(made, n) for n in range(97)]
    told += [result(made, 0, is_same=False, similarity_ppm=0, finish="length")]
    told += [result(made, 0, is_same=None, first_token_ms=None, itl_us=None)]
    told += [
        result(made, 900, status=504, code="upstream_timeout", finish="", is_same=None, similarity_ppm=None)
    ]
    skips = [Skips(made.organization_id.hex, made.id.hex, "rate", 4)]
    send(client, told, skips)
    send(client, told[:5])  # of a gateway that did not hear that it was kept
    client.xadd(KEYS.shadows, {FIELD: b"what is this"})
    with acting_as("corral_operator"):
        assert intake.run(client, KEYS, using="default") == 100
        send(client, [], skips)
        assert intake.run(client, KEYS, using="default") == 0
    assert client.xlen(KEYS.shadows) == 0
    listed = api.get(f"{path}/shadow-results?limit=2").body
    assert len(listed["data"]) == 2
    assert "first_token_ms" in listed["data"][0]
    found = api.get(f"{path}/shadow-summary").body
    assert (found["n"], found["n_failed"], found["n_compared"]) == (100, 1, 98)
    assert (found["same_ppm"], found["same_finish_ppm"]) == (97 * 1_000_000 // 98, 98 * 1_000_000 // 99)
    first = found["first_token_ms"]
    assert (first["n"], first["own_p50"], first["own_p99"]) == (98, 10, 10)
    assert (first["p50"], first["difference_p50"]) == (67.5, 57.5)
    assert 114 < first["p99"] < 116 and first["difference_p99"] == first["p99"] - 10
    assert found["itl_us"]["difference_p50"] == 100
    assert (found["errors"], found["skipped"]) == ({"upstream_timeout": 1}, {"rate": 8})
    assert found["cost_nano"] == 500
    use = api.get(f"{path}/use").body
    assert (use["n_shadowed"], use["n_shadow_failed"], use["n_same"]) == (100, 1, 97)
    stranger = Api(token_of(world.other_organization.id, Role.OWNER))
    assert stranger.get(f"{path}/shadow-summary").status_code == 404


def test_what_is_old_or_too_much_is_forgotten(
    world: World, chat: Deployment, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    services.set_consent(organization_id=world.organization.id, agreed=True)
    made = attach(chat)
    monkeypatch.setattr(intake, "MAX_PER_SHADOW", 3)
    now = datetime.now(tz=UTC)
    old_ms = int((now - intake.KEPT - timedelta(hours=1)).timestamp() * 1000)
    send(client, [result(made, n) for n in range(5)] + [result(made, 9, at_ms=old_ms)])
    with acting_as("corral_operator"):
        ShadowSkip.objects.create(
            organization=world.organization, upstream_id=made.id, day=(now - timedelta(days=40)).date(), reason="rate"
        )  # fmt: skip
        assert intake.run(client, KEYS, using="default") == 6
        assert intake.prune(now=now, using="default") == 3
        assert (ShadowResult.objects.count(), ShadowSkip.objects.count()) == (3, 0)


def test_by_rest_it_is_attached_and_refused_by_name(world: World, chat: Deployment) -> None:
    api = Api(token_of(world.organization.id, Role.OWNER))
    body = {"name": "copies", "deployment_id": str(chat), "role": "shadow"}
    refused = api.post("/upstreams", body | {"base_url": "https://api.example.org/v1", "model": "m"})
    assert (refused.status_code, "agree first" in refused.body["detail"]) == (409, True)
    assert api.call("PUT", "/outside-consent", {"agreed": True}).status_code == 200
    for given, field in (
        ({}, "model"),
        ({"model": "m"}, "base_url"),
        ({"target_deployment_id": str(chat)}, "target_deployment_id"),
        ({"base_url": "https://api.example.org/v1", "model": "m", "shadow_rpm": 0}, "shadow_rpm"),
    ):
        refused = api.post("/upstreams", body | given)
        assert refused.status_code in (400, 422), (given, refused.body)
        assert field in refused.body["detail"] + json.dumps(refused.body.get("errors")), (given, refused.body)
    second = make_deployment(world, "second", model_version_id=chat.model_version_id)
    made = api.post("/upstreams", body | {"target_deployment_id": str(second), "shadow_ppm": 250_000})
    assert made.status_code == 201, made.body
    assert (made.body["target_deployment_id"], made.body["base_url"]) == (str(second), "")
    assert (made.body["shadow_ppm"], made.body["shadow_rpm"]) == (250_000, 60)
