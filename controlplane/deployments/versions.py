"""Writes about model versions: weights by their digest, where machines fetch them, and until when they are served."""

from collections.abc import Mapping
from uuid import UUID

import structlog
from django.conf import settings
from django.utils import timezone

from controlplane.deployments import selectors
from controlplane.deployments.licences import refusal
from controlplane.deployments.models import ModelSource, ModelVersion
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.saving import insert
from controlplane.tenants.context import tenant

log = structlog.get_logger("corral.deployments")


def register(
    *,
    organization_id: UUID,
    digest: str,
    name: str,
    source_kind: ModelSource,
    source_uri: str,
    size_bytes: int,
    max_model_len: int,
    n_params: int | None = None,
    licence: str = "",
    manifest: Mapping[str, object] | None = None,
    config: Mapping[str, object] | None = None,
) -> ModelVersion:
    """Register weights by their digest. The same digest again returns the version that is there, no longer retired."""
    wanted = ModelVersion(
        organization_id=organization_id,
        digest=digest,
        name=name,
        source_kind=source_kind,
        source_uri=source_uri,
        size_bytes=size_bytes,
        max_model_len=max_model_len,
        n_params=n_params,
        licence=licence,
        manifest=dict(manifest or {}),
        config=dict(config or {}),
    )
    if len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
        raise InvalidInputError("digest: must be a SHA-256 as 64 lower-case hex digits", field="digest")
    if size_bytes < 0:
        raise InvalidInputError(f"size_bytes={size_bytes}: must not be negative", field="size_bytes")
    if max_model_len < 1:
        raise InvalidInputError(f"max_model_len={max_model_len}: must be at least 1", field="max_model_len")
    if source_kind is not ModelSource.TOY and (why := refusal(licence, settings.ENV.model_licences)):
        raise InvalidInputError(why, field="licence")
    with tenant(organization_id):
        versions = ModelVersion.objects.filter(organization_id=organization_id, digest=digest)
        known = versions.first()
        if known is not None:
            if known.retired_at is not None or wanted.config != known.config:
                known.retired_at = None  # somebody wants it served again
                known.config = wanted.config or known.config  # registered before its shape was kept
                known.save(update_fields=["retired_at", "config"])
            return known
        try:
            insert(wanted, taken={"modelversion_digest_unique": ("digest", "registered just now")})
        except ConflictError:
            return versions.get()
    log.info("model_version.created", organization=organization_id.hex, model_version=wanted.id.hex)
    return wanted


def move(*, organization_id: UUID, model_version_id: UUID, source_uri: str) -> ModelVersion:
    """Machines fetch it from this place in an object store from now on. The house only (operator role): a tenant may
    not send machines to an address of its choosing. Raises NotFoundError.
    """
    with tenant(organization_id):
        ModelVersion.objects.filter(organization_id=organization_id, id=model_version_id).update(
            source_kind=ModelSource.OBJECT_STORE, source_uri=source_uri
        )
        version = selectors.model_version(organization_id=organization_id, model_version_id=model_version_id)
    log.info("model_version.moved", organization=organization_id.hex, model_version=version.id.hex)
    return version


def retire(*, organization_id: UUID, model_version_id: UUID) -> ModelVersion:
    """Nothing new is served from it; deployments that have it go on. May run twice. Raises NotFoundError."""
    with tenant(organization_id):
        ModelVersion.objects.filter(
            organization_id=organization_id, id=model_version_id, retired_at=None
        ).update(retired_at=timezone.now())
        version = selectors.model_version(organization_id=organization_id, model_version_id=model_version_id)
    log.info("model_version.retired", organization=organization_id.hex, model_version=version.id.hex)
    return version


def servable(organization_id: UUID, model_version_id: UUID) -> ModelVersion:
    """The version, if it may be served anew. Raises NotFoundError, InvalidInputError for a retired one."""
    version = selectors.model_version(organization_id=organization_id, model_version_id=model_version_id)
    if version.retired_at is not None:
        raise InvalidInputError(
            f"model_version_id: {version.name} was retired on {version.retired_at:%Y-%m-%d}; choose another",
            field="model_version_id",
        )
    return version
