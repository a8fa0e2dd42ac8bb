"""The OpenAPI document: what the operations declare, and what the middleware around them does.

Called once for each time the document is asked for. The token, problems as application/problem+json, plans of writes.
"""

from __future__ import annotations

from typing import Any

from ninja import NinjaAPI
from ninja.openapi.schema import OpenAPISchema

from controlplane.api import plans
from controlplane.api.problems import CONTENT_TYPE


class Api(NinjaAPI):
    """NinjaAPI with the whole truth in its document."""

    def get_openapi_schema(self, *args: Any, **kwargs: Any) -> OpenAPISchema:
        schema = super().get_openapi_schema(*args, **kwargs)
        components = schema["components"]
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"token": []}]
        components["schemas"].update(_schemas_of_plans())
        for path in schema["paths"].values():
            for method, operation in path.items():
                operation["responses"] = {
                    str(status): each for status, each in operation["responses"].items()
                }
                _problems(operation)
                if method != "get":
                    _plan(operation)
        return schema


def _problems(operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            content = response.pop("content")
            response["content"] = {CONTENT_TYPE: content["application/json"]}


def _plan(operation: dict[str, Any]) -> None:
    """200 with a plan beside what the write answers itself."""
    answer = operation["responses"].setdefault("200", {"description": "Only a plan was asked for"})
    answer.setdefault("content", {})[plans.CONTENT_TYPE] = {"schema": {"$ref": "#/components/schemas/Plan"}}


def _schemas_of_plans() -> dict[str, Any]:
    shape = plans.Plan.model_json_schema(ref_template="#/components/schemas/{model}", mode="serialization")
    return {**shape.pop("$defs"), "Plan": shape}
