"""PATCH (RFC 7644, 3.5.2) as directories really send it, read into what is to become of a user or group.

Beyond the RFC, what Entra and Okta are known for: `op` in any case; booleans in quotes; no path, and a value whose
keys are paths (`name.givenName`, `emails[type eq "work"].value`); members taken out by a filter in the path
(`members[value eq "…"]`) or by a list in the value; an `id` in the value. Attributes of the standard that we do not
keep are left aside, misspelt ones are refused. Pure; called by views.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from uuid import UUID

from controlplane.api.scim import filters
from controlplane.api.scim.documents import Email, chosen_email, member_ids, user_id
from controlplane.api.scim.errors import ScimError
from controlplane.errors import NotFoundError
from controlplane.scim.groups import GroupChange
from controlplane.scim.users import Facts

MAX_OPERATIONS: Final = 1_000
_PATH: Final = re.compile(
    r"(?P<attribute>[A-Za-z$][\w$-]*)(?:\[(?P<filter>.*)\])?(?:\.(?P<part>[\w$]+))?\Z", re.DOTALL
)
_URN: Final = re.compile(r"urn:ietf:params:scim:schemas:core:2\.0:(?:user|group)(?::|\Z)", re.IGNORECASE)
_EXTENSION: Final = re.compile(r"urn:[\w.:-]+\Z", re.IGNORECASE)
# Of the standard's user, and not kept here.
_LEFT_ASIDE: Final = frozenset(
    {
        "nickname",
        "profileurl",
        "title",
        "usertype",
        "preferredlanguage",
        "locale",
        "timezone",
        "password",
        "phonenumbers",
        "ims",
        "photos",
        "addresses",
        "entitlements",
        "roles",
        "x509certificates",
    }
)
_READ_ONLY: Final = frozenset({"id", "meta", "schemas", "groups"})
_TEXTS: Final = {"username": "user_name", "externalid": "external_id", "displayname": "display_name"}
_NAMES: Final = {"givenname": "given_name", "familyname": "family_name"}
_LONGEST: Final = {"given_name": 120, "family_name": 120}


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do. `attribute` and `part` in lower case; `where`: what stood in brackets."""

    op: str  # add, replace or remove
    attribute: str
    where: str | None
    part: str | None
    value: Any
    is_named: bool  # by a path; False: a key of a value without one


def patch_user(present: Facts, payload: Mapping[str, Any]) -> Facts:
    """What the operations make of a user, one after the other. Raises ScimError; then nothing of them counts."""
    facts = present
    for step in _steps(payload):
        facts = _user_step(facts, step)
    return facts


def patch_group(payload: Mapping[str, Any]) -> GroupChange:
    """What the operations make of a group. Raises ScimError."""
    change = GroupChange()
    for step in _steps(payload):
        change = _group_step(change, step)
    return change


def _steps(payload: Mapping[str, Any]) -> Iterator[Step]:
    operations = next((value for key, value in payload.items() if key.lower() == "operations"), None)
    if not isinstance(operations, list) or not operations:
        raise ScimError("invalidSyntax", "Operations: send a list of at least one operation")
    if len(operations) > MAX_OPERATIONS:
        raise ScimError("invalidSyntax", f"Operations: at most {MAX_OPERATIONS} at once")
    for each in operations:
        if not isinstance(each, dict):
            raise ScimError("invalidSyntax", "Operations: each is an object with op, path and value")
        known = {key.lower(): value for key, value in each.items()}
        op, path, value = str(known.get("op", "")).lower(), known.get("path"), known.get("value")
        if op not in ("add", "replace", "remove"):
            raise ScimError("invalidSyntax", f"op: {op[:40]!r} is none of add, replace, remove")
        if path is not None and path != "":
            yield _step(op, path, value, is_named=True)
        elif op == "remove":
            raise ScimError("noTarget", "path: remove needs one")
        elif not isinstance(value, dict):
            raise ScimError("invalidValue", "value: without a path it is an object of attributes")
        else:
            for key, part in value.items():
                yield _step(op, key, part, is_named=False)


def _step(op: str, path: Any, value: Any, *, is_named: bool) -> Step:
    if not isinstance(path, str) or len(path) > filters.MAX_CHARS:
        raise ScimError("invalidPath", "path: not a path")
    bare = _URN.sub("", path.strip(), count=1)
    if _EXTENSION.match(bare):  # another schema's, such as the enterprise user's department
        return Step(op, "title", None, None, None, is_named)
    found = _PATH.match(bare)
    if found is None:
        raise ScimError("invalidPath", f"path: {path[:80]!r} cannot be read")
    part = found["part"]
    return Step(op, found["attribute"].lower(), found["filter"], part and part.lower(), value, is_named)


def _check(step: Step) -> bool:
    """Whether there is nothing to do for it. Raises ScimError for what cannot be done."""
    if step.attribute in _READ_ONLY:
        if step.is_named:
            raise ScimError("mutability", f"path: {step.attribute} is not for clients to change")
        return True  # Okta sends the id along
    return step.attribute in _LEFT_ASIDE


def _user_step(facts: Facts, step: Step) -> Facts:
    if _check(step):
        return facts
    is_removal = step.op == "remove"
    if step.attribute in _TEXTS and step.where is None and step.part is None:
        field = _TEXTS[step.attribute]
        if is_removal and field == "user_name":
            raise ScimError("invalidValue", "userName: is required and cannot be removed")
        text = "" if is_removal else _text(step.value, step.attribute, field)
        return _with(facts, {field: text})
    if step.attribute == "active" and step.part is None:
        if is_removal:
            raise ScimError("invalidValue", "active: say true or false")
        return replace(facts, is_active=_truth(step.value))
    if step.attribute == "name" and step.where is None:
        return _named(facts, step)
    if step.attribute == "emails":
        return _addressed(facts, step)
    raise ScimError("invalidPath", f"path: a user has no {step.attribute[:60]!r}")


def _named(facts: Facts, step: Step) -> Facts:
    if step.part is not None:
        parts = {step.part: "" if step.op == "remove" else step.value}
    elif step.op == "remove":
        parts = dict.fromkeys(_NAMES, "")
    elif isinstance(step.value, dict):
        parts = {key.lower(): value for key, value in step.value.items()}
    else:
        raise ScimError("invalidValue", "name: an object with givenName and familyName")
    given = {
        _NAMES[key]: _text(value, f"name.{key}", _NAMES[key]) for key, value in parts.items() if key in _NAMES
    }
    return _with(facts, given)


def _with(facts: Facts, texts: dict[str, str]) -> Facts:
    changes: dict[str, Any] = dict(texts)
    return replace(facts, **changes)


def _addressed(facts: Facts, step: Step) -> Facts:
    """One address is kept. Another kind's (home, other) is not it, and is left aside."""
    if step.where is not None and not _means_ours(step.where, facts):
        return facts
    if step.op == "remove":
        if step.part in ("type", "primary", "display"):
            return facts
        if "@" not in facts.user_name:
            raise ScimError("invalidValue", "emails: a user needs an address: send another one instead")
        return replace(facts, email=facts.user_name)
    if step.part is not None:
        if step.part != "value":
            return facts
        return replace(facts, email=_text(step.value, "emails.value", "email"))
    found = []
    for each in step.value if isinstance(step.value, list) else [step.value]:
        sent = (
            {key.lower(): value for key, value in each.items()} if isinstance(each, dict) else {"value": each}
        )
        address, kind = sent.get("value"), sent.get("type")
        if not isinstance(address, str):
            raise ScimError("invalidValue", 'emails: a list of {"value": address, "primary": true}')
        is_primary = sent.get("primary") is True or str(sent.get("primary")).lower() == "true"
        found.append(Email(value=address, type=kind if isinstance(kind, str) else None, primary=is_primary))
    # Beside the one there is, which goes on being it unless the new one is the primary one.
    if step.op == "add":
        found = [each for each in found if each.primary or (each.type or "work").lower() == "work"]
    email = chosen_email(found)
    return replace(facts, email=email) if email else facts


def _means_ours(where: str, facts: Facts) -> bool:
    """Whether the filter finds the one address that is kept: at work, primary."""
    ours: dict[str, filters.Value] = {"type": "work", "primary": True, "value": facts.email.lower()}

    def holds(node: filters.Node) -> bool:
        if isinstance(node, filters.Both):
            return holds(node.left) and holds(node.right)
        if isinstance(node, filters.Either):
            return holds(node.left) or holds(node.right)
        if isinstance(node, filters.Not):
            return not holds(node.inner)
        value = node.value
        if isinstance(value, str):
            value = value.lower()
            if node.attribute == "primary":
                value = value == "true"
        if node.operator == "pr":
            return node.attribute in ours
        return node.operator in ("eq", "ne") and (ours.get(node.attribute) == value) is (
            node.operator == "eq"
        )

    return holds(filters.parse(where))


def _group_step(change: GroupChange, step: Step) -> GroupChange:
    if _check(step):
        return change
    if step.attribute == "displayname":
        if step.op == "remove":
            raise ScimError("invalidValue", "displayName: is required and cannot be removed")
        return replace(change, display_name=_text(step.value, "displayName", "display_name"))
    if step.attribute == "externalid":
        return replace(
            change, external_id="" if step.op == "remove" else _text(step.value, "externalId", "external_id")
        )
    if step.attribute != "members" or step.part is not None:
        raise ScimError("invalidPath", f"path: a group has no {step.attribute[:60]!r} of that kind")
    if step.op == "remove":
        if step.where is None and step.value is None:
            return replace(change, members=frozenset(), join=frozenset(), leave=frozenset())
        gone = _named_members(step.where) if step.where is not None else _listed(step.value)
        if change.members is not None:
            return replace(change, members=change.members - gone)
        return replace(change, join=change.join - gone, leave=change.leave | gone)
    if step.where is not None:
        raise ScimError("invalidPath", "path: members are added by their list, without a filter")
    come = member_ids(step.value)
    if step.op == "replace":
        return replace(change, members=come, join=frozenset(), leave=frozenset())
    if change.members is not None:
        return replace(change, members=change.members | come)
    return replace(change, join=change.join | come, leave=change.leave - come)


def _named_members(where: str) -> frozenset[UUID]:
    """Of `value eq "…"`, and several of them with `or`."""
    node = filters.parse(where)
    if isinstance(node, filters.Either):
        left, right = node.left, node.right
        return _of(left) | _of(right)
    return _of(node)


def _of(node: filters.Node) -> frozenset[UUID]:
    if isinstance(node, filters.Either):
        return _of(node.left) | _of(node.right)
    if (
        isinstance(node, filters.Compare)
        and (node.attribute, node.operator) == ("value", "eq")
        and isinstance(node.value, str)
    ):
        return _listed(node.value)
    raise ScimError("invalidFilter", 'path: members are found by members[value eq "id"]')


def _listed(value: Any) -> frozenset[UUID]:
    """Ids to take out; what is no id of a user here is in no group either."""
    found = set()
    for each in value if isinstance(value, list) else [value]:
        text = each.get("value") if isinstance(each, dict) else each
        try:
            found.add(user_id(text if isinstance(text, str) else ""))
        except NotFoundError:
            continue
    return frozenset(found)


def _text(value: Any, name: str, field: str) -> str:
    if isinstance(value, dict) and isinstance(value.get("value"), str):
        value = value["value"]
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise ScimError("invalidValue", f"{name}: a string")
    text, most = str(value).strip(), _LONGEST.get(field, 254)
    if len(text) > most:
        raise ScimError("invalidValue", f"{name}: at most {most} characters")
    return text


def _truth(value: Any) -> bool:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("value")
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise ScimError("invalidValue", "active: say true or false")
