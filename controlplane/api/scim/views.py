"""The endpoints of /scim/v2 (RFC 7644), which an organization's directory calls: users, groups, and what there is.

ScimMiddleware has found out whose directory calls and entered its tenant; services in controlplane/scim write.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Final, TypeVar, cast
from uuid import UUID

import structlog
from django.db import InterfaceError, OperationalError
from django.db.models import Model, Q, QuerySet
from django.http import HttpRequest, HttpResponse, QueryDict
from django.views.decorators.csrf import csrf_exempt
from pydantic import ValidationError
from scim2_models import Context, ListResponse, Path, Resource, ResponseParameters

from controlplane.api.scim import documents, filters, patching
from controlplane.api.scim.errors import ScimError, answer, database_away, refusal, refused
from controlplane.api.scim.middleware import ScimRequest
from controlplane.errors import CorralError, NotFoundError
from controlplane.scim import groups as group_services
from controlplane.scim import selectors
from controlplane.scim import users as user_services
from controlplane.scim.groups import GroupChange
from controlplane.scim.models import ScimGroup, ScimMembership, ScimUser

log = structlog.get_logger("corral.scim")

View = Callable[..., HttpResponse]
Row = TypeVar("Row", bound=Model)
_FAR: Final = 2**31
_Paths = list[str | Path[Any]] | None


class ChangedMeanwhileError(CorralError):
    """If-Match names another version than the present one."""

    status = 412
    code = "changed_meanwhile"


def endpoint(*methods: str) -> Callable[[View], View]:
    """A view with these methods; what it raises is answered in SCIM's form."""

    def wrap(view: View) -> View:
        @csrf_exempt
        @wraps(view)
        def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
            if request.method not in methods:
                detail = f"this resource has {', '.join(methods)} alone"
                return refusal(405, detail, headers={"Allow": ", ".join(methods)})
            try:
                return view(cast(ScimRequest, request), *args, **kwargs)
            except CorralError as error:
                return refused(error)
            except (OperationalError, InterfaceError) as error:
                return database_away(request, error)
            except Exception as error:
                log.error("scim.failed", error=type(error).__name__, exc_info=error)
                return refusal(500, "this is our fault and was logged: try again later")

        return guarded

    return wrap


@endpoint("GET")
def service_provider_config(request: ScimRequest) -> HttpResponse:
    return _one(request, documents.provider_config())


@endpoint("GET")
def resource_types(request: ScimRequest) -> HttpResponse:
    return _listed(documents.resource_types())


@endpoint("GET")
def resource_type(request: ScimRequest, name: str) -> HttpResponse:
    return _one(request, _named(documents.resource_types(), name))


@endpoint("GET")
def schemas(request: ScimRequest) -> HttpResponse:
    return _listed(documents.schemas())


@endpoint("GET")
def schema(request: ScimRequest, name: str) -> HttpResponse:
    return _one(request, _named(documents.schemas(), name))


@endpoint("GET", "POST")
def users(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    if request.method == "POST":
        row = user_services.create_user(
            organization_id=organization_id, facts=documents.user_in(_payload(request))
        )
        return _made(request, _user(organization_id, row))
    return _list_users(request)


@endpoint("POST")
def search_users(request: ScimRequest) -> HttpResponse:
    return _list_users(_as_query(request))


def _list_users(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    rows = ScimUser.objects.filter(organization_id=organization_id).filter(
        _condition(request, _user_attributes(organization_id))
    )
    shown, total, start = _page(request, rows, documents.MAX_RESULTS)
    groups = _groups_of(organization_id, shown)
    return _listed(
        [documents.user_out(row, groups[row.id]) for row in shown], request=request, total=total, start=start
    )


@endpoint("GET", "PUT", "PATCH", "DELETE")
def user(request: ScimRequest, name: str) -> HttpResponse:
    organization_id, scim_user_id = request.directory.organization_id, documents.user_id(name)
    is_write = request.method != "GET"
    row = selectors.user(organization_id=organization_id, scim_user_id=scim_user_id, is_locked=is_write)
    if not is_write:
        return _one(request, _user(organization_id, row))
    _compare(request, row)
    if request.method == "DELETE":
        user_services.delete_user(organization_id=organization_id, scim_user_id=scim_user_id)
        return HttpResponse(status=204)
    present, payload = user_services.facts_of(row), _payload(request)
    if request.method == "PUT":
        facts = documents.user_in(payload, present)
    else:
        facts = patching.patch_user(present, payload)
    row = user_services.change_user(organization_id=organization_id, scim_user_id=scim_user_id, facts=facts)
    return _one(request, _user(organization_id, row))


@endpoint("GET", "POST")
def groups(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    if request.method == "POST":
        display_name, external_id, members = documents.group_in(_payload(request))
        row = group_services.create_group(
            organization_id=organization_id,
            display_name=display_name,
            external_id=external_id,
            members=members or frozenset(),
        )
        return _made(request, _group(request, row))
    return _list_groups(request)


@endpoint("POST")
def search_groups(request: ScimRequest) -> HttpResponse:
    return _list_groups(_as_query(request))


def _list_groups(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    rows = ScimGroup.objects.filter(organization_id=organization_id).filter(
        _condition(request, _group_attributes(organization_id))
    )
    is_full = _wants_members(request)
    shown, total, start = _page(
        request, rows, documents.MAX_GROUPS_WITH_MEMBERS if is_full else documents.MAX_RESULTS
    )
    members_of = _members_of(organization_id, shown) if is_full else {}
    return _listed(
        [documents.group_out(row, members_of.get(row.id)) for row in shown],
        request=request,
        total=total,
        start=start,
    )


@endpoint("GET", "PUT", "PATCH", "DELETE")
def group(request: ScimRequest, name: str) -> HttpResponse:
    organization_id, group_id = request.directory.organization_id, documents.group_id(name)
    is_write = request.method != "GET"
    row = selectors.group(organization_id=organization_id, group_id=group_id, is_locked=is_write)
    if not is_write:
        return _one(request, _group(request, row))
    _compare(request, row)
    if request.method == "DELETE":
        group_services.delete_group(organization_id=organization_id, group_id=group_id)
        return HttpResponse(status=204)
    payload = _payload(request)
    if request.method == "PUT":
        display_name, external_id, members = documents.group_in(payload)
        change = GroupChange(display_name=display_name, external_id=external_id, members=members)
    else:
        change = patching.patch_group(payload)
    row = group_services.change_group(organization_id=organization_id, group_id=group_id, change=change)
    return _one(request, _group(request, row))


@csrf_exempt
def nothing(request: HttpRequest, path: str = "") -> HttpResponse:
    return refusal(
        404, "no such resource: there are Users, Groups, ServiceProviderConfig, ResourceTypes, Schemas"
    )


def _user(organization_id: UUID, row: ScimUser) -> documents.User:
    return documents.user_out(row, _groups_of(organization_id, [row])[row.id])


def _group(request: ScimRequest, row: ScimGroup) -> documents.Group:
    members = _members_of(row.organization_id, [row])[row.id] if _wants_members(request) else None
    return documents.group_out(row, members)


def _groups_of(organization_id: UUID, rows: Iterable[ScimUser]) -> dict[UUID, list[ScimGroup]]:
    found: dict[UUID, list[ScimGroup]] = defaultdict(list)
    memberships = ScimMembership.objects.filter(organization_id=organization_id, user__in=list(rows))
    for each in memberships.select_related("group").order_by("group__display_name", "group_id"):
        found[each.user_id].append(each.group)
    return found


def _members_of(organization_id: UUID, rows: Iterable[ScimGroup]) -> dict[UUID, list[UUID]]:
    found: dict[UUID, list[UUID]] = defaultdict(list)
    memberships = ScimMembership.objects.filter(organization_id=organization_id, group__in=list(rows))
    for group_id, scim_user_id in memberships.order_by("user_id").values_list("group_id", "user_id"):
        found[group_id].append(scim_user_id)
    return found


def _user_attributes(organization_id: UUID) -> dict[str, filters.Asker]:
    memberships = ScimMembership.objects.filter(organization_id=organization_id)

    def in_group(text: str) -> Q:
        return Q(id__in=memberships.filter(group_id=_or_none(documents.group_id, text)).values("user"))

    groups = filters.among(in_group, Q(id__in=memberships.values("user")))
    return {
        "id": filters.among(lambda text: Q(id=_or_none(documents.user_id, text)), ~Q(pk__in=[])),
        "username": filters.text("user_name"),
        "externalid": filters.text("external_id", is_exact=True),
        "displayname": filters.text("display_name"),
        "name.givenname": filters.text("given_name"),
        "name.familyname": filters.text("family_name"),
        "active": filters.truth("is_active"),
        "emails": filters.text("email"),
        "emails.value": filters.text("email"),
        "emails.type": filters.constant("work"),
        "emails.primary": filters.constant(True),
        "groups": groups,
        "groups.value": groups,
        "meta.created": filters.instant("created_at"),
        "meta.lastmodified": filters.instant("updated_at"),
    }


def _group_attributes(organization_id: UUID) -> dict[str, filters.Asker]:
    memberships = ScimMembership.objects.filter(organization_id=organization_id)

    def has_member(text: str) -> Q:
        return Q(id__in=memberships.filter(user_id=_or_none(documents.user_id, text)).values("group"))

    members = filters.among(has_member, Q(id__in=memberships.values("group")))
    return {
        "id": filters.among(lambda text: Q(id=_or_none(documents.group_id, text)), ~Q(pk__in=[])),
        "displayname": filters.text("display_name"),
        "externalid": filters.text("external_id", is_exact=True),
        "members": members,
        "members.value": members,
        "meta.created": filters.instant("created_at"),
        "meta.lastmodified": filters.instant("updated_at"),
    }


def _or_none(read: Callable[[str], UUID], text: str) -> UUID | None:
    """What is no id is nobody's."""
    try:
        return read(text)
    except NotFoundError:
        return None


def _condition(request: ScimRequest, attributes: dict[str, filters.Asker]) -> Q:
    text = request.GET.get("filter", "").strip()
    return filters.condition(filters.parse(text), attributes) if text else Q()


def _page(request: ScimRequest, rows: QuerySet[Row], most: int) -> tuple[list[Row], int, int]:
    """Rows by age, how many there are, and the number (from 1) of the first."""
    start, count = max(1, _number(request, "startIndex", 1)), max(0, _number(request, "count", most))
    total = rows.count()
    return list(rows.order_by("pk")[start - 1 : start - 1 + min(count, most)]), total, start


def _number(request: ScimRequest, name: str, default: int) -> int:
    text = request.GET.get(name, "").strip()
    if not text:
        return default
    try:
        return min(int(text[:12]), _FAR)
    except ValueError as error:
        raise ScimError("invalidValue", f"{name}: {text[:20]!r} is no number") from error


def _as_query(request: ScimRequest) -> ScimRequest:
    """A search by POST (RFC 7644, 3.4.3), which keeps what is asked for out of the address: the same as a GET."""
    sent, query = {key.lower(): value for key, value in _payload(request).items()}, QueryDict(mutable=True)
    for name in ("filter", "startIndex", "count", "attributes", "excludedAttributes"):
        value = sent.get(name.lower())
        if value is not None:
            query[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    request.GET = query  # type: ignore[assignment]
    return request


def _wants_members(request: ScimRequest) -> bool:
    wanted, unwanted = _attributes(request)
    if wanted is not None:
        return any(str(each).lower().split(".")[0].rpartition(":")[2] == "members" for each in wanted)
    return "members" not in {str(each).lower().rpartition(":")[2] for each in unwanted or ()}


def _attributes(request: ScimRequest) -> tuple[_Paths, _Paths]:
    """`attributes` and `excludedAttributes`. Raises ScimError."""
    sent = {
        name: request.GET[key]
        for name, key in (("attributes", "attributes"), ("excluded_attributes", "excludedAttributes"))
        if request.GET.get(key)
    }
    try:
        found = ResponseParameters.model_validate(sent)
    except ValidationError as error:
        detail = f"attributes, excludedAttributes: {error.errors()[0]['msg']}"
        raise ScimError("invalidValue", detail) from error
    wanted, unwanted = found.attributes, found.excluded_attributes
    return None if wanted is None else [*wanted], None if unwanted is None else [*unwanted]


def _payload(request: ScimRequest) -> dict[str, Any]:
    try:
        found = json.loads(request.body)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate can be in JSON and in no text
    except (ValueError, RecursionError) as error:
        raise ScimError("invalidSyntax", "the body is not JSON") from error
    if not isinstance(found, dict):
        raise ScimError("invalidSyntax", "the body is not a JSON object")
    if "\\u0000" in json.dumps(found):
        raise ScimError("invalidValue", "text must not contain the character U+0000")
    return found


def _compare(request: ScimRequest, row: ScimUser | ScimGroup) -> None:
    header = request.headers.get("If-Match")
    if header is None or header.strip() == "*":
        return
    if documents.version(row) not in (part.strip() for part in header.split(",")):
        raise ChangedMeanwhileError("it changed since you read it: read it again, then send your change")


def _one(request: ScimRequest, resource: Resource[Any], status: int = 200) -> HttpResponse:
    wanted, unwanted = _attributes(request)
    meta = resource.meta
    headers = {"ETag": meta.version} if meta and meta.version else {}
    if request.method == "GET" and headers:
        known = request.headers.get("If-None-Match", "")
        if headers["ETag"] in (part.strip() for part in known.split(",")):
            return HttpResponse(status=304, headers=headers)
    body = resource.model_dump(
        scim_ctx=Context.RESOURCE_QUERY_RESPONSE, attributes=wanted, excluded_attributes=unwanted
    )
    return answer(body, status, headers)


def _made(request: ScimRequest, resource: documents.User | documents.Group) -> HttpResponse:
    response = _one(request, resource, 201)
    if resource.meta and resource.meta.location:
        response["Location"] = resource.meta.location
    return response


def _listed(
    resources: list[Any], *, request: ScimRequest | None = None, total: int | None = None, start: int = 1
) -> HttpResponse:
    wanted, unwanted = _attributes(request) if request is not None else (None, None)
    kind: Any = type(resources[0]) if resources else documents.User
    made: Any = ListResponse[kind]
    body = made(
        total_results=len(resources) if total is None else total,
        start_index=start,
        items_per_page=len(resources),
        resources=resources,
    ).model_dump(scim_ctx=Context.RESOURCE_QUERY_RESPONSE, attributes=wanted, excluded_attributes=unwanted)
    return answer(body)


def _named(resources: list[Any], name: str) -> Any:
    for each in resources:
        if each.id.lower() == name.lower():
            return each
    raise NotFoundError("no such resource")
