"""How an operation is declared: its permission, its answers, its entity tag. Used by every file of resources/.

A handler takes the request and its parameters and returns a schema; what it raises becomes a problem (app.py). For a
change of one resource, `current` names how it looks now: If-Match is compared with that, under a row lock.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from functools import wraps
from typing import Annotated, Any, Final, get_args, get_origin

from django.db.models import Model
from ninja import Router, Schema, Status

from controlplane.api import etags
from controlplane.api.middleware import ApiRequest
from controlplane.api.problems import Problem
from controlplane.errors import CorralError, InvalidInputError
from controlplane.tenants.rights import Permission, require

READ_ERRORS: Final = (400, 401, 403, 404, 405, 429, 503)
WRITE_ERRORS: Final = (400, 401, 403, 404, 405, 409, 412, 413, 429, 503)
Current = Callable[..., tuple[Model, Callable[[Any], Schema]]]
_KEY_HEADER: Final = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    "description": "Send the same key again to be given the same answer, for a day, without a second effect.",
}
_MATCH_HEADER: Final = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "maxLength": 200},
    "description": "The ETag as last read; 412 if the resource changed since.",
}

_PLAN: Final = {
    "name": "plan",
    "in": "query",
    "required": False,
    "schema": {"type": "boolean", "default": False},
    "description": "true: answer what the call would change, cost and disrupt, and do nothing of it.",
}


@dataclass(frozen=True, slots=True)
class Deprecation:
    """Of an operation: since when, when it ends, and the page that says what to use instead."""

    since: datetime
    sunset: datetime
    link: str

    def headers(self) -> dict[str, str]:
        """RFC 9745, RFC 8594 and the link relation of the former."""
        return {
            "Deprecation": f"@{int(self.since.timestamp())}",
            "Sunset": format_datetime(self.sunset.astimezone(UTC), usegmt=True),
            "Link": f'<{self.link}>; rel="deprecation"; type="text/html"',
        }


class ChangedMeanwhileError(CorralError):
    """If-Match names another state than the present one."""

    status = 412
    code = "changed_meanwhile"


def operation(
    router: Router,
    method: str,
    path: str,
    permission: Permission,
    answer: Any,
    *,
    status: int = 200,
    current: Current | None = None,
    deprecation: Deprecation | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a handler. Its docstring's first line is the summary, the rest the description."""
    is_write = method != "GET"
    errors = WRITE_ERRORS if is_write else READ_ERRORS
    headers = [] if not is_write else [_PLAN, _KEY_HEADER, *([_MATCH_HEADER] if current else [])]

    def wrap(handler: Callable[..., Any]) -> Callable[..., Any]:
        # Annotations as objects: their names are the resource's, which this module does not know.
        signature = inspect.signature(handler, eval_str=True)
        known = _query_names(signature, path) | ({"plan"} if is_write else set())

        @wraps(handler)
        def guarded(request: ApiRequest, *args: Any, **kwargs: Any) -> Any:
            request.deprecation = deprecation
            require(request.caller.role, permission, request.caller.scopes)
            _refuse_unknown(request, known)
            _refuse_nul(request)
            if current is not None:
                _compare(request, current, kwargs)
            found = handler(request, *args, **kwargs)
            if isinstance(found, Schema):
                request.etag = etags.etag_of(found)
            return Status(status, found)

        guarded.__signature__ = signature  # type: ignore[attr-defined]
        summary, _, description = (handler.__doc__ or "").partition("\n")
        router.api_operation(
            [method],
            path,
            response={status: answer, frozenset(errors): Problem},
            summary=summary.rstrip("."),
            description=" ".join(description.split()) or summary,
            operation_id=handler.__name__,
            openapi_extra={"x-corral-permission": permission.value, "parameters": headers},
            by_alias=True,
            deprecated=True if deprecation else None,
        )(guarded)
        return guarded

    return wrap


def _query_names(signature: inspect.Signature, path: str) -> set[str]:
    """Parameters of the query: those of models (`query: Query[…]`), and simple ones that are not in the path."""
    names: set[str] = set()
    for parameter in list(signature.parameters.values())[1:]:
        kind = parameter.annotation
        is_query = get_origin(kind) is Annotated
        model = get_args(kind)[0] if is_query else kind
        if isinstance(model, type) and issubclass(model, Schema):
            if is_query:
                names |= {field.alias or name for name, field in model.model_fields.items()}
        elif f"{{{parameter.name}}}" not in path:
            names.add(parameter.name)
    return names


def _refuse_unknown(request: ApiRequest, known: set[str]) -> None:
    """A misspelt filter would be lost in silence, and the answer be taken for what was asked."""
    for name in request.GET:
        if name not in known:
            allowed = f"known here: {', '.join(sorted(known))}" if known else "this call takes none"
            raise InvalidInputError(f"{name[:64]!r} is no parameter; {allowed}", field=name[:64])


def _refuse_nul(request: ApiRequest) -> None:
    """As in a body: nothing that is kept has it."""
    for name, values in request.GET.lists():
        if any("\x00" in value for value in values):
            raise InvalidInputError(
                f"{name} must not contain the character U+0000: the database cannot hold it", field=name
            )


def _compare(request: ApiRequest, current: Current, kwargs: dict[str, Any]) -> None:
    header = request.headers.get("If-Match")
    if header is None:
        return
    row, _ = current(request, **kwargs)
    type(row)._default_manager.select_for_update(of=("self",)).get(pk=row.pk)
    row, out = current(request, **kwargs)  # as it is under the lock
    if not etags.matches(header, etags.etag_of(out(row))):
        raise ChangedMeanwhileError("it changed since you read it: read it again, then send your change")
