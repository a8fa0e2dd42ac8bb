"""Adapters come to machines that serve their deployment, and leave them; what is in memory is noted for gateways."""

from __future__ import annotations

from datetime import timedelta

import msgspec
import pytest
from django.utils import timezone

from autoscaler import adapters
from controlplane.adapters import services
from controlplane.adapters.models import Adapter
from tests.autoscaler.conftest import Scaling
from tests.world import make_adapter
from workers.contract import AdapterSpec


def told(scaling: Scaling) -> dict[str, AdapterSpec]:
    cell = scaling.house.cell
    found = cell.redis.hgetall(cell.keys.machine(scaling.replica().machine_id.hex).adapters)
    return {name.decode(): msgspec.json.decode(raw, type=AdapterSpec) for name, raw in found.items()}


def with_adapters(scaling: Scaling) -> None:
    scaling.change(engine_profile={**scaling.seen().engine_profile, "max_loras": 2})
    scaling.deployment.refresh_from_db()


def test_ticks_bring_and_take_away(scaling: Scaling) -> None:
    with_adapters(scaling)
    scaling.serving()
    assert told(scaling) == {}
    rows = [make_adapter(scaling.deployment, name) for name in ("formal", "casual")]
    scaling.tick()
    assert told(scaling).keys() == {row.id.hex for row in rows}
    spec = told(scaling)[rows[0].id.hex]
    assert (spec.deployment, spec.digest, spec.source, spec.urls) == (
        scaling.deployment.id.hex, "f" * 64, "file:///nowhere", {},
    )  # fmt: skip
    services.retire(organization_id=rows[0].organization_id, adapter_id=rows[0].id)
    scaling.tick()
    assert told(scaling).keys() == {rows[1].id.hex}
    cell = scaling.house.cell
    cell.redis.delete(cell.keys.machine(scaling.replica().machine_id.hex).adapters)  # Redis came back empty
    scaling.tick()
    assert told(scaling).keys() == {rows[1].id.hex}


def test_other_deployments_of_the_machine_keep_theirs(scaling: Scaling) -> None:
    with_adapters(scaling)
    replica = scaling.serving()
    cell = scaling.house.cell
    key = cell.keys.machine(replica.machine_id.hex).adapters
    other = msgspec.json.encode(AdapterSpec(deployment="o" * 32, digest="1" * 64, source="file:///x"))
    cell.redis.hset(key, mapping={"other": other, "nonsense": b"{"})
    make_adapter(scaling.deployment)
    scaling.tick()
    assert cell.redis.hget(key, "other") == other
    assert cell.redis.hlen(key) == 3


def test_signed_urls_are_signed_anew_before_they_end(
    scaling: Scaling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with_adapters(scaling)
    scaling.serving()
    row = make_adapter(scaling.deployment)
    Adapter.objects.filter(id=row.id).update(source_uri="s3://bucket/a")
    now = timezone.now()

    def deliver(after_s: float) -> int:
        return adapters.deliver(scaling.deployment, scaling.house.cell, now + timedelta(seconds=after_s))

    assert deliver(0) == 1
    [spec] = told(scaling).values()
    assert sorted(spec.urls) == ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]
    assert all("X-Amz-Signature" in url for [url] in spec.urls.values())
    assert deliver(adapters.FRESH_S - 1) == 0
    assert deliver(adapters.FRESH_S + 1) == 1


def test_a_deployment_without_room_for_adapters_costs_nothing(
    scaling: Scaling, django_assert_num_queries: object
) -> None:
    with django_assert_num_queries(0):  # type: ignore[operator]
        assert adapters.deliver(scaling.deployment, scaling.house.cell, timezone.now()) == 0
