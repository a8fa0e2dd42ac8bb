"""How people come into an organization, and what it asks of how they sign in.

Fields and constraints only; writes are in the module named after each table. Every table has an organization and
row-level security.
"""

from __future__ import annotations

from datetime import datetime
from typing import ClassVar

from django.db import models
from django.db.models import Q
from django.db.models.functions import Lower

from controlplane import ids
from controlplane.tenants.models import Organization, Role, User


class Invitation(models.Model):
    """A place in an organization, offered to whoever reads this mailbox. Only the token's SHA-256 is stored."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    email = models.EmailField()
    role = models.CharField(max_length=16, choices=Role.choices)
    digest = models.BinaryField(max_length=32, unique=True, editable=False)
    invited_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    created_at = models.DateTimeField(auto_now_add=True)
    expires_at = models.DateTimeField()
    sent_at = models.DateTimeField(null=True, blank=True)
    accepted_at = models.DateTimeField(null=True, blank=True)
    accepted_by = models.ForeignKey(User, null=True, on_delete=models.SET_NULL, related_name="+")
    revoked_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(
                fields=["organization", "email"],
                condition=Q(accepted_at__isnull=True, revoked_at__isnull=True),
                name="invitation_open_unique",
            ),
            models.CheckConstraint(condition=Q(email=Lower("email")), name="invitation_email_is_lower_case"),
            models.CheckConstraint(condition=Q(role__in=Role.values), name="invitation_role_known"),
            models.CheckConstraint(
                condition=Q(accepted_at__isnull=True) | Q(revoked_at__isnull=True),
                name="invitation_accepted_or_revoked",
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.INVITATION, self.id)

    def status(self, now: datetime) -> str:
        """open, accepted, revoked or expired."""
        if self.accepted_at is not None:
            return "accepted"
        if self.revoked_at is not None:
            return "revoked"
        return "open" if self.expires_at > now else "expired"


class SignInPolicy(models.Model):
    """What an organization asks of its members' sign-in, and what its identity provider's people become. No row: the
    defaults."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.OneToOneField(Organization, on_delete=models.PROTECT, related_name="+")
    require_mfa = models.BooleanField(default=False)
    require_sso = models.BooleanField(default=False)
    just_in_time = models.BooleanField(
        default=True, help_text="who signs in by its provider becomes a member, if they are none"
    )
    default_role = models.CharField(max_length=16, choices=Role.choices, default=Role.VIEWER)
    group_roles = models.JSONField(
        default=dict, blank=True, help_text="name of a group at the provider -> role; the highest counts"
    )
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(default_role__in=Role.values), name="signinpolicy_role_known"),
        ]

    def __str__(self) -> str:
        return str(self.organization_id)
