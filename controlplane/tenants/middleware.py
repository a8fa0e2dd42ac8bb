"""Puts each web request of a signed-in user into the tenant it works for.

The organization comes from the session and is checked against the user's memberships on every request, so
that a removed member is out at the next click. The view then runs inside `tenant()`: one transaction, one
tenant.
"""

from collections.abc import Callable
from typing import Final
from uuid import UUID

from django.contrib.auth.models import AnonymousUser
from django.contrib.sessions.backends.base import SessionBase
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from structlog.contextvars import bind_contextvars

from controlplane.tenants import selectors, signed_in
from controlplane.tenants.actor import act_as
from controlplane.tenants.context import current_tenant, tenant
from controlplane.tenants.models import User
from controlplane.tenants.selectors import Membership

SESSION_KEY = "organization_id"
# Pages of no tenant: a person's own account; and those that enter one of their own choice: the one that invites, or
# the one whose provider vouches.
OUTSIDE: Final = ("/account", "/invitations/", "/sso")


class TenantRequest(HttpRequest):
    """What views see: the user, and the membership they act under (None where the user belongs nowhere)."""

    user: User | AnonymousUser
    membership: Membership | None
    memberships: tuple[Membership, ...]
    missing: signed_in.Missing | None  # why `membership` is None although there is one
    waiting: Membership | None  # that one


class TenantMiddleware:
    """Sets `request.membership` and `request.memberships`, and wraps the view in its tenant."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: TenantRequest) -> HttpResponse:
        request.membership = None
        request.memberships = ()
        request.missing, request.waiting = None, None
        # A management token has chosen (api/middleware.py): cookies have no say.
        if current_tenant() is not None:
            return self._get_response(request)
        user = request.user
        if isinstance(user, User):
            session = request.session
            request.memberships = signed_in.reachable(selectors.memberships_of(user_id=user.id), session)
            membership = _active(request.memberships, session)
            if membership is not None and (missing := signed_in.missing(membership, session)):
                request.missing, request.waiting = missing, membership
            else:
                request.membership = membership
        if request.membership is None or request.path.startswith(OUTSIDE):
            return self._get_response(request)
        bind_contextvars(organization=request.membership.organization_id.hex)
        with tenant(request.membership.organization_id):
            if request.method != "GET":
                act_as(str(user))
            return self._get_response(request)

    def process_exception(self, request: HttpRequest, exception: Exception) -> None:
        """Undo what a view wrote that raised: Django answers with an error page, so atomic would commit."""
        if current_tenant() is not None:
            transaction.set_rollback(True)


def choose_organization(request: TenantRequest, organization_id: UUID) -> None:
    """Work for this organization from the next request on; ignored if the user does not belong to it."""
    request.session[SESSION_KEY] = organization_id.hex


def _active(memberships: tuple[Membership, ...], session: SessionBase) -> Membership | None:
    """The chosen one; without a choice the first that this session is good enough for, or else the first."""
    chosen = session.get(SESSION_KEY)
    for membership in memberships:
        if membership.organization_id.hex == chosen:
            return membership
    entered = (each for each in memberships if signed_in.missing(each, session) is None)
    return next(entered, memberships[0] if memberships else None)
