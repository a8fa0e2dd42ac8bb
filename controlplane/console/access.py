"""Who may see a page: wraps every view of the console but sign-in.

Anonymous visitors go to sign-in and come back; a user without an organization is told so; a refusal of a
service or selector becomes a page with its status. What a view reads is scoped by its membership's
organization, and row-level security is the second lock (TenantMiddleware).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, cast

from django.contrib.auth.views import redirect_to_login
from django.db import transaction
from django.http import HttpResponse
from django.shortcuts import resolve_url
from django.utils.cache import add_never_cache_headers

from controlplane.console.pages import error_page
from controlplane.errors import CorralError, SuspendedError
from controlplane.lifecycle.suspension import reason_of
from controlplane.tenants.context import current_tenant
from controlplane.tenants.middleware import TenantRequest
from controlplane.tenants.models import User
from controlplane.tenants.rights import Permission, require
from controlplane.tenants.selectors import Membership

P = ParamSpec("P")
View = Callable[Concatenate["MemberRequest", P], HttpResponse]


class MemberRequest(TenantRequest):
    """A request of a signed-in user who acts under a membership. `suspension`: why its organization is, if it is."""

    user: User
    membership: Membership
    suspension: str


def member_page(
    *permissions: Permission, while_suspended: bool = False, while_waiting: bool = False
) -> Callable[[View[P]], Callable[Concatenate[TenantRequest, P], HttpResponse]]:
    """Only for members, only with these permissions; never cached, because it shows a tenant's data.

    Members of a suspended organization may look and change nothing, except where `while_suspended`; members whose
    organization asks more of their sign-in do that first, except where `while_waiting`.
    """

    def wrap(view: View[P]) -> Callable[Concatenate[TenantRequest, P], HttpResponse]:
        @wraps(view)
        def guarded(request: TenantRequest, /, *args: P.args, **kwargs: P.kwargs) -> HttpResponse:
            response = _answer(view, permissions, (while_suspended, while_waiting), request, *args, **kwargs)
            add_never_cache_headers(response)
            return response

        return guarded

    return wrap


def _answer(
    view: View[P],
    permissions: tuple[Permission, ...],
    exceptions: tuple[bool, bool],
    request: TenantRequest,
    /,
    *args: P.args,
    **kwargs: P.kwargs,
) -> HttpResponse:
    if not request.user.is_authenticated:
        return _to_sign_in(request)
    while_suspended, while_waiting = exceptions
    if request.missing is not None:
        if while_waiting:
            return view(cast(MemberRequest, request), *args, **kwargs)
        return _to_what_is_missing(request)
    if request.membership is None:
        return error_page(
            request,
            status=403,
            title="You belong to no organization yet",
            message="Ask an owner or admin of your organization to add you as a member, then sign in again.",
        )
    try:
        for permission in (Permission.ORGANIZATION_READ, *permissions):
            require(request.membership.role, permission)
        found = cast(MemberRequest, request)
        if found.membership.suspended_at:
            if request.method not in ("GET", "HEAD") and not while_suspended:
                raise SuspendedError(
                    "this organization is suspended: nothing can be changed. Contact the operator"
                )
            found.suspension = reason_of(organization_id=found.membership.organization_id)
        return view(found, *args, **kwargs)
    except CorralError as error:
        if current_tenant() is not None:
            transaction.set_rollback(True)  # answered with a page, so nobody else will undo its writes
        return error_page(request, status=error.status, message=error.message, code=error.code)


def _to_what_is_missing(request: TenantRequest) -> HttpResponse:
    """Enrolling a second factor, or the organization's own sign-in; the page that was asked for comes after it."""
    target = resolve_url("account_missing")
    if request.headers.get("HX-Request"):
        return HttpResponse(status=204, headers={"HX-Redirect": target})
    return redirect_to_login(request.get_full_path(), target)


def _to_sign_in(request: TenantRequest) -> HttpResponse:
    """Full pages redirect; a fragment asked for by htmx makes the whole page go to sign-in."""
    if request.headers.get("HX-Request"):
        return HttpResponse(status=204, headers={"HX-Redirect": resolve_url("console:sign_in")})
    return redirect_to_login(request.get_full_path(), resolve_url("console:sign_in"))
