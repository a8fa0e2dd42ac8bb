"""An example for every body of the document, made from its schema: plausible values by name, else the least that fits.

Called by document.py. A schema of tomorrow has its example without a line of its own; tests/controlplane/api hold every
example against its schema.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_DEPTH: Final = 12
_AT: Final = "2026-11-02T09:30:00Z"
_ID: Final = "0193f2c47e1a7b3c9d5e6f7081920a1b"
_ID_SHAPE: Final = re.compile(r"\^([a-z]{2,5})_")
# By the name of the property, wherever it stands. A value that does not fit the schema there is not taken.
_NAMED: Final[Mapping[str, Any]] = {
    "id": f"key_{_ID}",
    "actor": f"tok_{_ID}",
    "name": "chat",
    "slug": "research",
    "email": "ada@example.org",
    "timezone": "Europe/Berlin",
    "model": "chat",
    "kind": "rollout",
    "subject": f"dep_{_ID}",
    "scope": f"prj_{_ID}",
    "phase": "ready",
    "state": "running",
    "provider": "aws",
    "cell": "c0",
    "offering": "spot/us-east-1a/g6.xlarge",
    "memory_bytes": 17_179_869_184,
    "reason_code": "",
    "reason_message": "",
    "finish_reason": "stop",
    "n_prompt_tokens": 420,
    "n_completion_tokens": 96,
    "duration_ms": 1840,
    "tag": "research",
    "deployment": "chat",
    "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "licence": "Apache-2.0",
    "source_kind": "s3",
    "size_bytes": 269_060_552,
    "n_params": 134_515_008,
    "max_model_len": 8192,
    "last4": "x7Kq",
    "key": "sk-crl-AbCdEfGhIjKl-…",
    "token": "mt-crl-AbCdEfGhIjKl-…",
    "role": "developer",
    "scopes": ["keys:read", "keys:write"],
    "weight": 100,
    "rpm": 600,
    "input_tpm": 1_000_000,
    "output_tpm": 200_000,
    "max_concurrency": 32,
    "budget_nano": 25_000_000_000,
    "limit_nano": 25_000_000_000,
    "cost_nano": 15_000,
    "engine_profile": {"engine": "vllm", "max_num_seqs": 64},
    "min_replicas": 1,
    "max_replicas": 4,
    "idle_timeout_s": 300,
    "overlap_s": 3600,
    "slo_class": "interactive",
    "price": "standard",
    "ttft_ms": 500,
    "itl_ms": 50,
    "deadline_s": 120,
    "status": 200,
    "progress": 40,
    "message": "1 of 2 ready, 1 replica to end",
    "reasons": ["3 requests wait, 1 replica is ready: wants 2"],
    "commands": [{"kind": "start_replica", "machine_id": _ID}],
    "changes": {"weight": [100, 200]},
    "thing": _ID,
    "hash": "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9",
    "group": "2026-11-02",
    "url": "https://example.org/hooks/corral",
    "next_cursor": "MDE5M2YyYzQ3ZTFhN2Iz",
    "summary": ["2 replicas of chat are drained", "3 running requests on them finish or move on"],
}
_FORMATS: Final = {
    "date-time": _AT,
    "date": "2026-11-02",
    "email": "ada@example.org",
    "uuid": "0193f2c4-7e1a-7b3c-9d5e-6f7081920a1b",
    "uri": "https://example.org/hooks/corral",
    "ipv4network": "192.0.2.0/24",
}


def example(schema: Mapping[str, Any], schemas: Mapping[str, Any], name: str = "", depth: int = 0) -> Any:
    """A value of this schema; `schemas` are the document's components."""
    if "$ref" in schema:
        return example(schemas[schema["$ref"].rsplit("/", 1)[-1]], schemas, name, depth)
    if "const" in schema:
        return schema["const"]
    if schema.get("examples"):
        return schema["examples"][0]
    if name in _NAMED and _fits(_NAMED[name], schema):
        return _NAMED[name]
    if "enum" in schema:
        return schema["enum"][0]
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            kinds = [each for each in schema[choice] if each.get("type") != "null"]
            optional = len(kinds) < len(schema[choice])
            # What is usually not so is null: an error, an end, a revocation.
            if optional and (
                name.startswith(("error", "last_", "revoked", "expires", "retired")) or depth >= _DEPTH
            ):
                return None
            return example({**_plain(schema), **kinds[0]}, schemas, name, depth + 1)
    if "allOf" in schema:
        return example(schema["allOf"][0], schemas, name, depth + 1)
    return _of_type(schema, schemas, name, depth)


def _of_type(schema: Mapping[str, Any], schemas: Mapping[str, Any], name: str, depth: int) -> Any:
    match schema.get("type"):
        case "object":
            properties = schema.get("properties", {})
            return {key: example(each, schemas, key, depth + 1) for key, each in properties.items()}
        case "array":
            items = schema.get("items")
            if not items or depth >= _DEPTH:
                return []
            # `machines` of `machine`: an item is called by the singular.
            return [example(items, schemas, name.removesuffix("s"), depth + 1)] * max(
                1, schema.get("minItems", 1)
            )
        case "integer" | "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + ("exclusiveMinimum" in schema))
            return max(low, min(schema.get("default") or 1, schema.get("maximum", 1_000)))
        case "boolean":
            return bool(schema.get("default", False))
        case "string":
            if found := _ID_SHAPE.match(schema.get("pattern", "")):
                return f"{found[1]}_{_ID}"
            return _FORMATS.get(schema.get("format", ""), str(schema.get("default") or "text"))
        case "null":
            return None
    return schema.get("default")


def _plain(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key not in ("anyOf", "oneOf", "default", "title")}


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    if any(choice in schema for choice in ("anyOf", "oneOf")):
        return any(_fits(value, each) for choice in ("anyOf", "oneOf") for each in schema.get(choice, ()))
    kind = schema.get("type")
    if "enum" in schema and value not in schema["enum"]:
        return False
    if kind == "string":
        if not isinstance(value, str) or schema.get("format") not in (None, "email", "uri"):
            return False
        pattern = schema.get("pattern")
        short = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 10**6)
        return short and (pattern is None or re.search(pattern, value) is not None)
    if kind in ("integer", "number"):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if kind == "array":
        items = schema.get("items", {})
        return isinstance(value, list) and (not items or all(_fits(each, items) for each in value))
    if kind == "object":
        return isinstance(value, dict) and "properties" not in schema
    return kind is None and "$ref" not in schema and "allOf" not in schema
