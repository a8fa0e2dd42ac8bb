"""Where adapters' files lie: in the object store that CORRAL_ADAPTER_STORE names, else in our own model store.

Uploads come to `uploads/<adapter>/` by signed URLs that open one file each; what was checked lies under its digest, as
model versions do. Called by receiving.py, the API and tasks.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final
from uuid import UUID

from django.conf import settings

from controlplane.deployments import importing
from infra import objectstore
from infra.objectstore import ObjectStoreError, Place
from workers.modelcache.adapter import CONFIG, FILES, MAX_BYTES, MAX_CONFIG_BYTES, ImportedAdapter
from workers.modelcache.manifest import MANIFEST_NAME

UPLOAD_S: Final = 3600
_MOST: Final = {CONFIG: MAX_CONFIG_BYTES}


def place() -> Place | None:
    """None where no object store is set up: then files come by `manage.py publish_adapter` only."""
    uri = settings.ENV.adapter_store
    return Place.parse(uri) if uri else None


def upload_urls(adapter_id: UUID) -> dict[str, str] | None:
    """File name -> where to PUT it within UPLOAD_S; None without an object store."""
    where = place()
    if where is None:
        return None
    return {name: objectstore.upload_url(where, _upload(adapter_id, name), UPLOAD_S) for name in FILES}


def fetch_upload(adapter_id: UUID, directory: Path) -> None:
    """Raises ObjectStoreError: a file is missing or too large."""
    where = place()
    if where is None:
        raise ObjectStoreError(
            "this control plane has no object store for adapters: use manage.py publish_adapter"
        )
    for name in FILES:
        objectstore.download(where, _upload(adapter_id, name), directory / name, _MOST.get(name, MAX_BYTES))


def drop_upload(adapter_id: UUID) -> None:
    """What is not dropped for want of an answer is the bucket's life-cycle rule's (docs)."""
    where = place()
    if where is not None:
        objectstore.remove(where, [_upload(adapter_id, name) for name in FILES])


def publish(imported: ImportedAdapter, report: Callable[[str, int], None] = lambda name, size: None) -> str:
    """Put it where machines fetch it from; that place."""
    where = place()
    if where is None:
        return imported.path.parent.as_uri()
    objectstore.publish(imported.path, imported.manifest, where, report)
    return where.uri


def purge(digest: str, source_uri: str) -> None:
    """Delete the files of an adapter that nobody has any more. Raises ObjectStoreError."""
    if source_uri.startswith("s3://"):
        names = [f"{digest}/{name}" for name in (MANIFEST_NAME, *FILES)]
        objectstore.remove(Place.parse(source_uri), names)
    importing.store(Path(settings.ENV.var)).evict(digest)


def _upload(adapter_id: UUID, name: str) -> str:
    return f"uploads/{adapter_id.hex}/{name}"
