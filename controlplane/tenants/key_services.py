"""Writes about API keys of inference: made, bound, rotated, revoked.

Surfaces and commands call these after they decided who may (rights.py). Every write runs in its tenant's transaction,
leaves one log line where a key begins or ends, and tells the gateways after commit. A key's plaintext exists only in
the answer that made it: it is never stored or logged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from itertools import chain
from uuid import UUID

import structlog
from django.conf import settings
from django.utils import timezone as clock

from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.saving import check_fields, insert
from controlplane.tenants import api_keys as key_text
from controlplane.tenants import invalidation, selectors
from controlplane.tenants.context import tenant
from controlplane.tenants.key_scopes import NO_SCOPES, KeyScopes, check_aliases, check_tags
from controlplane.tenants.limit_services import check_limits, check_weight
from controlplane.tenants.limits import NO_LIMITS, Limits
from controlplane.tenants.models import ApiKey, User
from controlplane.webhooks.services import emit, key_data

log = structlog.get_logger("corral.tenants")


def create_api_key(
    *,
    organization_id: UUID,
    project_id: UUID,
    name: str,
    created_by: User | None = None,
    expires_at: datetime | None = None,
    weight: int = 100,
    limits: Limits = NO_LIMITS,
    scopes: KeyScopes = NO_SCOPES,
    aliases: Mapping[str, str] | None = None,
    tags: Sequence[str] = (),
) -> tuple[ApiKey, str]:
    """A new key and its plaintext, which exists nowhere after this call: show it once.

    Raises NotFoundError (project), InvalidInputError (name, limits, scopes, an expiry that has passed).
    """
    check_limits(limits)
    check_weight(weight)
    _check_problems(scopes.problems(), check_aliases(aliases or {}), check_tags(tags))
    if expires_at is not None and expires_at <= clock.now():
        raise InvalidInputError("expires_at: must be in the future", field="expires_at")
    new = key_text.generate(settings.ENV.key_pepper)
    with tenant(organization_id):
        project = selectors.project(organization_id=organization_id, project_id=project_id)
        key = ApiKey(
            organization_id=organization_id,
            project=project,
            name=name,
            lookup=new.lookup,
            digest=new.digest,
            pepper=key_text.pepper_id(settings.ENV.key_pepper),
            last4=new.last4,
            created_by=created_by,
            expires_at=expires_at,
            weight=weight,
            scopes=scopes.as_json(),
            aliases=dict(aliases) if aliases else None,
            tags=list(tags) or None,
            **asdict(limits),
        )
        insert(key, taken={})
        emit(organization_id=organization_id, kind="key.created", data=key_data(key.id, key.name, project_id))
        invalidation.publish_after_commit(invalidation.key_ref(key.lookup))
    log.info("key.created", organization=organization_id.hex, project=project_id.hex, key=key.id.hex)
    return key, new.plaintext


def revoke_api_key(*, organization_id: UUID, key_id: UUID) -> ApiKey:
    """End a key for good; a key that is revoked already stays as it is. Raises NotFoundError."""
    with tenant(organization_id):
        revoked = ApiKey.objects.filter(organization_id=organization_id, id=key_id, revoked_at=None).update(
            revoked_at=clock.now()
        )
        key = selectors.api_key(organization_id=organization_id, key_id=key_id)
        if revoked:
            data = key_data(key.id, key.name, key.project_id)
            emit(organization_id=organization_id, kind="key.revoked", data=data)
        invalidation.publish_after_commit(invalidation.key_ref(key.lookup))
    if revoked:
        log.info("key.revoked", organization=organization_id.hex, key=key_id.hex)
    return key


def rotate_api_key(*, organization_id: UUID, key_id: UUID, overlap_s: int) -> tuple[ApiKey, str]:
    """A successor that is like it, and its plaintext; the old key ends after `overlap_s`.

    A key that would expire sooner still does. Raises NotFoundError, or InvalidInputError for a key that has ended.
    """
    with tenant(organization_id):
        old = ApiKey.objects.select_for_update().filter(organization_id=organization_id, id=key_id).first()
        if old is None:
            raise NotFoundError("no such API key", field="api_key")
        now = clock.now()
        if not old.is_active(now):
            raise InvalidInputError("api_key: it has ended; create a new one", field="api_key")
        new, plaintext = create_api_key(
            organization_id=organization_id,
            project_id=old.project_id,
            name=old.name,
            created_by=old.created_by,
            weight=old.weight,
            limits=old.limits,
            scopes=old.bound_to,
            aliases=old.aliases,
            tags=old.tags or (),
        )
        ends_at = now + timedelta(seconds=overlap_s)
        old.expires_at = ends_at if old.expires_at is None else min(ends_at, old.expires_at)
        old.save(update_fields=["expires_at"])
        invalidation.publish_after_commit(invalidation.key_ref(old.lookup))
    log.info("key.rotated", organization=organization_id.hex, key=key_id.hex, successor=new.id.hex)
    return new, plaintext


def set_api_key_scopes(*, organization_id: UUID, key_id: UUID, scopes: KeyScopes) -> None:
    """Replace what a key is bound to; gateways heed it within a second. Raises NotFoundError, InvalidInputError."""
    _check_problems(scopes.problems())
    with tenant(organization_id):
        key = selectors.api_key(organization_id=organization_id, key_id=key_id)
        key.scopes = scopes.as_json()
        key.save(update_fields=["scopes"])
        invalidation.publish_after_commit(invalidation.key_ref(key.lookup))
    log.info("key.bound", organization=organization_id.hex, key=key_id.hex)


def update_api_key(
    *,
    organization_id: UUID,
    key_id: UUID,
    name: str | None = None,
    aliases: Mapping[str, str] | None = None,
    tags: Sequence[str] | None = None,
) -> ApiKey:
    """Change what is given. Raises NotFoundError, InvalidInputError."""
    _check_problems(check_aliases(aliases or {}), check_tags(tags or ()))
    with tenant(organization_id):
        key = selectors.api_key(organization_id=organization_id, key_id=key_id)
        if name is not None:
            key.name = name
        if aliases is not None:
            key.aliases = dict(aliases) or None
        if tags is not None:
            key.tags = list(tags) or None
        check_fields(key)
        key.save(update_fields=["name", "aliases", "tags"])
        invalidation.publish_after_commit(invalidation.key_ref(key.lookup))
    return key


def _check_problems(*found: Iterable[tuple[str, str]]) -> None:
    for field, message in chain(*found):
        raise InvalidInputError(f"{field}: {message}", field=field)
