"""Model versions in a real S3 server: published once, fetched by signed URLs and by nothing else."""

from __future__ import annotations

import json
import random
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from django.core.management import CommandError, call_command

from infra import objectstore
from infra.objectstore import ObjectStoreError, Place, publish, signed_urls
from tests.cloud import s3 as server
from tests.workers.modelcache.test_remote import _manifest
from tests.world import World
from workers.modelcache.manifest import Manifest
from workers.modelcache.store import ModelStore, ModelStoreError

PLACE = Place("models", "weights")
AsOperator = Callable[[], AbstractContextManager[None]]


@pytest.fixture
def version(tmp_path: Path) -> tuple[ModelStore, Manifest]:
    """A version in the control plane's store, its weights of several parts."""
    store = ModelStore(tmp_path / "origin")
    files = {"model.safetensors": random.randbytes(40 << 20), "config.json": b"{}"}
    manifest = _manifest(files)
    with store.incoming("x") as staging:
        for name, data in files.items():
            (staging / name).write_bytes(data)
        store.adopt(staging, manifest)
    return store, manifest


def _names(manifest: Manifest) -> list[str]:
    return [entry.name for entry in manifest.files]


def test_published_once_and_fetched_by_signed_urls(
    s3: dict[str, str], version: tuple[ModelStore, Manifest], tmp_path: Path
) -> None:
    store, manifest = version
    sent = publish(store.path(manifest.digest), manifest, PLACE, lambda name, size: None)
    assert sent > manifest.size_bytes
    assert publish(store.path(manifest.digest), manifest, PLACE, lambda name, size: None) == 0
    urls = signed_urls(PLACE, manifest.digest, _names(manifest))
    machine = ModelStore(tmp_path / "machine")
    path, claim = machine.acquire(manifest.digest, PLACE.uri, urls=urls)
    assert machine.verify(manifest.digest) == manifest
    assert path.parent == machine.root
    claim.close()


def test_a_url_opens_one_object_for_a_while_and_no_other(
    s3: dict[str, str],
    version: tuple[ModelStore, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, manifest = version
    publish(store.path(manifest.digest), manifest, PLACE, lambda name, size: None)
    [url] = signed_urls(PLACE, manifest.digest, [])["manifest.json"]
    assert urllib.request.urlopen(url, timeout=5).status == 200
    for bad in (url.replace("manifest.json", "config.json"), url.split("?")[0]):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(bad, timeout=5)
        assert refused.value.code == 403
    monkeypatch.setattr(objectstore, "EXPIRES_S", 1)
    short = signed_urls(PLACE, manifest.digest, _names(manifest))
    ended = {
        name: [u.replace("X-Amz-Date=20", "X-Amz-Date=19") for u in each] for name, each in short.items()
    }
    with pytest.raises(ModelStoreError) as caught:
        ModelStore(tmp_path / "machine").ensure(manifest.digest, PLACE.uri, urls=ended)
    assert caught.value.code in ("source_expired", "source_missing")
    assert urlsplit(url).query not in str(caught.value)


def test_damage_in_the_bucket_is_found(
    s3: dict[str, str], version: tuple[ModelStore, Manifest], tmp_path: Path
) -> None:
    store, manifest = version
    publish(store.path(manifest.digest), manifest, Place("models", "damaged"), lambda name, size: None)
    key = Place("models", "damaged").key(manifest.digest, "model.safetensors")
    client: Any = server.client(s3)
    client.put_object(Bucket="models", Key=key, Body=bytes(40 << 20))
    urls = signed_urls(Place("models", "damaged"), manifest.digest, _names(manifest))
    with pytest.raises(ModelStoreError) as caught:
        ModelStore(tmp_path / "machine").ensure(manifest.digest, "s3://models/damaged", urls=urls)
    assert caught.value.code == "bad_weights"


@pytest.mark.parametrize("uri", ["models", "https://x/y", "s3://", "s3://b/p?x=1"])
def test_what_is_no_place_is_said_so(uri: str) -> None:
    with pytest.raises(ObjectStoreError, match="s3://bucket"):
        Place.parse(uri)


@pytest.mark.django_db
def test_the_command_publishes_and_moves_the_version(
    s3: dict[str, str],
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    as_operator: AsOperator,
) -> None:
    from django.conf import settings

    from controlplane.deployments import importing
    from controlplane.deployments.models import ModelSource, ModelVersion

    monkeypatch.setattr(settings, "ENV", replace(settings.ENV, var=tmp_path))
    version = importing.register(organization_id=world.organization.id, source="tiny", var=tmp_path)
    slug = world.organization.slug
    with as_operator():
        call_command("publish_model", "tiny", "s3://models/prod", "--organization", slug, "--json")
        said = json.loads(capsys.readouterr().out)
        assert said["n_bytes_sent"] >= said["n_bytes"] > 0
        moved = ModelVersion.objects.get(id=version.id)
        assert (moved.source_kind, moved.source_uri) == (ModelSource.OBJECT_STORE, "s3://models/prod")
        with pytest.raises(CommandError, match="no model version called 'other'"):
            call_command("publish_model", "other", "s3://models/prod", "--organization", slug)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        objectstore._client.cache_clear()
        with pytest.raises(CommandError, match="check the bucket, its region and the credentials"):
            call_command("publish_model", "tiny", "s3://models/other", "--organization", slug)
