"""The OpenAPI document: what the operations declare, and what the middleware around them does.

The token, problems as problem+json, plans of writes, headers, examples.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from ninja import NinjaAPI
from ninja.openapi.schema import OpenAPISchema

from controlplane.api import plans
from controlplane.api.examples import example
from controlplane.api.plandocument import Plan
from controlplane.api.problems import CONTENT_TYPE
from controlplane.webhooks.catalogue import CATALOGUE, Kind

_EVERY: Final = {
    "X-Request-Id": {
        "schema": {"type": "string"},
        "description": "Names this call in our logs: quote it when you ask for help",
    }
}
_RETRY: Final = {"schema": {"type": "integer"}, "description": "Seconds after which to try again"}
_DEPRECATED: Final = {
    "Deprecation": {"schema": {"type": "string"}, "description": "Since when (RFC 9745), as @<Unix seconds>"},
    "Sunset": {"schema": {"type": "string"}, "description": "When it ends (RFC 8594)"},
    "Link": {"schema": {"type": "string"}, "description": "rel=deprecation: what to use instead"},
}
_REFUSALS: Final = {
    400: ("invalid_input", "slug: use letters, digits, dashes and underscores"),
    401: ("unauthorized", "this token is unknown, has expired or was revoked"),
    403: ("not_permitted", "your role (viewer) may not create and change projects: ask an owner or admin"),
    404: ("not_found", "no such project"),
    405: ("method_not_allowed", "this route has no such method"),
    409: ("conflict", "the organization has a project 'research' already"),
    412: ("changed_meanwhile", "it changed since you read it: read it again, then send your change"),
    413: ("body_too_large", "send at most 1048576 bytes"),
    429: ("too_many_requests", "this token may call 50 times a second, 200 at once"),
    503: ("database_unavailable", "the database does not answer: try again shortly"),
}


class Api(NinjaAPI):
    """NinjaAPI with the whole truth in its document."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._documents: dict[str, OpenAPISchema] = {}

    def get_openapi_schema(self, *args: Any, **kwargs: Any) -> OpenAPISchema:
        """Made once in a process (half a second): routes do not change while it lives."""
        key = repr((args, sorted(kwargs.items())))
        if key not in self._documents:
            self._documents[key] = self._make(*args, **kwargs)
        return self._documents[key]

    def _make(self, *args: Any, **kwargs: Any) -> OpenAPISchema:
        schema = super().get_openapi_schema(*args, **kwargs)
        components = schema["components"]
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        components["schemas"].update(_schemas_of_plans())
        schema["webhooks"] = {kind.name: _told(kind) for kind in CATALOGUE.values()}
        for path in schema["paths"].values():
            for method, operation in path.items():
                operation["responses"] = {
                    str(status): each for status, each in operation["responses"].items()
                }
                _problems(operation)
                if method != "get":
                    _plan(operation)
                _headers(operation)
                _examples(operation, components["schemas"])
        return schema


def _told(kind: Kind) -> dict[str, Any]:
    """What an endpoint is sent, in the words of OpenAPI 3.1."""
    at = {"type": "string", "format": "date-time", "description": "When it happened"}
    body = {
        "type": "object",
        "required": ["type", "timestamp", "data"],
        "properties": {"type": {"const": kind.name}, "timestamp": at, "data": kind.schema()},
    }
    example = {"type": kind.name, "timestamp": "2026-11-21T01:30:00.000+00:00", "data": kind.example()}
    named = ("webhook-id", "webhook-timestamp", "webhook-signature")
    return {
        "post": {
            "operationId": kind.name.replace(".", "_"),
            "summary": kind.sentence.rstrip("."),
            "description": f"{kind.sentence} Signed as Standard Webhooks describes; repeats have the same webhook-id.",
            "tags": ["webhooks"],
            "parameters": [
                {"name": name, "in": "header", "required": True, "schema": {"type": "string"}}
                for name in named
            ],
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": body, "examples": {"one": {"value": example}}}},
            },
            "responses": {"2XX": {"description": "Taken. Anything else is tried again, for three days"}},
            "security": [],
        }
    }


def _problems(operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            content = response.pop("content")
            response["content"] = {CONTENT_TYPE: content["application/json"]}


def _headers(operation: dict[str, Any]) -> None:
    """What the middleware adds to every answer, and to those of a deprecated operation."""
    for status, response in operation["responses"].items():
        response["headers"] = dict(_EVERY)
        if status in ("429", "503"):
            response["headers"]["Retry-After"] = _RETRY
        if operation.get("deprecated"):
            response["headers"].update(_DEPRECATED)


def _examples(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    bodies = {"": operation.get("requestBody", {}), **operation["responses"]}
    for status, body in bodies.items():
        for kind, media in body.get("content", {}).items():
            if kind == CONTENT_TYPE:
                media["example"] = _refusal(int(status))
            elif "schema" in media:
                media.setdefault("example", example(media["schema"], schemas))


def _refusal(status: int) -> dict[str, Any]:
    code, detail = _REFUSALS[status]
    field, _, message = detail.partition(": ") if status == 400 else ("", "", "")
    return {
        "type": f"urn:corral:problem:{code}",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "code": code,
        "detail": detail,
        "instance": "/api/v1/projects",
        "errors": [{"field": field, "message": message}] if field else [],
    }


def _plan(operation: dict[str, Any]) -> None:
    """200 with a plan beside what the write answers itself."""
    answer = operation["responses"].setdefault("200", {"description": "Only a plan was asked for"})
    answer.setdefault("content", {})[plans.CONTENT_TYPE] = {"schema": {"$ref": "#/components/schemas/Plan"}}


def _schemas_of_plans() -> dict[str, Any]:
    shape = Plan.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    return {**shape.pop("$defs"), "Plan": shape}
