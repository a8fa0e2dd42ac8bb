"""Writes about adapters. Gateways and the autoscaler hear of each after commit.

An adapter is registered, gets its files (receiving.py), is served until it is retired; a name is free again once its
adapter is retired or refused. Files of a retired one are kept for RETENTION, then purged (tasks.py).
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final
from uuid import UUID

import structlog
from django.utils import timezone

from controlplane.adapters import selectors
from controlplane.adapters.models import MAX_MODEL_NAME, OPEN, SEPARATOR, Adapter, AdapterState
from controlplane.deployments import selectors as deployments
from controlplane.deployments.models import Deployment
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.operations import services as operations
from controlplane.operations.models import Operation
from controlplane.saving import insert
from controlplane.tenants import invalidation
from controlplane.tenants.context import tenant
from workers.modelcache.adapter import ImportedAdapter

log = structlog.get_logger("corral.adapters")

MAX_PER_DEPLOYMENT: Final = 128  # each is in the answer to every look-up of a key of its project
RETENTION: Final = timedelta(days=7)  # of a retired one's files
RECEIVE: Final = "receive_adapter"
MAX_RECEIVE_S: Final = 1800.0
# Who never uploads must not keep a name for ever.
UPLOAD_TIME: Final = timedelta(hours=24)


def register(*, organization_id: UUID, deployment_id: UUID, name: str) -> Adapter:
    """A new adapter of a deployment, without files yet. Nothing of it is served before they were checked.

    Raises NotFoundError, InvalidInputError (name; a deployment without room for adapters), ConflictError (name taken;
    too many).
    """
    with tenant(organization_id):
        deployment = deployments.deployment(organization_id=organization_id, deployment_id=deployment_id)
        max_loras, _ = selectors.lora_room(deployment)
        if not max_loras:
            raise InvalidInputError(
                f"deployment_id: {deployment.name} serves no adapters: set max_loras above 0 in its engine profile",
                field="deployment_id",
            )
        room = MAX_MODEL_NAME - len(deployment.name) - len(SEPARATOR)
        if len(name) > room:
            raise InvalidInputError(
                f"name: programs send {deployment.name}{SEPARATOR}NAME, which may have {MAX_MODEL_NAME} characters: "
                + (f"use at most {room}" if room > 0 else "the deployment's name leaves no room"),
                field="name",
            )
        made = Adapter(
            organization_id=organization_id,
            project_id=deployment.project_id,
            deployment=deployment,
            name=name,
            base_digest=deployment.model_version.digest,
        )
        # Two at once must not both be the last that fits.
        Deployment.objects.select_for_update(no_key=True).get(
            organization_id=organization_id, id=deployment_id
        )
        held = Adapter.objects.filter(
            organization_id=organization_id, deployment_id=deployment_id, state__in=OPEN
        )
        if held.count() >= MAX_PER_DEPLOYMENT:
            raise ConflictError(f"{deployment.name} has {MAX_PER_DEPLOYMENT} adapters: retire one first")
        insert(
            made,
            taken={"adapter_name_unique": ("name", f"{deployment.name} has an adapter {name!r} already")},
        )
    log.info("adapter.registered", organization=organization_id.hex, adapter=made.id.hex)
    return made


def begin_receiving(*, organization_id: UUID, adapter_id: UUID) -> Operation:
    """Its files are uploaded: fetch and check them, in the background. May run twice.

    Raises NotFoundError, ConflictError where it does not await any.
    """
    with tenant(organization_id):
        row = selectors.adapter(organization_id=organization_id, adapter_id=adapter_id)
        if row.state not in (AdapterState.AWAITING, AdapterState.CHECKING):
            raise ConflictError(f"the adapter is {row.state}: register another one", field="state")
        Adapter.objects.filter(id=adapter_id, state=AdapterState.AWAITING).update(state=AdapterState.CHECKING)
        return operations.begin(
            organization_id=organization_id, kind=RECEIVE, subject=str(row), max_s=MAX_RECEIVE_S
        )


def mark_ready(
    *, organization_id: UUID, adapter_id: UUID, imported: ImportedAdapter, source_uri: str
) -> Adapter:
    """Its files are checked and lie where machines find them: serve it. Raises ConflictError if it was retired."""
    with tenant(organization_id):
        changed = Adapter.objects.filter(
            organization_id=organization_id,
            id=adapter_id,
            state__in=(AdapterState.AWAITING, AdapterState.CHECKING),
        ).update(
            state=AdapterState.READY,
            digest=imported.digest,
            source_uri=source_uri,
            size_bytes=imported.manifest.size_bytes,
            rank=imported.facts.rank,
            modules=list(imported.facts.modules),
            n_params=imported.facts.n_params,
            ready_at=timezone.now(),
            error_code="",
            error_message="",
        )
        row = selectors.adapter(organization_id=organization_id, adapter_id=adapter_id)
        if not changed and row.state != AdapterState.READY:
            raise ConflictError(f"the adapter is {row.state}", field="state")
        _tell(row)
    log.info("adapter.ready", organization=organization_id.hex, adapter=adapter_id.hex, digest=row.digest)
    return row


def refuse(*, organization_id: UUID, adapter_id: UUID, code: str, message: str) -> None:
    """Its files cannot be served; its name is free again."""
    with tenant(organization_id):
        Adapter.objects.filter(
            organization_id=organization_id,
            id=adapter_id,
            state__in=(AdapterState.AWAITING, AdapterState.CHECKING),
        ).update(state=AdapterState.REFUSED, error_code=code[:64], error_message=message[:500])
    log.info("adapter.refused", organization=organization_id.hex, adapter=adapter_id.hex, code=code)


def retire(*, organization_id: UUID, adapter_id: UUID) -> Adapter:
    """The next request for it is a 404; answers that run end in peace. May run twice. Raises NotFoundError."""
    with tenant(organization_id):
        row = selectors.adapter(organization_id=organization_id, adapter_id=adapter_id)
        changed = (
            Adapter.objects.filter(organization_id=organization_id, id=adapter_id)
            .exclude(state=AdapterState.RETIRED)
            .update(state=AdapterState.RETIRED, retired_at=timezone.now())
        )
        row.refresh_from_db(fields=["state", "retired_at"])
        if changed:
            _tell(row)
    log.info("adapter.retired", organization=organization_id.hex, adapter=adapter_id.hex)
    return row


def _tell(row: Adapter) -> None:
    """Gateways read their keys again; the watcher has the deployment's tick bring it to machines, or take it away."""
    invalidation.publish_after_commit(
        invalidation.project_ref(row.project_id), invalidation.deployment_ref(row.deployment_id)
    )
