"""Pages that are no view's own: refusals, things not found, and what is away.

Django calls the handlers (urls.py) for errors nobody answered. They must work with Postgres and Redis away,
so their template knows nothing of users, tenants or sessions.
"""

from __future__ import annotations

import sys
from http import HTTPStatus
from typing import Final

import redis
from django.core.exceptions import PermissionDenied
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from django.template.loader import render_to_string
from psycopg_pool import PoolTimeout, TooManyRequests

RETRY_AFTER_S: Final = 5

_TITLES: Final = {
    400: "That did not work",
    403: "You may not do this",
    404: "There is nothing here",
    409: "That does not fit any more",
    500: "Something went wrong",
    503: "Part of Corral is away",
}
_AWAY: Final = (OperationalError, InterfaceError, PoolTimeout, TooManyRequests, redis.RedisError)


def error_page(
    request: HttpRequest, *, status: int, message: str, title: str = "", code: str = ""
) -> HttpResponse:
    """A page that says what happened and what to do, under this status."""
    context = {
        "status": status,
        "title": title or _TITLES.get(status, HTTPStatus(status).phrase),
        "message": message,
        "code": code,
        "retry": status == HTTPStatus.SERVICE_UNAVAILABLE,
    }
    # Without the request: its context processors would ask the session for the user.
    template = "console/_error.html" if request.headers.get("HX-Request") else "console/error.html"
    response = HttpResponse(render_to_string(template, context), status=status)
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        response["Retry-After"] = str(RETRY_AFTER_S)
    return response


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    return error_page(request, status=400, message="The request was malformed. Go back and try again.")


def forbidden(request: HttpRequest, exception: PermissionDenied) -> HttpResponse:
    return error_page(request, status=403, message="Your role does not allow this. Ask an owner or admin.")


def csrf_failure(request: HttpRequest, reason: str = "") -> HttpResponse:
    """CSRF_FAILURE_VIEW: a form that was open for too long, or came from elsewhere."""
    return error_page(
        request,
        status=403,
        title="This form is out of date",
        message="Go back, reload the page and send it again.",
        code="csrf_failed",
    )


def inactive(request: HttpRequest) -> HttpResponse:
    """Where allauth sends who may not sign in at all."""
    return error_page(
        request,
        status=403,
        title="This account is disabled",
        message="Ask the operator of this installation.",
    )


def not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    return error_page(
        request, status=404, message="The page does not exist, or it belongs to another organization."
    )


def failed(request: HttpRequest) -> HttpResponse:
    """500, or 503 where a server is away: Django calls this while it handles the exception."""
    if isinstance(sys.exc_info()[1], _AWAY):
        return error_page(
            request,
            status=503,
            message="The console cannot reach its database. Running requests go on. Try again in a moment.",
            code="database_unavailable",
        )
    return error_page(
        request,
        status=500,
        message="The error was logged with the id of this request. Try again.",
        code="internal_error",
    )
