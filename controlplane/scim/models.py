"""What an organization's directory (Entra, Okta, …) says of its people and groups, and the tokens it says it with.

Fields and constraints only; writes are in users.py, groups.py and tokens.py. A ScimUser is the directory's entry about
a person; the person's account is a User, their place in the organization a Member. Both outlive each other: who was
deactivated keeps the entry and has no place.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Lower

from controlplane import ids
from controlplane.tenants.api_keys import LOOKUP_LENGTH
from controlplane.tenants.models import Organization, User


class ScimToken(models.Model):
    """A secret that a directory calls /scim/v2 with; of no use anywhere else. Kept as API keys are."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    name = models.CharField(max_length=120)
    lookup = models.CharField(max_length=LOOKUP_LENGTH, unique=True, editable=False)
    digest = models.BinaryField(max_length=32, editable=False)
    pepper = models.CharField(max_length=8, editable=False, help_text="id of the one it is hashed under")
    last4 = models.CharField(max_length=4, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField(null=True, blank=True)
    revoked_at = models.DateTimeField(null=True, blank=True)
    last_used_at = models.DateTimeField(null=True, blank=True, help_text="to the minute")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=Q(lookup__regex=r"^[0-9A-Za-z]{12}$"), name="scimtoken_lookup_shape"
            ),
            models.CheckConstraint(
                condition=Q(expires_at__isnull=True) | Q(expires_at__gt=F("created_at")),
                name="scimtoken_expires_later",
            ),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "-created_at"], name="scimtoken_newest"),
            models.Index(fields=["digest"], name="scimtoken_digest"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.SCIM_TOKEN, self.id)

    def is_active(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


class ScimUser(models.Model):
    """The directory's entry about a person. `is_active` is what it says; Member is what is."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    user = models.ForeignKey(User, on_delete=models.PROTECT, related_name="+")
    user_name = models.CharField(max_length=254)
    external_id = models.CharField(max_length=254, blank=True, help_text="the directory's own id")
    email = models.EmailField()
    given_name = models.CharField(max_length=120, blank=True)
    family_name = models.CharField(max_length=120, blank=True)
    display_name = models.CharField(max_length=254, blank=True)
    is_active = models.BooleanField(default=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(help_text="also of its groups; its version is made of it")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint("organization", Lower("user_name"), name="scimuser_name_unique"),
            models.UniqueConstraint(fields=["organization", "user"], name="scimuser_user_unique"),
            models.UniqueConstraint(fields=["organization", "id"], name="scimuser_tenant_unique"),
            models.CheckConstraint(condition=Q(email=Lower("email")), name="scimuser_email_is_lower_case"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "external_id"], name="scimuser_external"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.SCIM_USER, self.id)


class ScimGroup(models.Model):
    """A group of the directory. The sign-in policy's `group_roles` say which role its name or external id gives."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    display_name = models.CharField(max_length=254)
    external_id = models.CharField(max_length=254, blank=True)
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(help_text="also of its members; its version is made of it")

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint("organization", Lower("display_name"), name="scimgroup_name_unique"),
            models.UniqueConstraint(fields=["organization", "id"], name="scimgroup_tenant_unique"),
        ]
        indexes: ClassVar[list[models.Index]] = [
            models.Index(fields=["organization", "external_id"], name="scimgroup_external"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.SCIM_GROUP, self.id)


class ScimMembership(models.Model):
    """That a user is in a group."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    group = models.ForeignKey(
        ScimGroup, on_delete=models.CASCADE, related_name="memberships", db_constraint=False
    )
    user = models.ForeignKey(
        ScimUser, on_delete=models.CASCADE, related_name="memberships", db_constraint=False
    )

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["group", "user"], name="scimmembership_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.user_id} in {self.group_id}"
