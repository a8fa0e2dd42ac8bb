"""What the toy engine calls, and with which arguments: pure, settled by the request and a seed.

It calls the functions whose names stand as words in the last message, if that is the user's, in the order of `tools`;
where an answer must be a call and none is named, the first. Arguments fit their schema (the common keywords of it) and
differ by prompt, so that a mixed-up answer shows. Called by toy.py for requests with a CallRule.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

import msgspec

from workers.contract import CallRule
from workers.engine import toy_text
from workers.engine.base import EngineInputError
from workers.engine.tool_form import SEPARATORS, written

_MAX_DEPTH: Final = 16
_WORD: Final = re.compile(r"[A-Za-z0-9_-]+")


class _Body(msgspec.Struct):
    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] = []


_body = msgspec.json.Decoder(_Body)


def calls_of(rule: CallRule, body: bytes, seed: int) -> str | None:
    """The text of the calls that such a request is answered with; None = it is answered in words. EngineInputError
    where a schema is none."""
    try:
        return _calls_of(rule, body, seed)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise EngineInputError(
            "invalid_schema", "tools", f"tools: the toy engine makes nothing of these schemas: {error}"
        ) from None


def _calls_of(rule: CallRule, body: bytes, seed: int) -> str | None:
    asked = _body.decode(body) if body else _Body()
    schemas = {
        tool["function"]["name"]: tool["function"].get("parameters") or {"type": "object"}
        for tool in asked.tools
    }
    schemas |= {function.name: json.loads(function.schema) for function in rule.functions}
    last = asked.messages[-1] if asked.messages else {}
    words = set(_WORD.findall(_text_of(last.get("content")))) if last.get("role") == "user" else set()
    held_to = {function.name for function in rule.functions} if rule.must else set(schemas)
    named = [name for name in schemas if name in words and name in held_to]
    if not named and rule.must:
        named = [rule.functions[0].name]
    if not named:
        return None
    chosen = named if rule.many else named[:1]
    return "\n".join(
        written(name, json.dumps(_example(schemas[name], schemas[name], seed, 0), separators=SEPARATORS))
        for name in chosen
    )


def _text_of(content: object) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _example(schema: Any, root: Any, seed: int, depth: int) -> Any:
    """Something that fits the schema."""
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return {}
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][seed % len(schema["enum"])]
    if isinstance(schema.get("$ref"), str):
        return _example(_resolved(schema["$ref"], root), root, seed, depth + 1)
    for either in ("anyOf", "oneOf", "allOf"):
        if schema.get(either):
            return _example(schema[either][0], root, seed, depth + 1)
    kind = schema.get("type", "object" if "properties" in schema else "string")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            properties = schema.get("properties") or {}
            return {
                name: _example(properties.get(name, {}), root, seed + i + 1, depth + 1)
                for i, name in enumerate(schema.get("required") or ())
            }
        case "array":
            return [
                _example(schema.get("items", {}), root, seed + i + 1, depth + 1)
                for i in range(schema.get("minItems", 1))
            ]
        case "integer" | "number":
            low = int(schema.get("minimum", 0))
            return low + seed % (int(schema.get("maximum", low + 99)) - low + 1)
        case "boolean":
            return seed % 2 == 0
        case "null":
            return None
        case _:
            word = toy_text.PIECES[toy_text.token_at(seed, 0)].strip()
            return word.ljust(schema.get("minLength", 0), "a")[: schema.get("maxLength", len(word) + 99)]


def _resolved(reference: str, root: Any) -> Any:
    found = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        if step:
            found = found.get(step, {}) if isinstance(found, dict) else {}
    return found
