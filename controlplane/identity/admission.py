"""Who is let into an organization on its identity provider's word, and as what.

Called by vouching.py with claims whose signature was checked. A provider's word counts for addresses in domains that
its organization has proven, and for that organization alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import structlog
from allauth.account.internal.emailkit import valid_email_or_none
from allauth.socialaccount.models import SocialAccount

from controlplane.errors import InvalidInputError, NotPermittedError
from controlplane.identity import domains, invitations, policies
from controlplane.identity.models import IdentityProvider, SignInPolicy
from controlplane.saving import insert
from controlplane.scim import selectors as directory
from controlplane.tenants import services
from controlplane.tenants.actor import act_as
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role, User

log = structlog.get_logger("corral.identity")


@dataclass(frozen=True, slots=True)
class Claims:
    """What the provider says of who signs in. `groups` None: it says nothing about groups."""

    subject: str
    email: str
    is_email_refuted: bool  # it says itself that the address is not verified
    name: str
    groups: frozenset[str] | None


def admit(provider: IdentityProvider, claims: Claims) -> User:
    """The user that the claims are about, a member now. Raises NotPermittedError saying why not."""
    email = (valid_email_or_none(claims.email) or "").lower()
    if not email:
        raise NotPermittedError("the identity provider sent no e-mail address: let it send the claim email")
    if claims.is_email_refuted:
        raise NotPermittedError("the identity provider says that this e-mail address is not verified")
    organization_id = provider.organization_id
    with tenant(organization_id):
        known = SocialAccount.objects.filter(provider=str(provider), uid=claims.subject).first()
        address = known.user.email if known is not None else email
        for each in {email, address}:
            if not domains.is_verified(organization_id=organization_id, email=each):
                raise NotPermittedError(
                    f"this organization has not proven the domain {domains.of_address(each)}: "
                    "its identity provider cannot vouch for it"
                )
        user = known.user if known is not None else _by_address(email, claims.name)
        if not user.is_active:
            raise NotPermittedError("this account is disabled")
        if directory.is_deactivated(
            organization_id=organization_id, user_id=user.id, emails={email, address}
        ):
            raise NotPermittedError(
                "your organization's directory has deactivated you: ask its administrators"
            )
        act_as(str(user))
        _be_member(provider, user, claims)
        if known is None:
            SocialAccount.objects.create(user=user, provider=str(provider), uid=claims.subject)
    log.info("user.vouched", organization=organization_id.hex, user=user.id.hex, provider=provider.id.hex)
    return user


def role_by_groups(policy: SignInPolicy, groups: Collection[str]) -> Role | None:
    """The highest role among the groups' (owner first); None where the organization maps no groups."""
    mapping: Mapping[str, str] = policy.group_roles
    if not mapping:
        return None
    found = {mapping[each] for each in groups if each in mapping}
    return next((role for role in Role if role in found), Role(policy.default_role))


def set_role(*, member: Member, role: Role, policy: SignInPolicy) -> None:
    """Give a member the role that its groups say. Owners who were made by hand stay, and so does the last one."""
    if member.role == role:
        return
    if member.role == Role.OWNER and Role.OWNER not in policy.group_roles.values():
        return
    try:
        services.change_role(organization_id=member.organization_id, member_id=member.id, role=role)
    except InvalidInputError:  # the last owner
        log.warning("member.kept", organization=member.organization_id.hex, member=member.id.hex)


def _by_address(email: str, name: str) -> User:
    """The account with this address, or a new one without a password."""
    user = User.objects.filter(email=email).first()
    if user is not None:
        return user
    user = User(email=email, name=" ".join(name.split())[:120])
    user.set_unusable_password()
    insert(user, taken={"tenants_user_email_key": ("email", "a user with this e-mail address exists")})
    log.info("user.created", user=user.id.hex)
    return user


def _be_member(provider: IdentityProvider, user: User, claims: Claims) -> None:
    organization_id = provider.organization_id
    policy = policies.policy(organization_id=organization_id)
    by_groups = None if claims.groups is None else role_by_groups(policy, claims.groups)
    member = Member.objects.filter(organization_id=organization_id, user=user).first()
    if member is not None:
        if by_groups is not None:
            set_role(member=member, role=by_groups, policy=policy)
        return
    invited = invitations.take_open(organization_id=organization_id, user=user)
    if invited is None and not policy.just_in_time:
        raise NotPermittedError("you are no member of this organization: ask an owner or admin to invite you")
    role = by_groups or invited or Role(policy.default_role)
    services.add_member(organization_id=organization_id, user=user, role=role)
