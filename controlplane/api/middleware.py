"""Every call of /api/v1: who calls, in which tenant, once or again; and every refusal as a problem.

A call carries a management token and works for the token's organization: one transaction, one tenant. Whatever is
refused leaves nothing behind. A dependency that is down is a 503, never a 401.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, Protocol, cast
from uuid import UUID

from django.conf import settings
from django.db import InterfaceError, OperationalError, transaction
from django.http import HttpRequest, HttpResponse
from psycopg_pool import PoolTimeout, TooManyRequests
from structlog.contextvars import bind_contextvars

from controlplane import ids
from controlplane.api import idempotency, plans
from controlplane.api.etags import matches
from controlplane.api.problems import CONTENT_TYPE, database_away, problem
from controlplane.api.ratelimit import CallerLimits
from controlplane.errors import InvalidInputError
from controlplane.tenants.actor import act_as
from controlplane.tenants.context import tenant
from controlplane.tenants.service_accounts import Caller, find_caller

PREFIX: Final = "/api/v1/"
PUBLIC: Final = frozenset({f"{PREFIX}openapi.json", f"{PREFIX}docs"})
MAX_BODY_BYTES: Final = 1 << 20
limits = CallerLimits(settings.ENV.api_rate_per_s, settings.ENV.api_rate_per_s * 4)
# Of refusals that Django itself makes before or beside a route.
_CODES: Final = {404: "not_found", 405: "method_not_allowed", 400: "invalid_input"}


class ApiRequest(HttpRequest):
    """What operations see."""

    caller: Caller
    etag: str | None
    operation_id: UUID | None  # the long operation that the call began
    deprecation: Deprecation | None  # of the operation that was called


class Deprecation(Protocol):
    """What operations.py knows of a deprecated operation."""

    def headers(self) -> dict[str, str]: ...


class ApiMiddleware:
    """Only paths under /api/v1/; all others pass. Comes before sessions: a cookie has no power here."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if not request.path.startswith(PREFIX) or request.path in PUBLIC:
            return self._get_response(request)
        try:
            return self._answer(cast(ApiRequest, request))
        except (OperationalError, InterfaceError, PoolTimeout, TooManyRequests) as error:
            return database_away(request, error)

    def _answer(self, request: ApiRequest) -> HttpResponse:
        if not _is_small(request):
            return problem(request, 413, "body_too_large", f"send at most {MAX_BODY_BYTES} bytes")
        token = _bearer(request)
        if token is None:
            return problem(
                request,
                401,
                "unauthorized",
                "send a management token: Authorization: Bearer mt-crl-… (keys sk-crl-… are for /v1 only)",
            )
        caller = find_caller(token)
        if caller is None:
            return problem(request, 401, "unauthorized", "this token is unknown, has expired or was revoked")
        if caller.suspended_at is not None:
            return problem(
                request, 403, "organization_suspended", "this organization is suspended: contact the operator"
            )
        request.caller, request.etag, request.operation_id, request.deprecation = caller, None, None, None
        wait_s = limits.take(caller.token_id)
        if wait_s:
            return problem(
                request,
                429,
                "too_many_requests",
                f"this token may call {limits.rate_per_s:g} times a second, {limits.burst:g} at once",
                headers={"Retry-After": str(math.ceil(wait_s))},
            )
        bind_contextvars(organization=caller.organization_id.hex, caller=caller.service_account_id.hex)
        with tenant(caller.organization_id):
            act_as(ids.to_text(ids.Prefix.MANAGEMENT_TOKEN, caller.token_id))
            response, is_plan = self._once_or_planned(request, caller, token)
            if is_plan or response.status_code >= 400:
                transaction.set_rollback(True)
        if response.status_code >= 400 and response.get("Content-Type") != CONTENT_TYPE:
            response = _as_problem(request, response)
        if request.deprecation is not None:
            for name, value in request.deprecation.headers().items():
                response[name] = value
        return response

    def _once_or_planned(self, request: ApiRequest, caller: Caller, token: str) -> tuple[HttpResponse, bool]:
        """The answer, and whether it is a plan, of which nothing may stay."""
        if request.method in idempotency.WRITES:
            try:
                is_plan = plans.is_asked(request)
            except InvalidInputError as error:
                errors = [{"field": "plan", "message": error.message}]
                return problem(request, 400, error.code, error.message, errors=errors), True
            if is_plan:
                return plans.preview(request, caller.organization_id, self._tagged), True
        return idempotency.once(request, caller, token, self._tagged), False

    def _tagged(self, request: ApiRequest) -> HttpResponse:
        """The answer with its entity tag; nothing but the tag for who has this very state already."""
        response = self._get_response(request)
        if request.operation_id is not None and response.status_code < 300:
            name = ids.to_text(ids.Prefix.OPERATION, request.operation_id)
            response["Operation-Location"] = f"{PREFIX}operations/{name}"
        if request.etag is None or response.status_code >= 300:
            return response
        known = request.headers.get("If-None-Match")
        if request.method == "GET" and known and matches(known, request.etag):
            response = HttpResponse(status=304)
        response["ETag"] = request.etag
        response["Cache-Control"] = "no-store" if request.method != "GET" else "private, no-cache"
        return response


def _is_small(request: HttpRequest) -> bool:
    length = request.headers.get("Content-Length") or "0"
    return length.isdigit() and int(length) <= MAX_BODY_BYTES


def _bearer(request: HttpRequest) -> str | None:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def _as_problem(request: HttpRequest, response: HttpResponse) -> HttpResponse:
    status = response.status_code
    detail = {404: "no such route", 405: "this route has no such method"}.get(status, response.reason_phrase)
    headers = {"Allow": response["Allow"]} if "Allow" in response else {}
    return problem(request, status, _CODES.get(status, "internal_error"), detail, headers=headers)
