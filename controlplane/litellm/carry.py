"""Carries a plan out: all of it in one transaction, or nothing.

Called by `manage.py import_litellm` as operator, because it makes organizations and looks for what an earlier import
made. Rows are written in their tenants; gateways are told after commit. A dry run does the same and undoes it, so that
what it promises has been tried.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict
from datetime import datetime
from itertools import groupby
from uuid import UUID

import structlog
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from controlplane.budgets.models import Budget
from controlplane.errors import InvalidInputError
from controlplane.litellm.plan import Existing, Options
from controlplane.litellm.planned import (
    Fate,
    Plan,
    PlannedBudget,
    PlannedKey,
    PlannedOrganization,
    PlannedProject,
)
from controlplane.saving import check_fields, insert
from controlplane.tenants import api_keys, invalidation, services
from controlplane.tenants.context import tenant
from controlplane.tenants.models import ApiKey, Organization, Project, Role, User

log = structlog.get_logger("corral.litellm")
ORIGIN = "litellm"
BATCH = 500


def options(organization: str, shared_by: str) -> Options:
    """How this installation makes ids and hashes."""
    pepper = settings.ENV.key_pepper
    return Options(
        now=timezone.now(),
        make_id=make_id,
        lookups=lambda sha256: tuple(
            api_keys.foreign_lookup(each, sha256) for each in settings.ENV.key_peppers.accepted
        ),
        digest=lambda sha256: api_keys.foreign_digest(pepper, sha256),
        organization=organization,
        shared_by=shared_by,
    )


def make_id(kind: str, name: str, at: datetime) -> UUID:
    """A UUIDv7 of that time whose other bits are a hash of what it is there, so that it is the same each time. Of a key
    `name` is its lookup part, which tells nobody what its hash was."""
    bits = int.from_bytes(hashlib.sha256(f"corral litellm {kind} {name}".encode()).digest()[:10]) & (
        (1 << 74) - 1
    )
    at_ms = max(0, int(at.timestamp() * 1000)) & ((1 << 48) - 1)
    high, low = bits >> 62, bits & ((1 << 62) - 1)
    return UUID(int=at_ms << 80 | 7 << 76 | high << 64 | 2 << 62 | low)


def existing(organization: str) -> Existing:
    """What is here; needs the operator role."""
    organizations = list(Organization.objects.values_list("id", "slug"))
    projects = list(Project.objects.values_list("id", "organization_id", "slug"))
    return Existing(
        organizations=frozenset(each for each, _ in organizations),
        projects=frozenset(each for each, _, _ in projects),
        lookups=dict(ApiKey.objects.filter(origin=ORIGIN).values_list("lookup", "id")),
        slugs=frozenset(slug for _, slug in organizations),
        project_slugs=frozenset((owner, slug) for _, owner, slug in projects),
        default=next((each for each, slug in organizations if slug == organization), None),
    )


def carry_out(plan: Plan, *, owner: User | None, is_dry: bool = False) -> None:
    """Make what is new. Raises InvalidInputError (nobody to own a new organization, a name that cannot be)."""
    with transaction.atomic():
        for organization in plan.organizations:
            if organization.fate is Fate.NEW:
                _make_organization(organization, owner)
        for project in plan.projects:
            if project.fate is Fate.NEW:
                _make_project(project)
        new = (key for key in plan.keys if key.fate is Fate.NEW)
        for organization_id, keys in groupby(sorted(new, key=_tenant), key=_tenant):
            _make_keys(organization_id, list(keys))
        if is_dry:
            transaction.set_rollback(True)
        else:
            invalidation.publish_after_commit("all")
    if not is_dry:
        log.info("litellm.imported", **{thing: dict(fates) for thing, fates in plan.counts().items()})


def _tenant(key: PlannedKey) -> UUID:
    return key.organization_id


def _make_organization(planned: PlannedOrganization, owner: User | None) -> None:
    if owner is None:
        raise InvalidInputError(
            f"--owner: name who owns the new organization {planned.name!r} by e-mail, or give --organization one that "
            "is there",
            field="owner",
        )
    made = Organization(
        id=planned.id,
        name=planned.name,
        slug=planned.slug,
        timezone=planned.timezone,
        **asdict(planned.limits),
    )
    with tenant(planned.id):
        insert(made, taken={"tenants_organization_slug_key": ("slug", f"the slug {planned.slug!r} is taken")})
        services.add_member(organization_id=planned.id, user=owner, role=Role.OWNER)
        _make_budgets(planned.id, planned.budgets)


def _make_project(planned: PlannedProject) -> None:
    made = Project(
        id=planned.id,
        organization_id=planned.organization_id,
        name=planned.name,
        slug=planned.slug,
        **asdict(planned.limits),
    )
    with tenant(planned.organization_id):
        insert(made, taken={"project_slug_unique": ("slug", f"the slug {planned.slug!r} is taken")})
        _make_budgets(planned.organization_id, planned.budgets, project_id=planned.id)


def _make_keys(organization_id: UUID, planned: list[PlannedKey]) -> None:
    now = timezone.now()
    with tenant(organization_id):
        rows = [_key_row(each, now) for each in planned]
        for row in rows:
            check_fields(row)
        ApiKey.objects.bulk_create(rows, batch_size=BATCH)
        for each in planned:
            _make_budgets(organization_id, each.budgets, api_key_id=each.id)


def _key_row(planned: PlannedKey, now: datetime) -> ApiKey:
    return ApiKey(
        id=planned.id,
        organization_id=planned.organization_id,
        project_id=planned.project_id,
        name=planned.name,
        lookup=planned.lookup,
        digest=planned.digest,
        last4=planned.last4,
        origin=ORIGIN,
        pepper=api_keys.pepper_id(settings.ENV.key_pepper),
        expires_at=planned.expires_at,
        revoked_at=now if planned.is_revoked else None,
        scopes=planned.scopes.as_json(),
        aliases=planned.aliases or None,
        tags=list(planned.tags) or None,
        **asdict(planned.limits),
    )


def _make_budgets(
    organization_id: UUID,
    planned: Iterable[PlannedBudget],
    project_id: UUID | None = None,
    api_key_id: UUID | None = None,
) -> None:
    for each in planned:
        made = Budget(
            organization_id=organization_id,
            project_id=project_id,
            api_key_id=api_key_id,
            name=each.name,
            limit_nano=each.limit_nano,
            period=each.period.value,
            rolling_hours=each.rolling_hours,
            hard=each.hard,
            model=each.model,
        )
        insert(made, taken={})
