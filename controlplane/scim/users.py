"""People by the word of their directory: entries made, changed, deactivated, deleted.

Called by the SCIM endpoints inside the tenant. A directory speaks for addresses in domains that its organization has
proven, as its identity provider does. Whoever holds a SCIM token must not get into accounts by it: an account's
address, where its password is reset to, follows only where the account can do nothing that the directory could not let
a new one do (`_may_move`); its name follows where no other organization knows the person.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

import structlog
from allauth.account.internal.emailkit import valid_email_or_none
from django.utils import timezone as clock

from controlplane.errors import ConflictError, InvalidInputError
from controlplane.identity import domains
from controlplane.saving import insert, update
from controlplane.scim import places, selectors
from controlplane.scim.models import ScimGroup, ScimMembership, ScimUser
from controlplane.scim.tokens import roles_it_can_give
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Member, Role, User
from controlplane.tenants.selectors import memberships_of

log = structlog.get_logger("corral.scim")

MAX_USERS: Final = 20_000  # of one organization, deactivated ones included
_TAKEN: Final = {
    "scimuser_name_unique": ("userName", "userName: there is a user with this name already"),
    "scimuser_user_unique": ("emails", "emails: another user of this directory has this address"),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the directory says of a person."""

    user_name: str
    email: str
    external_id: str = ""
    given_name: str = ""
    family_name: str = ""
    display_name: str = ""
    is_active: bool = True

    @property
    def full_name(self) -> str:
        """As the console shows it."""
        name = self.display_name or f"{self.given_name} {self.family_name}"
        return " ".join(name.split())[:120]


def facts_of(row: ScimUser) -> Facts:
    return Facts(
        user_name=row.user_name,
        email=row.email,
        external_id=row.external_id,
        given_name=row.given_name,
        family_name=row.family_name,
        display_name=row.display_name,
        is_active=row.is_active,
    )


def create_user(*, organization_id: UUID, facts: Facts) -> ScimUser:
    """A new entry, and a place for the person, if they are active; if not, none.

    Raises InvalidInputError (no address, a domain that is not proven, too many) or ConflictError (name, address, the
    last owner).
    """
    with tenant(organization_id):
        email = _address(organization_id, facts.email)
        if ScimUser.objects.filter(organization_id=organization_id).count() >= MAX_USERS:
            raise InvalidInputError(f"there are {MAX_USERS} users already: delete some", field="userName")
        row = ScimUser(organization_id=organization_id, user=_account(email, facts), updated_at=clock.now())
        _set(row, facts, email)
        insert(row, taken=_TAKEN)
        if row.is_active:
            places.let_in(row)
        else:
            places.put_out(row)
    log.info("scim_user.created", organization=organization_id.hex, scim_user=row.id.hex)
    return row


def change_user(*, organization_id: UUID, scim_user_id: UUID, facts: Facts) -> ScimUser:
    """The entry as `facts` say, and the place with it where `is_active` changed. Nothing is written where nothing did.

    Raises NotFoundError, InvalidInputError, ConflictError (name or address taken; the last owner stays).
    """
    with tenant(organization_id):
        row = selectors.user(organization_id=organization_id, scim_user_id=scim_user_id, is_locked=True)
        before, facts = facts_of(row), replace(facts, email=facts.email.strip().lower())
        if facts == before:
            return row
        is_back = facts.is_active and not before.is_active
        email = before.email
        if is_back or facts.email != email:  # a domain that was given up meanwhile lets nobody back in
            email = _address(organization_id, facts.email)
        _set(row, facts, email)
        row.updated_at = clock.now()
        update(row, taken=_TAKEN)
        _follow(row, before, facts)
        if is_back:
            places.let_in(row)
        elif before.is_active and not row.is_active:
            places.put_out(row)
    log.info("scim_user.changed", organization=organization_id.hex, scim_user=row.id.hex)
    return row


def delete_user(*, organization_id: UUID, scim_user_id: UUID) -> None:
    """Forget the entry; the person's place goes, their account stays.

    Raises NotFoundError, or ConflictError for the last owner.
    """
    with tenant(organization_id):
        row = selectors.user(organization_id=organization_id, scim_user_id=scim_user_id, is_locked=True)
        places.put_out(row)
        groups = list(row.memberships.order_by("group_id").values_list("group_id", flat=True))
        ScimMembership.objects.filter(organization_id=organization_id, user=row).delete()
        ScimGroup.objects.filter(organization_id=organization_id, id__in=groups).update(
            updated_at=clock.now()
        )
        row.delete()
    log.info("scim_user.deleted", organization=organization_id.hex, scim_user=scim_user_id.hex)


def _address(organization_id: UUID, text: str) -> str:
    email: str = (valid_email_or_none(text.strip()) or "").lower()
    if not email:
        raise InvalidInputError(
            "emails: no e-mail address: send a primary or work address, or one as userName", field="emails"
        )
    if not domains.is_verified(organization_id=organization_id, email=email):
        raise InvalidInputError(
            f"emails: this organization has not proven the domain {domains.of_address(email)}: prove it, or leave "
            "this person out of the provisioning",
            field="emails",
        )
    return email


def _account(email: str, facts: Facts) -> User:
    """The account with this address, or a new one without a password."""
    user = User.objects.filter(email=email).first()
    if user is None:
        user = User(email=email, name=facts.full_name)
        user.set_unusable_password()
        insert(user, taken={"tenants_user_email_key": ("emails", "emails: this address is taken")})
        log.info("user.created", user=user.id.hex)
    elif not user.is_active:
        raise ConflictError("emails: the account with this address is disabled", field="emails")
    return user


def _set(row: ScimUser, facts: Facts, email: str) -> None:
    row.user_name, row.email, row.external_id = facts.user_name, email, facts.external_id
    row.given_name, row.family_name = facts.given_name, facts.family_name
    row.display_name, row.is_active = facts.display_name, facts.is_active


def _follow(row: ScimUser, before: Facts, facts: Facts) -> None:
    """Address and name of the account, where they changed."""
    user, was = row.user, (row.user.email, row.user.name)
    if user.email == before.email != row.email and _may_move(row):
        user.email = row.email
    if facts.full_name and not _is_known_elsewhere(row):
        user.name = facts.full_name
    if (user.email, user.name) == was:
        return
    update(user, taken={"tenants_user_email_key": ("emails", "emails: another account has this address")})


def _may_move(row: ScimUser) -> bool:
    """Whether the account may get another address: nobody signs in to it by password, it reaches no other organization,
    and its role here is one that the directory can give."""
    if row.user.has_usable_password() or _is_known_elsewhere(row):
        return False
    member = Member.objects.filter(organization_id=row.organization_id, user_id=row.user_id).first()
    return member is None or Role(member.role) in roles_it_can_give(organization_id=row.organization_id)


def _is_known_elsewhere(row: ScimUser) -> bool:
    return any(each.organization_id != row.organization_id for each in memberships_of(user_id=row.user_id))
