"""What SCIM clients read and write: users and groups as scim2-models declares them, cut down to what we keep.

/Schemas shows these classes, so that it promises no attribute that would be lost. What a client sends beyond them is
left aside (RFC 7644, 3.3: a server may ignore what it does not know); directories send whole profiles.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any, Final
from uuid import UUID

from django.conf import settings
from pydantic import Field, ValidationError
from scim2_models import (
    URN,
    AuthenticationScheme,
    Bulk,
    CaseExact,
    ChangePassword,
    ComplexAttribute,
    Context,
    ETag,
    Filter,
    GroupMembership,
    Meta,
    Mutability,
    Patch,
    Reference,
    Required,
    Resource,
    ResourceType,
    Schema,
    ServiceProviderConfig,
    Sort,
    Uniqueness,
)

from controlplane import ids
from controlplane.api.scim.errors import ScimError
from controlplane.errors import NotFoundError
from controlplane.scim.models import ScimGroup, ScimUser
from controlplane.scim.users import Facts

MAX_RESULTS: Final = 200
MAX_GROUPS_WITH_MEMBERS: Final = 50  # on a page: every one may have thousands
USER_SCHEMA: Final = "urn:ietf:params:scim:schemas:core:2.0:User"
GROUP_SCHEMA: Final = "urn:ietf:params:scim:schemas:core:2.0:Group"


class Name(ComplexAttribute):
    """The components of the user's name."""

    family_name: Annotated[str | None, Field(max_length=120)] = None
    """The family name."""

    given_name: Annotated[str | None, Field(max_length=120)] = None
    """The given name."""


class Email(ComplexAttribute):
    """An e-mail address. One is kept: the primary one, else the one at work, else the first."""

    value: Annotated[str | None, Field(max_length=254)] = None
    """The address. Its domain must be one that the organization has proven."""

    type: str | None = None
    """Always "work"."""

    primary: bool | None = None
    """Always true."""


class User(Resource[Any]):
    """A person in the organization."""

    __schema__ = URN(USER_SCHEMA)

    user_name: Annotated[
        str | None, Required.true, Uniqueness.server, Field(min_length=1, max_length=254)
    ] = None
    """The directory's name of the user; their e-mail address, where no other is sent."""

    external_id: Annotated[str | None, CaseExact.true, Field(max_length=254)] = None
    """The directory's own id."""

    name: Name | None = None
    """The components of the user's name."""

    display_name: Annotated[str | None, Field(max_length=254)] = None
    """The name as people see it."""

    active: bool | None = None
    """False: the user is no member of the organization any more."""

    emails: list[Email] | None = None
    """The user's e-mail address."""

    groups: Annotated[list[GroupMembership] | None, Mutability.read_only] = None
    """The groups that the user is in."""


class Member(ComplexAttribute):
    """A user in a group."""

    value: Annotated[str | None, Mutability.immutable, CaseExact.true] = None
    """The id of the user."""

    ref: Annotated[Reference[User] | None, Mutability.immutable] = Field(None, serialization_alias="$ref")
    """Where the user is."""


class Group(Resource[Any]):
    """A group of users. The sign-in policy says which role it gives."""

    __schema__ = URN(GROUP_SCHEMA)

    display_name: Annotated[
        str | None, Required.true, Uniqueness.server, Field(min_length=1, max_length=254)
    ] = None
    """The name of the group."""

    external_id: Annotated[str | None, CaseExact.true, Field(max_length=254)] = None
    """The directory's own id."""

    members: list[Member] | None = None
    """The users in it."""


def location(path: str) -> str:
    return f"{settings.ENV.console_url.rstrip('/')}/scim/v2/{path}"


def user_id(text: str) -> UUID:
    return _id(ids.Prefix.SCIM_USER, text, "user")


def group_id(text: str) -> UUID:
    return _id(ids.Prefix.SCIM_GROUP, text, "group")


def version(row: ScimUser | ScimGroup) -> str:
    """A weak tag: equal for what means the same."""
    return f'W/"{int(row.updated_at.timestamp() * 1_000_000):x}"'


def user_out(row: ScimUser, groups: Iterable[ScimGroup]) -> User:
    return User(
        id=str(row),
        external_id=row.external_id or None,
        meta=_meta(row, "User"),
        user_name=row.user_name,
        name=Name(given_name=row.given_name or None, family_name=row.family_name or None)
        if row.given_name or row.family_name
        else None,
        display_name=row.display_name or None,
        active=row.is_active,
        emails=[Email(value=row.email, type="work", primary=True)],
        groups=[
            GroupMembership(
                value=str(each),
                ref=Reference(location(f"Groups/{each}")),
                display=each.display_name,
                type="direct",
            )
            for each in groups
        ]
        or None,
    )


def group_out(row: ScimGroup, members: Collection[UUID] | None) -> Group:
    """`members`: ids of users; None: they were not asked for."""
    found = [ids.to_text(ids.Prefix.SCIM_USER, each) for each in members or ()]
    return Group(
        id=str(row),
        external_id=row.external_id or None,
        meta=_meta(row, "Group"),
        display_name=row.display_name,
        members=[Member(value=each, ref=Reference(location(f"Users/{each}"))) for each in found] or None,
    )


def user_in(payload: Mapping[str, Any], present: Facts | None = None) -> Facts:
    """The facts of a POST, or of a PUT over `present`. Raises ScimError naming the attribute."""
    sent = _read(User, payload)
    was_active, was_email = (True, "") if present is None else (present.is_active, present.email)
    user_name = (sent.user_name or "").strip()
    name = sent.name or Name()
    return Facts(
        user_name=user_name,
        email=chosen_email(sent.emails or []) or (user_name if "@" in user_name else was_email),
        external_id=sent.external_id or "",
        given_name=(name.given_name or "").strip(),
        family_name=(name.family_name or "").strip(),
        display_name=(sent.display_name or "").strip(),
        is_active=was_active if sent.active is None else sent.active,
    )


def group_in(payload: Mapping[str, Any]) -> tuple[str, str, frozenset[UUID] | None]:
    """Name, external id and members of a POST or PUT. Raises ScimError naming the attribute.

    Members None: not spoken of. Who renames a group by a PUT without them does not mean to empty it.
    """
    sent = _read(Group, payload)
    members = next((value for key, value in payload.items() if key.lower() == "members"), None)
    ids_of = None if members is None else member_ids(members)
    return (sent.display_name or "").strip(), sent.external_id or "", ids_of


def member_ids(value: Any) -> frozenset[UUID]:
    """Of what stands under `members`: a list of {"value": id}, one of them, or ids alone. Raises ScimError."""
    found = set()
    for each in value if isinstance(value, list) else [] if value is None else [value]:
        text = each.get("value") if isinstance(each, dict) else each
        if isinstance(each, dict) and str(each.get("type", "User")).lower() == "group":
            raise ScimError("invalidValue", "members: groups in groups are not kept: send their users")
        try:
            found.add(user_id(text if isinstance(text, str) else ""))
        except NotFoundError as error:
            raise ScimError("invalidValue", f"members: there is no user {str(text)[:60]!r}") from error
    return frozenset(found)


def chosen_email(emails: Iterable[Email]) -> str:
    """The primary one, else the one at work, else the first; "" without any."""
    found = [each for each in emails if each.value and each.value.strip()]
    found.sort(key=lambda each: (not each.primary, (each.type or "").lower() != "work"))
    return found[0].value.strip() if found and found[0].value else ""


def provider_config() -> ServiceProviderConfig:
    """What this server can do."""
    return ServiceProviderConfig(
        patch=Patch(supported=True),
        bulk=Bulk(supported=False, max_operations=0, max_payload_size=0),
        filter=Filter(supported=True, max_results=MAX_RESULTS),
        change_password=ChangePassword(supported=False),
        sort=Sort(supported=False),
        etag=ETag(supported=True),
        authentication_schemes=[
            AuthenticationScheme(
                type=AuthenticationScheme.Type.oauthbearertoken,
                name="Bearer token",
                description="A SCIM token (sc-crl-…), made in the console or by POST /api/v1/scim-tokens",
                primary=True,
            )
        ],
        meta=Meta(resource_type="ServiceProviderConfig", location=location("ServiceProviderConfig")),
    )


def resource_types() -> list[ResourceType]:
    found = [ResourceType.from_resource(kind) for kind in (User, Group)]
    for each in found:
        each.meta = Meta(resource_type="ResourceType", location=location(f"ResourceTypes/{each.id}"))
    return found


def schemas() -> list[Schema]:
    found = [kind.to_schema() for kind in (User, Group)]
    for each in found:
        each.meta = Meta(resource_type="Schema", location=location(f"Schemas/{each.id}"))
    return found


def _id(prefix: ids.Prefix, text: str, what: str) -> UUID:
    try:
        return ids.from_text(prefix, text)
    except ids.InvalidIdError as error:
        raise NotFoundError(f"no such {what}", field="id") from error


def _meta(row: ScimUser | ScimGroup, kind: str) -> Meta:
    return Meta(
        resource_type=kind,
        created=row.created_at,
        last_modified=row.updated_at,
        location=location(f"{kind}s/{row}"),
        version=version(row),
    )


def _read(kind: type[Any], payload: Mapping[str, Any]) -> Any:
    """What we keep of a payload, checked. Members are read by member_ids: there may be thousands."""
    known = {
        (field.serialization_alias or _camel(name)).lower(): name
        for name, field in kind.model_fields.items()
        if name not in ("id", "meta", "schemas", "groups", "members")
    }
    kept = {known[key.lower()]: _known_parts(value) for key, value in payload.items() if key.lower() in known}
    try:
        return kind.model_validate(
            {"schemas": [str(kind.__schema__)], **kept}, scim_ctx=Context.RESOURCE_REPLACEMENT_REQUEST
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(_camel(str(part)) for part in first["loc"]) or "the resource"
        raise ScimError("invalidValue", f"{where}: {first['msg']}") from error


_PARTS: Final = {_alias.lower(): _alias for _alias in ("familyName", "givenName", "value", "type", "primary")}


def _known_parts(value: Any) -> Any:
    """A complex value without what we do not keep of it."""
    if isinstance(value, list):
        return [_known_parts(each) for each in value]
    if isinstance(value, dict):
        return {_PARTS[key.lower()]: part for key, part in value.items() if key.lower() in _PARTS}
    return value


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.capitalize() for part in rest)
