"""Who buys tokens: organizations, their projects, members, service accounts and API keys, and the limits of each.

Fields, constraints and derived properties only; writes are in services.py, reads in selectors.py. Every table
with an organization has row-level security (rls.py): the app role sees the tenant of the transaction, no
other.
"""

from datetime import datetime
from typing import ClassVar
from zoneinfo import available_timezones

from django.contrib.auth.base_user import AbstractBaseUser, BaseUserManager
from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Lower, Now

from controlplane import ids
from controlplane.tenants.api_keys import LOOKUP_LENGTH
from controlplane.tenants.key_scopes import KeyScopes
from controlplane.tenants.limits import Limits


def check_timezone(name: str) -> None:
    """Refuse anything that is no IANA zone: calendar budgets are counted in the organization's zone."""
    if name not in available_timezones():
        raise ValidationError(f"unknown time zone {name!r}: use an IANA name such as Europe/Berlin")


class LimitColumns(models.Model):
    """The limits that a key, a project and an organization can each carry. NULL = no limit at this level.

    `weight` is no limit: what its carrier gets of a full queue, beside others of the same level.
    """

    weight = models.PositiveSmallIntegerField(
        default=100, db_default=100, help_text="share of the fair queue, 1-10000"
    )
    rpm = models.PositiveIntegerField(null=True, blank=True, help_text="requests per minute")
    input_tpm = models.PositiveIntegerField(null=True, blank=True, help_text="prompt tokens per minute")
    output_tpm = models.PositiveIntegerField(null=True, blank=True, help_text="completion tokens per minute")
    max_concurrency = models.PositiveIntegerField(null=True, blank=True, help_text="requests in flight")
    budget_nano = models.BigIntegerField(null=True, blank=True, help_text="money to spend, nano-dollars")

    class Meta:
        abstract = True
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=Q(budget_nano__isnull=True) | Q(budget_nano__gte=0),
                name="%(class)s_budget_not_negative",
            ),
            models.CheckConstraint(
                condition=Q(weight__gte=1, weight__lte=10_000), name="%(class)s_weight_in_range"
            ),
        ]

    @property
    def limits(self) -> Limits:
        return Limits(
            rpm=self.rpm,
            input_tpm=self.input_tpm,
            output_tpm=self.output_tpm,
            max_concurrency=self.max_concurrency,
            budget_nano=self.budget_nano,
        )


class UserManager(BaseUserManager["User"]):
    """Looks users up by e-mail without regard to case."""

    def get_by_natural_key(self, username: str | None) -> "User":
        return self.get(email=(username or "").strip().lower())


class User(AbstractBaseUser):
    """A person who signs in. Belongs to organizations through Member; has no rights of its own."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    email = models.EmailField(unique=True)
    name = models.CharField(max_length=120, blank=True)
    is_active = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)

    objects = UserManager()

    USERNAME_FIELD = "email"
    EMAIL_FIELD = "email"
    REQUIRED_FIELDS: ClassVar[list[str]] = []

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(email=Lower("email")), name="user_email_is_lower_case")
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.USER, self.id)


class Organization(LimitColumns):
    """The tenant: what is billed, limited, suspended and isolated."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    name = models.CharField(max_length=120)
    slug = models.SlugField(max_length=60, unique=True)
    timezone = models.CharField(max_length=64, default="UTC", validators=[check_timezone])
    suspended_at = models.DateTimeField(null=True, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta(LimitColumns.Meta):
        pass

    def __str__(self) -> str:
        return self.slug


class Project(LimitColumns):
    """A part of an organization with its own keys, deployments, share of the queue and limits."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="projects")
    name = models.CharField(max_length=120)
    slug = models.SlugField(max_length=60)
    zero_retention = models.BooleanField(
        default=False, help_text="request bodies and journals are deleted at the end of the request"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            *LimitColumns.Meta.constraints,
            models.UniqueConstraint(fields=["organization", "slug"], name="project_slug_unique"),
            # Target of the composite foreign keys that keep a row and its project in one tenant
            # (rls.SameTenant).
            models.UniqueConstraint(fields=["organization", "id"], name="project_tenant_unique"),
        ]

    def __str__(self) -> str:
        return self.slug


class Role(models.TextChoices):
    """What a member may do; rights.py says which role may do what."""

    OWNER = "owner"
    ADMIN = "admin"
    BILLING = "billing"
    DEVELOPER = "developer"
    VIEWER = "viewer"


class Member(models.Model):
    """A user's place in an organization."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="members")
    user = models.ForeignKey(User, on_delete=models.PROTECT, related_name="memberships")
    role = models.CharField(max_length=16, choices=Role.choices)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["user", "organization"], name="member_unique"),
            models.CheckConstraint(condition=Q(role__in=Role.values), name="member_role_known"),
        ]

    def __str__(self) -> str:
        return f"{ids.to_text(ids.Prefix.MEMBER, self.id)} ({self.role})"


class ApiKey(LimitColumns):
    """A secret that programs call /v1 with. Only its lookup part and a keyed digest are stored."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="api_keys")
    project = models.ForeignKey(
        Project, on_delete=models.PROTECT, related_name="api_keys", db_constraint=False
    )
    name = models.CharField(max_length=120)
    lookup = models.CharField(max_length=LOOKUP_LENGTH, unique=True, editable=False)
    digest = models.BinaryField(max_length=32, editable=False)
    pepper = models.CharField(
        max_length=8, db_default="", default="", editable=False, help_text="id of the one it is hashed under"
    )
    last4 = models.CharField(max_length=4, editable=False, help_text="last characters, to recognise a key by")
    created_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True)
    scopes = models.JSONField(
        null=True, blank=True, help_text="what it is bound to (key_scopes.py); null = nothing"
    )
    aliases = models.JSONField(
        null=True, blank=True, help_text="other names of models, for this key: {alias: name}"
    )
    tags = models.JSONField(null=True, blank=True, help_text="words to find it by")
    origin = models.CharField(
        max_length=16, default="", db_default="", blank=True, help_text="where it was made, if elsewhere"
    )

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            *LimitColumns.Meta.constraints,
            models.UniqueConstraint(fields=["organization", "id"], name="apikey_tenant_unique"),
            models.CheckConstraint(
                condition=Q(lookup__regex=r"^[0-9A-Za-z]{12}$"), name="apikey_lookup_shape"
            ),
            models.CheckConstraint(
                condition=Q(expires_at__isnull=True) | Q(expires_at__gt=F("created_at")),
                name="apikey_expires_later",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-created_at"], name="apikey_newest"),
            models.Index(fields=["digest"], name="apikey_digest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.API_KEY, self.id)

    @property
    def masked(self) -> str:
        """Enough of it to recognise it by. One made elsewhere has no lookup part that its owner knows."""
        beginning = "sk-" if self.origin else f"sk-crl-{self.lookup[:4]}"
        return f"{beginning}…{self.last4}"

    @property
    def bound_to(self) -> KeyScopes:
        return KeyScopes.from_json(self.scopes)

    def is_active(self, now: datetime) -> bool:
        """Whether the key itself is good at `now` (its organization may still be suspended)."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


class ServiceAccount(models.Model):
    """A program's place in an organization: it has a role and acts through its tokens, never signs in."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="service_accounts")
    name = models.CharField(max_length=120)
    role = models.CharField(max_length=16, choices=Role.choices)
    created_at = models.DateTimeField(auto_now_add=True)
    deleted_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization", "name"],
                condition=Q(deleted_at__isnull=True),
                name="serviceaccount_name_unique",
            ),
            models.UniqueConstraint(fields=["organization", "id"], name="serviceaccount_tenant_unique"),
            models.CheckConstraint(condition=Q(role__in=Role.values), name="serviceaccount_role_known"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.SERVICE_ACCOUNT, self.id)


class ManagementToken(models.Model):
    """A secret that programs call /api/v1 with, as a service account. No use on /v1. Kept as API keys are."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    service_account = models.ForeignKey(
        ServiceAccount, on_delete=models.PROTECT, related_name="tokens", db_constraint=False
    )
    name = models.CharField(max_length=120)
    scopes = models.JSONField(
        null=True, blank=True, help_text="permissions it is bound to; null = its role's"
    )
    lookup = models.CharField(max_length=LOOKUP_LENGTH, unique=True, editable=False)
    digest = models.BinaryField(max_length=32, editable=False)
    pepper = models.CharField(
        max_length=8, db_default="", default="", editable=False, help_text="id of the one it is hashed under"
    )
    last4 = models.CharField(max_length=4, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=Q(lookup__regex=r"^[0-9A-Za-z]{12}$"), name="managementtoken_lookup_shape"
            ),
            models.CheckConstraint(
                condition=Q(expires_at__isnull=True) | Q(expires_at__gt=F("created_at")),
                name="managementtoken_expires_later",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-created_at"], name="managementtoken_newest"),
            models.Index(fields=["digest"], name="managementtoken_digest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.MANAGEMENT_TOKEN, self.id)


class IdempotentWrite(models.Model):
    """The answer to a write that carried an Idempotency-Key, kept for a day so that it is given again.

    `body` is sealed under the caller's own token (api/idempotency.py): an answer may hold a new secret.
    """

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+")
    caller = models.UUIDField(help_text="the management token")
    key_digest = models.BinaryField(max_length=32, help_text="SHA-256 of the Idempotency-Key")
    fingerprint = models.BinaryField(max_length=32, help_text="SHA-256 of method, path and body")
    status = models.PositiveSmallIntegerField()
    body = models.BinaryField()
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["caller", "key_digest"], name="idempotentwrite_unique"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["created_at"], name="idempotentwrite_oldest"),
        ]

    def __str__(self) -> str:
        return str(self.id)


class Cell(models.Model):
    """A cell (one Redis with its gateways and machines) whose control worker has been here. The house's."""

    name = models.CharField(primary_key=True, max_length=32)
    created_at = models.DateTimeField(db_default=Now())
    seen_at = models.DateTimeField(db_default=Now())

    def __str__(self) -> str:
        return self.name


class CellLease(models.Model):
    """One cell's part of a tenant's limits, while there are several cells (leases.py).

    The row with scope `share` is a part per million of every rate and of concurrency at every level; the others are
    nano-dollars of the budget of one key, project or organization, counted from its beginning, or of a budget with a
    window (`scope_id` is its own), counted from the window's.
    """

    SHARE = "share"

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.CASCADE, related_name="+")
    cell = models.CharField(max_length=32)
    scope = models.CharField(max_length=8, help_text="share, key, prj or org")
    scope_id = models.UUIDField(help_text="of the key, project or organization")
    granted = models.BigIntegerField(default=0, help_text="parts per million, or nano-dollars")
    expires_at = models.DateTimeField()
    before = models.BigIntegerField(default=0, help_text="granted earlier, counts until before_until")
    before_until = models.DateTimeField()
    n_asked = models.BigIntegerField(default=0, help_text="requests counted in the cell, as last reported")
    demand = models.FloatField(default=0.0, help_text="requests per second, smoothed")
    reported_at = models.DateTimeField(null=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["scope", "scope_id", "cell"], name="celllease_unique"),
            models.CheckConstraint(condition=Q(granted__gte=0, before__gte=0), name="celllease_not_negative"),
            models.CheckConstraint(
                condition=Q(scope__in=["share", "key", "prj", "org"]), name="celllease_scope_known"
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "cell"], name="celllease_of_tenant"),
        ]

    def __str__(self) -> str:
        return f"{self.cell} {self.scope}:{self.scope_id.hex}"
