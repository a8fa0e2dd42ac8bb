"""Refusals of /api/v1 as RFC 9457 problem details, each with a stable code and the fields at fault."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from django.http import HttpRequest, HttpResponse
from ninja import Field, Schema

log = structlog.get_logger("corral.api")

CONTENT_TYPE: Final = "application/problem+json"


class FieldError(Schema):
    field: str = Field(description="Path of the value at fault, dots between names")
    message: str = Field(description="What is wrong with it, and what would be right")


class Problem(Schema):
    """Why a call was refused (RFC 9457)."""

    type: str = Field(description="Names the kind of problem; the same as `code`, as a URN")
    title: str = Field(description="The status in words")
    status: int
    code: str = Field(description="Stable, for programs", examples=["not_found"])
    detail: str = Field(description="For people: what happened and what to do")
    instance: str = Field(description="The path that was asked for")
    errors: list[FieldError] = Field(default=[], description="The fields at fault, if there are any")


def problem(
    request: HttpRequest,
    status: int,
    code: str,
    detail: str,
    *,
    errors: Iterable[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> HttpResponse:
    """The response. A 401 names the scheme, a 503 says when to come back."""
    body: dict[str, Any] = {
        "type": f"urn:corral:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "instance": request.path,
        "errors": list(errors),
    }
    standard = {401: {"WWW-Authenticate": 'Bearer realm="corral"'}, 503: {"Retry-After": "2"}}
    return HttpResponse(
        json.dumps(body),
        status=status,
        content_type=CONTENT_TYPE,
        headers={"Cache-Control": "no-store", **standard.get(status, {}), **(headers or {})},
    )


def database_away(request: HttpRequest, error: Exception) -> HttpResponse:
    """503: nobody is told that their token is bad because we cannot look."""
    log.warning("api.database_away", error=type(error).__name__)
    return problem(request, 503, "database_unavailable", "the database does not answer: try again shortly")
