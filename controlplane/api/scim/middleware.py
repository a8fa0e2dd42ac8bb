"""Every call of /scim/v2: whose directory calls, in which tenant; as ApiMiddleware does for /api/v1.

A call carries a SCIM token (sc-crl-…) and works for the token's organization: one transaction, one tenant. Whatever is
refused leaves nothing behind. A dependency that is down is a 503, never a 401.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final, cast

from django.conf import settings
from django.db import InterfaceError, OperationalError, transaction
from django.http import HttpRequest, HttpResponse
from psycopg_pool import PoolTimeout, TooManyRequests
from structlog.contextvars import bind_contextvars

from controlplane import ids
from controlplane.api.ratelimit import CallerLimits
from controlplane.api.scim.errors import database_away, refusal
from controlplane.scim.tokens import Directory, find_directory, note_use
from controlplane.tenants.actor import act_as
from controlplane.tenants.context import tenant

PREFIX: Final = "/scim/v2"
MAX_BODY_BYTES: Final = 1 << 20
limits = CallerLimits(settings.ENV.api_rate_per_s, settings.ENV.api_rate_per_s * 4)


class ScimRequest(HttpRequest):
    """What views see."""

    directory: Directory


class ScimMiddleware:
    """Only paths under /scim/v2; all others pass. Comes before sessions: a cookie has no power here."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path != PREFIX and not request.path.startswith(f"{PREFIX}/"):
            return self._get_response(request)
        try:
            return self._answer(cast(ScimRequest, request))
        except (OperationalError, InterfaceError, PoolTimeout, TooManyRequests) as error:
            return database_away(request, error)

    def _answer(self, request: ScimRequest) -> HttpResponse:
        length = request.headers.get("Content-Length") or "0"
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return refusal(413, f"send at most {MAX_BODY_BYTES} bytes")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        directory = find_directory(token.strip()) if scheme.lower() == "bearer" else None
        if directory is None:
            return refusal(401, "send a SCIM token that is alive: Authorization: Bearer sc-crl-…")
        if directory.suspended_at is not None:
            return refusal(403, "this organization is suspended: contact the operator")
        if wait_s := limits.take(directory.token_id):
            detail = f"this token may call {limits.rate_per_s:g} times a second, {limits.burst:g} at once"
            return refusal(429, detail, headers={"Retry-After": str(math.ceil(wait_s))})
        request.directory = directory
        bind_contextvars(organization=directory.organization_id.hex, caller=directory.token_id.hex)
        with tenant(directory.organization_id):
            act_as(ids.to_text(ids.Prefix.SCIM_TOKEN, directory.token_id))
            note_use(directory)
            response = self._get_response(request)
            if response.status_code >= 400:
                transaction.set_rollback(True)
        return response
