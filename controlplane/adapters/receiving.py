"""From uploaded or local files to an adapter that is served: fetched, checked against its base model, published.

Called by the control worker for an operation (`POST /adapters/{id}/complete`), and by `manage.py publish_adapter` for a
directory. What is refused says which file and what to do; nothing was reserved for it.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from django.conf import settings

from controlplane import ids
from controlplane.adapters import files, selectors, services
from controlplane.adapters.models import Adapter, AdapterState
from controlplane.deployments import importing
from controlplane.deployments.models import ModelSource
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.operations.advance import Claim, Done, handles
from infra.objectstore import ObjectStoreError
from workers.modelcache.adapter import ImportedAdapter, Shapes, base_shapes, import_adapter
from workers.modelcache.importers import ImportRefused


def receive(row: Adapter, directory: Path) -> Adapter:
    """Check a directory and serve the adapter from it. Raises InvalidInputError, after which it is refused."""
    _, max_rank = selectors.lora_room(row.deployment)
    try:
        imported = _imported(row, directory, max_rank)
    except ImportRefused as error:
        services.refuse(
            organization_id=row.organization_id, adapter_id=row.id, code=error.code, message=str(error)
        )
        raise InvalidInputError(str(error), field="files") from error
    return services.mark_ready(
        organization_id=row.organization_id,
        adapter_id=row.id,
        imported=imported,
        source_uri=files.publish(imported),
    )


@handles(services.RECEIVE)
def _receive_uploaded(claim: Claim) -> Done:
    """One step: adapters are small. Run again after a crash it finds the same files, or the work done."""
    row = selectors.adapter(
        organization_id=claim.organization_id,
        adapter_id=ids.from_text(ids.Prefix.ADAPTER, claim.row.subject),
    )
    if row.state == AdapterState.READY:
        return _done(row)
    if row.state != AdapterState.CHECKING:
        raise ConflictError(f"the adapter is {row.state}", field="state")
    work = Path(settings.ENV.var) / "incoming-adapters"
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=f"{row.id.hex}.", dir=work))
    try:
        claim.report(10, "fetching")
        try:
            files.fetch_upload(row.id, directory)
        except ObjectStoreError as error:
            services.refuse(
                organization_id=row.organization_id, adapter_id=row.id, code="no_files", message=str(error)
            )
            raise InvalidInputError(str(error), field="files") from error
        claim.report(60, "checking")
        ready = receive(row, directory)
        files.drop_upload(row.id)
        return _done(ready)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _done(row: Adapter) -> Done:
    result: dict[str, Any] = {"adapter_id": str(row), "model": row.model, "digest": row.digest}
    return Done(result, f"served as {row.model}")


def _imported(row: Adapter, directory: Path, max_rank: int) -> ImportedAdapter:
    store = importing.store(Path(settings.ENV.var))
    version = row.deployment.model_version
    if version.digest != row.base_digest:
        raise ImportRefused(
            "wrong_base", f"{row.deployment.name} serves another model version by now: register it anew"
        )
    base: Shapes | None = None
    if version.source_kind != ModelSource.TOY:
        base = base_shapes(store.path(version.digest))
    return import_adapter(directory, store, base=base, max_rank=max_rank)
