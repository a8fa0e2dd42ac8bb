"""Writes about tenants: users, organizations, members, projects, API keys and limits.

Every write runs in its tenant's transaction, leaves one log line, and tells the gateways after commit.
Surfaces decide who may call (rights.py). The `ensure_` functions may run twice; they are for set-up commands,
which run as operator, because only that role can find an organization by its slug.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from itertools import chain
from uuid import UUID

import structlog
from django.conf import settings
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.utils import timezone as clock

from controlplane import ids
from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.saving import check_fields, insert
from controlplane.tenants import api_keys as key_text
from controlplane.tenants import invalidation, selectors
from controlplane.tenants.context import tenant
from controlplane.tenants.key_scopes import NO_SCOPES, KeyScopes, check_aliases, check_tags
from controlplane.tenants.limits import NO_LIMITS, Limits
from controlplane.tenants.models import ApiKey, Member, Organization, Project, Role, User
from controlplane.webhooks.services import emit, key_data

log = structlog.get_logger("corral.tenants")


def create_user(*, email: str, password: str, name: str = "") -> User:
    """A person who can sign in. Raises InvalidInputError (weak password, bad address) or ConflictError."""
    user = User(email=email.strip().lower(), name=name)
    try:
        validate_password(password, user)
    except ValidationError as error:
        raise InvalidInputError(f"password: {' '.join(error.messages)}", field="password") from error
    user.set_password(password)
    insert(user, taken={"tenants_user_email_key": ("email", "a user with this e-mail address exists")})
    log.info("user.created", user=user.id.hex)
    return user


def ensure_user(*, email: str, password: str, name: str = "") -> User:
    """The user with this address; created if missing, otherwise given this password."""
    user = User.objects.filter(email=email.strip().lower()).first()
    if user is None:
        return create_user(email=email, password=password, name=name)
    if not user.check_password(password):
        user.set_password(password)
        user.save(update_fields=["password"])
        log.info("user.password_changed", user=user.id.hex)
    return user


def create_organization(
    *,
    name: str,
    slug: str,
    owner: User,
    timezone: str = "UTC",
    weight: int = 100,
    limits: Limits = NO_LIMITS,
) -> Organization:
    """A new tenant with its first member. Raises InvalidInputError or ConflictError (slug)."""
    _check_limits(limits)
    _check_weight(weight)
    organization = Organization(
        id=ids.new_id(), name=name, slug=slug, timezone=timezone, weight=weight, **asdict(limits)
    )
    with tenant(organization.id):
        insert(
            organization,
            taken={"tenants_organization_slug_key": ("slug", f"the slug {slug!r} is taken: choose another")},
        )
        add_member(organization_id=organization.id, user=owner, role=Role.OWNER)
    log.info("organization.created", organization=organization.id.hex)
    return organization


def ensure_organization(*, name: str, slug: str, owner: User) -> Organization:
    """The organization with this slug, with `owner` among its members. Needs the operator role."""
    organization = Organization.objects.filter(slug=slug).first()
    if organization is None:
        return create_organization(name=name, slug=slug, owner=owner)
    with tenant(organization.id):
        if not Member.objects.filter(organization_id=organization.id, user=owner).exists():
            add_member(organization_id=organization.id, user=owner, role=Role.OWNER)
    return organization


def update_organization(
    *,
    organization_id: UUID,
    name: str | None = None,
    timezone: str | None = None,
    weight: int | None = None,
) -> Organization:
    """Change what is given. Raises InvalidInputError."""
    with tenant(organization_id):
        organization = selectors.organization(organization_id=organization_id)
        _change(organization, name=name, timezone=timezone, weight=weight)
        invalidation.publish_after_commit(invalidation.organization_ref(organization_id))
    return organization


def suspend_organization(*, organization_id: UUID, suspended: bool) -> Organization:
    """Stop (or allow again) everything the organization's keys do; lifecycle/suspension.py does the rest.

    Running requests end as they would.
    """
    with tenant(organization_id):
        organization = selectors.organization(organization_id=organization_id)
        if suspended:
            organization.suspended_at = organization.suspended_at or clock.now()
        else:
            organization.suspended_at = None
        organization.save(update_fields=["suspended_at", "updated_at"])
        invalidation.publish_after_commit(invalidation.organization_ref(organization_id))
    log.info("organization.suspended", organization=organization_id.hex, suspended=suspended)
    return organization


def add_member(*, organization_id: UUID, user: User, role: Role) -> Member:
    """Give a user a place in the organization. Raises ConflictError if the user has one."""
    member = Member(organization_id=organization_id, user=user, role=role)
    with tenant(organization_id):
        insert(member, taken={"member_unique": ("user", "this user is a member already")})
    log.info("member.added", organization=organization_id.hex, user=user.id.hex, role=role)
    return member


def create_project(
    *,
    organization_id: UUID,
    name: str,
    slug: str,
    weight: int = 100,
    zero_retention: bool = False,
    limits: Limits = NO_LIMITS,
) -> Project:
    """A new project. Raises InvalidInputError or ConflictError (slug)."""
    _check_limits(limits)
    _check_weight(weight)
    project = Project(
        organization_id=organization_id,
        name=name,
        slug=slug,
        weight=weight,
        zero_retention=zero_retention,
        **asdict(limits),
    )
    with tenant(organization_id):
        insert(
            project,
            taken={"project_slug_unique": ("slug", f"the organization has a project {slug!r} already")},
        )
    log.info("project.created", organization=organization_id.hex, project=project.id.hex)
    return project


def update_project(
    *,
    organization_id: UUID,
    project_id: UUID,
    name: str | None = None,
    weight: int | None = None,
    zero_retention: bool | None = None,
) -> Project:
    """Change what is given. Raises NotFoundError, InvalidInputError."""
    with tenant(organization_id):
        project = selectors.project(organization_id=organization_id, project_id=project_id)
        _change(project, name=name, weight=weight, zero_retention=zero_retention)
        invalidation.publish_after_commit(invalidation.project_ref(project_id))
    return project


def ensure_project(*, organization_id: UUID, name: str, slug: str) -> Project:
    """The project with this slug; created if missing."""
    with tenant(organization_id):
        project = Project.objects.filter(organization_id=organization_id, slug=slug).first()
        return project or create_project(organization_id=organization_id, name=name, slug=slug)


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
    _check_limits(limits)
    _check_weight(weight)
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


def set_organization_limits(*, organization_id: UUID, limits: Limits) -> None:
    """Replace all five limits of the organization."""
    _check_limits(limits)
    with tenant(organization_id):
        _set_limits(selectors.organization(organization_id=organization_id), limits)
        invalidation.publish_after_commit(invalidation.organization_ref(organization_id))


def set_project_limits(*, organization_id: UUID, project_id: UUID, limits: Limits) -> None:
    """Replace all five limits of a project. Raises NotFoundError."""
    _check_limits(limits)
    with tenant(organization_id):
        _set_limits(selectors.project(organization_id=organization_id, project_id=project_id), limits)
        invalidation.publish_after_commit(invalidation.project_ref(project_id))


def set_api_key_limits(*, organization_id: UUID, key_id: UUID, limits: Limits) -> None:
    """Replace all five limits of a key. Raises NotFoundError."""
    _check_limits(limits)
    with tenant(organization_id):
        key = selectors.api_key(organization_id=organization_id, key_id=key_id)
        _set_limits(key, limits)
        invalidation.publish_after_commit(invalidation.key_ref(key.lookup))


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


def set_weight(
    *, organization_id: UUID, weight: int, project_id: UUID | None = None, key_id: UUID | None = None
) -> None:
    """What an organization, one of its projects or one of its keys gets of a full queue, beside others of the
    same level (100 = ordinary). Raises NotFoundError, InvalidInputError (weight, or both ids).
    """
    _check_weight(weight)
    if project_id is not None and key_id is not None:
        raise InvalidInputError("project_id and key_id: name one of them, or none", field="key_id")
    with tenant(organization_id):
        row: Organization | Project | ApiKey
        if key_id is not None:
            row = selectors.api_key(organization_id=organization_id, key_id=key_id)
            ref = invalidation.key_ref(row.lookup)
        elif project_id is not None:
            row = selectors.project(organization_id=organization_id, project_id=project_id)
            ref = invalidation.project_ref(project_id)
        else:
            row = selectors.organization(organization_id=organization_id)
            ref = invalidation.organization_ref(organization_id)
        row.weight = weight
        row.save(update_fields=["weight", *(["updated_at"] if hasattr(row, "updated_at") else [])])
        invalidation.publish_after_commit(ref)


def change_role(*, organization_id: UUID, member_id: UUID, role: Role) -> Member:
    """Another role for a member. Raises NotFoundError, or InvalidInputError for the last owner."""
    with tenant(organization_id):
        member = _locked_member(organization_id, member_id, leaves_owners=role != Role.OWNER)
        member.role = role
        member.save(update_fields=["role"])
    log.info("member.changed", organization=organization_id.hex, user=member.user_id.hex, role=role)
    return member


def remove_member(*, organization_id: UUID, member_id: UUID) -> None:
    """Take a user's place away. Raises NotFoundError, or InvalidInputError for the last owner."""
    with tenant(organization_id):
        member = _locked_member(organization_id, member_id, leaves_owners=True)
        member.delete()
    log.info("member.removed", organization=organization_id.hex, user=member.user_id.hex)


def _locked_member(organization_id: UUID, member_id: UUID, *, leaves_owners: bool) -> Member:
    """The member, with all owners locked: of two who leave at once neither may think that the other stays."""
    owners = list(Member.objects.select_for_update().filter(organization_id=organization_id, role=Role.OWNER))
    member = Member.objects.filter(organization_id=organization_id, id=member_id).first()
    if member is None:
        raise NotFoundError("no such member", field="member")
    if leaves_owners and [owner.id for owner in owners] == [member_id]:
        raise InvalidInputError("the last owner cannot leave: make somebody else owner first", field="member")
    return member


def _change(row: Organization | Project, **values: object) -> None:
    """Set what is not None, by the fields' own rules."""
    given = {name: value for name, value in values.items() if value is not None}
    if isinstance(weight := given.get("weight"), int):
        _check_weight(weight)
    for name, value in given.items():
        setattr(row, name, value)
    check_fields(row)
    row.save(update_fields=[*given, "updated_at"])


def _set_limits(row: Organization | Project | ApiKey, limits: Limits) -> None:
    values = asdict(limits)
    for name, value in values.items():
        setattr(row, name, value)
    check_fields(row)
    row.save(update_fields=[*values, *(["updated_at"] if hasattr(row, "updated_at") else [])])


def _check_limits(limits: Limits) -> None:
    for field, message in limits.problems():
        raise InvalidInputError(message, field=field)


def _check_problems(*found: Iterable[tuple[str, str]]) -> None:
    for field, message in chain(*found):
        raise InvalidInputError(f"{field}: {message}", field=field)


def _check_weight(weight: int) -> None:
    if not 1 <= weight <= 10_000:
        raise InvalidInputError(f"weight={weight}: must be from 1 to 10000", field="weight")
