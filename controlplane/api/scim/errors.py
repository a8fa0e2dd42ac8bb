"""Refusals of /scim/v2 in SCIM's own form (RFC 7644, 3.12), which is what directories show their administrators."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import structlog
from django.http import HttpRequest, HttpResponse
from scim2_models import Error

from controlplane.errors import ConflictError, CorralError, InvalidInputError

log = structlog.get_logger("corral.scim")

CONTENT_TYPE: Final = "application/scim+json"
_STANDARD: Final[dict[int, dict[str, str]]] = {
    401: {"WWW-Authenticate": 'Bearer realm="corral"'},
    503: {"Retry-After": "2"},
}


class ScimError(CorralError):
    """A call that is wrong in SCIM's own terms. `scim_type`: one of RFC 7644, table 9."""

    status = 400
    code = "invalid_input"

    def __init__(self, scim_type: str, detail: str) -> None:
        super().__init__(detail)
        self.scim_type = scim_type


def answer(body: dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> HttpResponse:
    return HttpResponse(
        json.dumps(body, ensure_ascii=False),
        status=status,
        content_type=CONTENT_TYPE,
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


def refusal(
    status: int, detail: str, scim_type: str | None = None, headers: Mapping[str, str] | None = None
) -> HttpResponse:
    body = Error(status=status, scim_type=scim_type, detail=detail).model_dump()
    return answer(body, status, {**_STANDARD.get(status, {}), **(headers or {})})


def refused(error: CorralError) -> HttpResponse:
    """What a service raised. The last owner, who cannot leave, is "current state" in SCIM's table: mutability."""
    if isinstance(error, ScimError):
        return refusal(error.status, error.message, error.scim_type)
    if isinstance(error, ConflictError):
        if error.field == "active":
            return refusal(400, error.message, "mutability")
        return refusal(409, error.message, "uniqueness")
    if isinstance(error, InvalidInputError):
        return refusal(400, error.message, "invalidValue")
    return refusal(error.status, error.message)


def database_away(request: HttpRequest, error: Exception) -> HttpResponse:
    """503: no directory is told that its token is bad because we cannot look."""
    log.warning("scim.database_away", error=type(error).__name__)
    return refusal(503, "the database does not answer: try again shortly")
