"""Writes about tenants: users, organizations, members and projects. Of API keys: key_services.py; of limits and
weights: limit_services.py.

Every write runs in its tenant's transaction, leaves one log line, and tells the gateways after commit.
Surfaces decide who may call (rights.py). The `ensure_` functions may run twice; they are for set-up commands,
which run as operator, because only that role can find an organization by its slug.
"""

from dataclasses import asdict
from uuid import UUID

import structlog
from django.contrib.auth.password_validation import validate_password
from django.core.exceptions import ValidationError
from django.utils import timezone as clock

from controlplane import ids
from controlplane.errors import InvalidInputError, NotFoundError
from controlplane.saving import check_fields, insert
from controlplane.tenants import invalidation, selectors
from controlplane.tenants.context import tenant
from controlplane.tenants.limit_services import check_limits, check_weight
from controlplane.tenants.limits import NO_LIMITS, Limits
from controlplane.tenants.models import Member, Organization, Project, Role, User

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
    check_limits(limits)
    check_weight(weight)
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
    check_limits(limits)
    check_weight(weight)
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
        check_weight(weight)
    for name, value in given.items():
        setattr(row, name, value)
    check_fields(row)
    row.save(update_fields=[*given, "updated_at"])
