"""How people come into an organization, what it asks of how they sign in, and who vouches for them.

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
    revoke_keys_of_leavers = models.BooleanField(
        default=False,
        db_default=False,
        help_text="API keys of who is deactivated by SCIM are revoked with their place",
    )
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(condition=Q(default_role__in=Role.values), name="signinpolicy_role_known"),
        ]

    def __str__(self) -> str:
        return str(self.organization_id)


class Domain(models.Model):
    """A mail domain of an organization, verified by a DNS record. Of those who claim one, at most one holds it."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    name = models.CharField(max_length=253)
    token = models.CharField(max_length=64, editable=False, help_text="what its TXT record must say")
    created_at = models.DateTimeField(auto_now_add=True)
    verified_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.UniqueConstraint(fields=["organization", "name"], name="domain_claim_unique"),
            models.UniqueConstraint(
                fields=["name"], condition=Q(verified_at__isnull=False), name="domain_holder_unique"
            ),
            models.CheckConstraint(condition=Q(name=Lower("name")), name="domain_is_lower_case"),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.DOMAIN, self.id)


class ProviderKind(models.TextChoices):
    OIDC = "oidc"
    SAML = "saml"


class IdentityProvider(models.Model):
    """Who vouches for the people of an organization: an OpenID Connect issuer or a SAML identity provider."""

    id = models.UUIDField(primary_key=True, default=ids.new_id, editable=False)
    organization = models.ForeignKey(Organization, on_delete=models.PROTECT, related_name="+")
    kind = models.CharField(max_length=8, choices=ProviderKind.choices)
    name = models.CharField(max_length=40)
    is_enabled = models.BooleanField(default=True)
    issuer = models.CharField(max_length=500, help_text="OIDC: issuer URL; SAML: entity id")
    client_id = models.CharField(max_length=191, blank=True, help_text="OIDC only")
    secret = models.BinaryField(default=b"", editable=False, help_text="OIDC only; sealed (secretbox.py)")
    sso_url = models.CharField(max_length=500, blank=True, help_text="SAML only: where sign-ins are sent")
    certificate = models.TextField(blank=True, help_text="SAML only: base64 of what it signs with")
    next_certificate = models.TextField(
        blank=True,
        default="",
        db_default="",
        help_text="SAML only: of what it will sign with, accepted already",
    )
    groups_claim = models.CharField(
        max_length=200, default="groups", help_text="claim or attribute with groups"
    )
    created_at = models.DateTimeField(auto_now_add=True)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar[list[models.BaseConstraint]] = [
            models.CheckConstraint(
                condition=Q(kind__in=ProviderKind.values), name="identityprovider_kind_known"
            ),
        ]

    def __str__(self) -> str:
        return ids.to_text(ids.Prefix.IDENTITY_PROVIDER, self.id)
