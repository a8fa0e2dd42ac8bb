"""How a session was signed in, and which organizations that is good enough for.

Read by TenantMiddleware on every request from the session alone, without a query. A session that an identity provider
vouched for reaches the provider's organization and no other, whatever else the person belongs to: otherwise the
administrators of one organization could walk into another.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

from controlplane.tenants.models import Role
from controlplane.tenants.selectors import Membership

# Set by identity.adapters.AccountAdapter.post_login; hex.
VOUCHED_BY: Final = "identity_organization"
# Kept by allauth: one entry per method that was used.
METHODS: Final = "account_authentication_methods"


class Missing(StrEnum):
    """What a session lacks to act under a membership."""

    SSO = "sso"
    MFA = "mfa"


def vouched_by(session: Mapping[str, Any]) -> UUID | None:
    """The organization whose identity provider signed this session in; None for a password."""
    value = session.get(VOUCHED_BY)
    return UUID(hex=value) if value else None


def used_mfa(session: Mapping[str, Any]) -> bool:
    return any(entry.get("method") == "mfa" for entry in session.get(METHODS, ()))


def reachable(memberships: tuple[Membership, ...], session: Mapping[str, Any]) -> tuple[Membership, ...]:
    """The memberships that this session may act under, or could after what `missing` says."""
    organization_id = vouched_by(session)
    if organization_id is None:
        return memberships
    return tuple(each for each in memberships if each.organization_id == organization_id)


def missing(membership: Membership, session: Mapping[str, Any]) -> Missing | None:
    """What has to happen first, if anything. How a provider asks for a second factor is its organization's affair.

    Owners may come in with password and second factor where single sign-on is required: a provider that is down or
    set up wrongly must not lock out who can repair it.
    """
    if vouched_by(session) == membership.organization_id:
        return None
    if membership.require_sso and membership.role != Role.OWNER:
        return Missing.SSO
    if (membership.require_mfa or membership.require_sso) and not used_mfa(session):
        return Missing.MFA
    return None
