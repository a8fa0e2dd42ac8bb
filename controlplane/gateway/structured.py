"""`response_format` of a chat: checked, and made the JSON schema that the answer must follow. Pure.

Called by schemas.py before anything is reserved. What the engine's grammar cannot express is refused by the replica
later, with the same field named.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from controlplane.gateway.bodies import ResponseFormat
from controlplane.gateway.errors import ApiError, bad_request

MAX_SCHEMA_BYTES: Final = 64 * 1024  # it travels with the request and is compiled while others wait
MAX_DEPTH: Final = 32
ANY_OBJECT: Final = '{"type":"object"}'
_AT: Final = "response_format.json_schema.schema"


def json_schema_of(asked: ResponseFormat) -> str | None:
    """JSON text of the schema; None = free text. Raises ApiError (400) naming the member at fault."""
    if asked.type == "text":
        return None
    if asked.type == "json_object":
        if asked.json_schema is not None:
            raise bad_request(
                'response_format: json_schema goes with type "json_schema"; change the type or leave it out',
                "response_format.type",
            )
        return ANY_OBJECT
    if asked.json_schema is None or asked.json_schema.schema is None:
        raise bad_request(
            f'{_AT} is required with type "json_schema"; send a JSON schema, '
            'or type "json_object" for any object',
            _AT,
            "missing_required_parameter",
        )
    schema = asked.json_schema.schema
    check_schema(schema, _AT)
    text = msgspec.json.encode(schema)
    if len(text) > MAX_SCHEMA_BYTES:
        raise bad_request(
            f"{_AT} has {len(text)} bytes; at most {MAX_SCHEMA_BYTES} are allowed", _AT, "schema_too_large"
        )
    return text.decode()


def check_schema(value: Any, at: str, depth: int = 1) -> None:
    """Bounded depth, and references that stay inside: nothing is ever fetched. ApiError (400) on the field `at`."""
    if depth > MAX_DEPTH:
        raise _invalid(at, f"is nested deeper than {MAX_DEPTH} levels; make it flatter, with $defs and $ref")
    if isinstance(value, dict):
        reference = value.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#"):
            raise _invalid(at, f"refers to {reference[:80]!r}; only references within it (#/…) are followed")
        for member in value.values():
            check_schema(member, at, depth + 1)
    elif isinstance(value, list):
        for member in value:
            check_schema(member, at, depth + 1)


def _invalid(at: str, problem: str) -> ApiError:
    return bad_request(f"{at} {problem}", at, "invalid_schema")
