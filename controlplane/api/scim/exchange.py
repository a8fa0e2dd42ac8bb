"""A SCIM request read, and its answer written: bodies, paging, chosen attributes, versions (RFC 7644, 3.4 and 3.14).

Used by views.py around what the services do. Bad input is a ScimError that names it; nothing here knows users or groups
beyond their documents, or asks the database for more than the page it was given.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final, TypeVar

from django.db.models import Model, QuerySet
from django.http import HttpResponse, QueryDict
from pydantic import ValidationError
from scim2_models import Context, ListResponse, Path, Resource, ResponseParameters

from controlplane.api.scim import documents
from controlplane.api.scim.errors import ScimError, answer
from controlplane.api.scim.middleware import ScimRequest
from controlplane.errors import CorralError
from controlplane.scim.models import ScimGroup, ScimUser

Row = TypeVar("Row", bound=Model)
_FAR: Final = 2**31
_NUL: Final = re.compile(
    r"(?<!\\)(?:\\\\)*\\u0000"
)  # as json.dumps writes it; behind another backslash it is text
_Paths = list[str | Path[Any]] | None


class ChangedMeanwhileError(CorralError):
    """If-Match names another version than the present one."""

    status = 412
    code = "changed_meanwhile"


def body_of(request: ScimRequest) -> dict[str, Any]:
    """The JSON object that was sent. Raises ScimError."""
    try:
        found = json.loads(request.body)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate can be in JSON and in no text
    except (ValueError, RecursionError) as error:
        raise ScimError("invalidSyntax", "the body is not JSON") from error
    if not isinstance(found, dict):
        raise ScimError("invalidSyntax", "the body is not a JSON object")
    if _NUL.search(json.dumps(found)):
        raise ScimError("invalidValue", "text must not contain the character U+0000")
    return found


def as_query(request: ScimRequest) -> ScimRequest:
    """A search by POST (RFC 7644, 3.4.3), which keeps what is asked for out of the address: the same as a GET."""
    sent, query = {key.lower(): value for key, value in body_of(request).items()}, QueryDict(mutable=True)
    for name in ("filter", "startIndex", "count", "attributes", "excludedAttributes"):
        value = sent.get(name.lower())
        if value is not None:
            query[name] = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    request.GET = query  # type: ignore[assignment]
    return request


def page_of(request: ScimRequest, rows: QuerySet[Row], most: int) -> tuple[list[Row], int, int]:
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


def wants_members(request: ScimRequest) -> bool:
    """Whether a group is to be shown with its members, which may be many."""
    wanted, unwanted = _attributes(request)
    if wanted is not None:
        return any(str(each).lower().rpartition(":")[2].split(".")[0] == "members" for each in wanted)
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


def check_version(request: ScimRequest, row: ScimUser | ScimGroup) -> None:
    """Nothing, or ChangedMeanwhileError: If-Match names another version than this row's."""
    header = request.headers.get("If-Match")
    if header is None or header.strip() == "*":
        return
    if documents.version(row) not in (part.strip() for part in header.split(",")):
        raise ChangedMeanwhileError("it changed since you read it: read it again, then send your change")


def answer_one(request: ScimRequest, resource: Resource[Any], status: int = 200) -> HttpResponse:
    """A resource with its version, cut to the attributes that were asked for; 304 where the caller has it."""
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


def answer_made(request: ScimRequest, resource: documents.User | documents.Group) -> HttpResponse:
    """201, and where it is."""
    response = answer_one(request, resource, 201)
    if resource.meta and resource.meta.location:
        response["Location"] = resource.meta.location
    return response


def answer_list(
    resources: list[Any], *, request: ScimRequest | None = None, total: int | None = None, start: int = 1
) -> HttpResponse:
    """A page of resources, of `total` in all, from number `start` (counted from 1)."""
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
