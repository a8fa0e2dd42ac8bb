"""The endpoints of /scim/v2 (RFC 7644), which an organization's directory calls: users, groups, and what there is.

ScimMiddleware has found out whose directory calls and entered its tenant; services in controlplane/scim write.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, cast
from uuid import UUID

import structlog
from django.db import InterfaceError, OperationalError
from django.db.models import Q
from django.http import HttpRequest, HttpResponse
from django.views.decorators.csrf import csrf_exempt

from controlplane.api.scim import documents, filters, patching
from controlplane.api.scim.attributes import group_attributes, user_attributes
from controlplane.api.scim.errors import database_away, refusal, refused
from controlplane.api.scim.exchange import (
    answer_list,
    answer_made,
    answer_one,
    as_query,
    body_of,
    check_version,
    page_of,
    wants_members,
)
from controlplane.api.scim.middleware import ScimRequest
from controlplane.errors import CorralError, NotFoundError
from controlplane.scim import groups as group_services
from controlplane.scim import selectors
from controlplane.scim import users as user_services
from controlplane.scim.groups import GroupChange
from controlplane.scim.models import ScimGroup, ScimMembership, ScimUser

log = structlog.get_logger("corral.scim")

View = Callable[..., HttpResponse]


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
    return answer_one(request, documents.provider_config())


@endpoint("GET")
def resource_types(request: ScimRequest) -> HttpResponse:
    return answer_list(documents.resource_types())


@endpoint("GET")
def resource_type(request: ScimRequest, name: str) -> HttpResponse:
    return answer_one(request, _named(documents.resource_types(), name))


@endpoint("GET")
def schemas(request: ScimRequest) -> HttpResponse:
    return answer_list(documents.schemas())


@endpoint("GET")
def schema(request: ScimRequest, name: str) -> HttpResponse:
    return answer_one(request, _named(documents.schemas(), name))


@endpoint("GET", "POST")
def users(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    if request.method == "POST":
        row = user_services.create_user(
            organization_id=organization_id, facts=documents.user_in(body_of(request))
        )
        return answer_made(request, _user(organization_id, row))
    return _list_users(request)


@endpoint("POST")
def search_users(request: ScimRequest) -> HttpResponse:
    return _list_users(as_query(request))


def _list_users(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    rows = ScimUser.objects.filter(organization_id=organization_id).filter(
        condition(request, user_attributes(organization_id))
    )
    shown, total, start = page_of(request, rows, documents.MAX_RESULTS)
    groups = _groups_of(organization_id, shown)
    return answer_list(
        [documents.user_out(row, groups[row.id]) for row in shown], request=request, total=total, start=start
    )


@endpoint("GET", "PUT", "PATCH", "DELETE")
def user(request: ScimRequest, name: str) -> HttpResponse:
    organization_id, scim_user_id = request.directory.organization_id, documents.user_id(name)
    is_write = request.method != "GET"
    row = selectors.user(organization_id=organization_id, scim_user_id=scim_user_id, is_locked=is_write)
    if not is_write:
        return answer_one(request, _user(organization_id, row))
    check_version(request, row)
    if request.method == "DELETE":
        user_services.delete_user(organization_id=organization_id, scim_user_id=scim_user_id)
        return HttpResponse(status=204)
    present, payload = user_services.facts_of(row), body_of(request)
    if request.method == "PUT":
        facts = documents.user_in(payload, present)
    else:
        facts = patching.patch_user(present, payload)
    row = user_services.change_user(organization_id=organization_id, scim_user_id=scim_user_id, facts=facts)
    return answer_one(request, _user(organization_id, row))


@endpoint("GET", "POST")
def groups(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    if request.method == "POST":
        display_name, external_id, members = documents.group_in(body_of(request))
        row = group_services.create_group(
            organization_id=organization_id,
            display_name=display_name,
            external_id=external_id,
            members=members or frozenset(),
        )
        return answer_made(request, _group(request, row))
    return _list_groups(request)


@endpoint("POST")
def search_groups(request: ScimRequest) -> HttpResponse:
    return _list_groups(as_query(request))


def _list_groups(request: ScimRequest) -> HttpResponse:
    organization_id = request.directory.organization_id
    rows = ScimGroup.objects.filter(organization_id=organization_id).filter(
        condition(request, group_attributes(organization_id))
    )
    is_full = wants_members(request)
    shown, total, start = page_of(
        request, rows, documents.MAX_GROUPS_WITH_MEMBERS if is_full else documents.MAX_RESULTS
    )
    members_of = _members_of(organization_id, shown) if is_full else {}
    return answer_list(
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
        return answer_one(request, _group(request, row))
    check_version(request, row)
    if request.method == "DELETE":
        group_services.delete_group(organization_id=organization_id, group_id=group_id)
        return HttpResponse(status=204)
    payload = body_of(request)
    if request.method == "PUT":
        display_name, external_id, members = documents.group_in(payload)
        change = GroupChange(display_name=display_name, external_id=external_id, members=members)
    else:
        change = patching.patch_group(payload)
    row = group_services.change_group(organization_id=organization_id, group_id=group_id, change=change)
    return answer_one(request, _group(request, row))


@csrf_exempt
def nothing(request: HttpRequest, path: str = "") -> HttpResponse:
    return refusal(
        404, "no such resource: there are Users, Groups, ServiceProviderConfig, ResourceTypes, Schemas"
    )


def _user(organization_id: UUID, row: ScimUser) -> documents.User:
    return documents.user_out(row, _groups_of(organization_id, [row])[row.id])


def _group(request: ScimRequest, row: ScimGroup) -> documents.Group:
    members = _members_of(row.organization_id, [row])[row.id] if wants_members(request) else None
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


def _named(resources: list[Any], name: str) -> Any:
    for each in resources:
        if each.id.lower() == name.lower():
            return each
    raise NotFoundError("no such resource")


def condition(request: ScimRequest, attributes: dict[str, filters.Asker]) -> Q:
    text = request.GET.get("filter", "").strip()
    return filters.condition(filters.parse(text), attributes) if text else Q()
