"""An adapter uploaded to a real S3 server by signed URLs is checked, published by digest, and fetched by a machine."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.utils import timezone

from controlplane.adapters import purging, selectors
from controlplane.adapters import tasks as _tasks  # noqa: F401 - registers what advances uploads
from controlplane.operations.advance import advance
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Role
from infra.objectstore import Place, signed_urls
from tests.cloud import s3 as server
from tests.controlplane.api.caller import Api, token_of
from tests.database import acting_as
from tests.workers.adapter_files import write_adapter
from tests.world import World, make_deployment
from workers.modelcache.adapter import FILES
from workers.modelcache.store import ModelStore

pytestmark = pytest.mark.django_db


@pytest.fixture
def api(world: World, s3: dict[str, str], tmp_path: Path, settings: Any) -> Iterator[Api]:
    settings.ENV = replace(settings.ENV, var=tmp_path, adapter_store="s3://models/adapters")
    make_deployment(world, "chat", engine_profile={"engine": "toy", "max_loras": 2})
    yield Api(token_of(world.organization.id, Role.DEVELOPER))


def register(api: Api, name: str) -> dict[str, Any]:
    [deployment] = api.get("/deployments").body["data"]
    made = api.post("/adapters", {"deployment_id": deployment["id"], "name": name})
    assert made.status_code == 201, made.body
    found: dict[str, Any] = made.body
    return found


def put(url: str, data: bytes) -> int:
    request = urllib.request.Request(url, data=data, method="PUT")
    with urllib.request.urlopen(request, timeout=10) as answer:
        return int(answer.status)


def complete(api: Api, adapter: str) -> dict[str, Any]:
    begun = api.post(f"/adapters/{adapter}/complete")
    assert begun.status_code == 202, begun.body
    with acting_as("corral_operator"):
        assert advance(UUID(hex=begun.body["id"].removeprefix("opn_")))
    ended: dict[str, Any] = api.get(f"/operations/{begun.body['id']}").body
    return ended


def test_uploaded_checked_published_and_fetched(
    api: Api, world: World, s3: dict[str, str], tmp_path: Path
) -> None:
    made = register(api, "formal")
    assert sorted(made["upload"]) == sorted(FILES)
    source = write_adapter(tmp_path / "mine", r=4)
    for name, url in made["upload"].items():
        assert put(url, (source / name).read_bytes()) == 200
    for bad in (made["upload"][FILES[0]].replace(FILES[0], "other"), made["upload"][FILES[0]].split("?")[0]):
        with pytest.raises(urllib.error.HTTPError) as refused:
            put(bad, b"x")
        assert refused.value.code == 403
    ended = complete(api, made["id"])
    assert ended["state"] == "succeeded", ended["error"]
    assert (ended["state"], ended["result"]["model"]) == ("succeeded", "chat:formal")
    with tenant(world.organization.id):
        row = selectors.adapters(organization_id=world.organization.id).get()
    assert (row.state, row.source_uri, row.rank) == ("ready", "s3://models/adapters", 4)
    bucket: Any = server.client(s3)

    def keys() -> list[str]:
        listed = bucket.list_objects_v2(Bucket="models", Prefix="adapters/").get("Contents", [])
        return [each["Key"] for each in listed]

    assert not [key for key in keys() if "uploads" in key]
    urls = signed_urls(Place.parse(row.source_uri), row.digest, FILES)
    machine = ModelStore(tmp_path / "machine")
    path = machine.ensure(row.digest, row.source_uri, urls=urls)
    assert (path / FILES[1]).read_bytes() == (source / FILES[1]).read_bytes()
    with acting_as("corral_operator"):
        purging.purge_organization(world.organization.id, timezone.now())
    assert keys() == []


@pytest.mark.full
def test_a_missing_file_and_a_bad_one_are_refused_by_name(api: Api, tmp_path: Path) -> None:
    made = register(api, "absent")
    ended = complete(api, made["id"])
    assert (ended["state"], "was not uploaded" in ended["error"]["detail"]) == ("failed", True)
    made = register(api, "wide")
    source = write_adapter(tmp_path / "wide", r=32)
    for name, url in made["upload"].items():
        put(url, (source / name).read_bytes())
    ended = complete(api, made["id"])
    assert (ended["state"], "max_lora_rank 16" in ended["error"]["detail"]) == ("failed", True)
    shown = api.get(f"/adapters/{made['id']}").body
    assert (shown["state"], shown["error_code"]) == ("refused", "rank_too_high")
