"""Files of `corral apply`: YAML documents with the line of each value, so that an error says where to look.

A document is `kind`, what the thing is called, and `spec`. Unknown fields are refused: a misspelt one would be lost.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from controlplane.cli.failures import Failure

MAX_BYTES: Final = 1 << 20
MAX_DOCUMENTS: Final = 1000


@dataclass(frozen=True, slots=True)
class Shape:
    """Fields of a kind: `heads` beside `spec`, all needed; `spec`: name to the fields within (empty: any value)."""

    heads: tuple[str, ...]
    spec: Mapping[str, Collection[str]]
    needed: tuple[str, ...] = ()


_LIMITS: Final = ("rpm", "input_tpm", "output_tpm", "max_concurrency", "budget_nano", "budget_usd")
SHAPES: Final[Mapping[str, Shape]] = {
    "Organization": Shape((), {"name": (), "timezone": (), "weight": (), "limits": _LIMITS}),
    "Project": Shape(("name",), {"title": (), "weight": (), "zero_retention": (), "limits": _LIMITS}),
    "Limits": Shape((), {"limits": _LIMITS, "project": (), "key": ()}, ("limits",)),
    "Member": Shape(("email",), {"role": ()}, ("role",)),
    "ServiceAccount": Shape(("name",), {"role": ()}, ("role",)),
    "Key": Shape(
        ("name", "project"),
        {
            "weight": (),
            "limits": _LIMITS,
            "scopes": ("routes", "models", "ip_ranges"),
            "aliases": (),
            "tags": (),
            "expires_at": (),
        },
    ),
    "Deployment": Shape(
        ("name", "project"),
        {
            "model": (),
            "engine_profile": (),
            "min_replicas": (),
            "max_replicas": (),
            "idle_timeout_s": (),
            "slo_class": (),
            "queue_order": (),
            "locality_window_tokens": (),
            "admission": (),
            "price": (),
        },
        ("model",),
    ),
    "SloRule": Shape(
        ("class", "project"),
        {
            "key": (),
            "deployment": (),
            "is_default": (),
            "ttft_ms": (),
            "itl_ms": (),
            "deadline_s": (),
            "objective_ppm": (),
        },
    ),
    "EndCustomerLimits": Shape(
        ("project",), {"end_customer": (), "customer": (), "limits": _LIMITS}, ("limits",)
    ),
    "Quota": Shape(("name",), {"limit": (), "limit_usd_per_h": ()}),
    "Webhook": Shape(("url",), {"events": (), "description": (), "enabled": ()}),
    "Upstream": Shape(
        ("name", "project"),
        {
            "deployment": (),
            "role": (),
            "target": (),
            "base_url": (),
            "model": (),
            "slots": (),
            "overflow_after_ms": (),
            "shadow_ppm": (),
            "shadow_rpm": (),
            "shadow_budget_nano": (),
            "connect_ms": (),
            "first_token_ms": (),
            "between_tokens_ms": (),
            "n_retries": (),
            "breaker_failures": (),
            "breaker_pause_ms": (),
            "extensions": (),
            "stream_usage": (),
            "max_tokens_field": (),
            "input_nano_per_million": (),
            "cached_nano_per_million": (),
            "output_nano_per_million": (),
            "input_usd_per_million": (),
            "cached_usd_per_million": (),
            "output_usd_per_million": (),
            "api_key_env": (),
            "headers_env": (),
            "enabled": (),
        },
        ("deployment", "role"),
    ),
    "Budget": Shape(
        ("name",),
        {
            "project": (),
            "key": (),
            "model": (),
            "limit_nano": (),
            "limit_usd": (),
            "period": (),
            "rolling_hours": (),
            "thresholds": (),
            "hard": (),
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `lines`: dotted path of a value to its line, from 1."""

    file: str
    kind: str
    heads: dict[str, str]
    spec: dict[str, Any]
    lines: dict[str, int] = field(repr=False)

    @property
    def title(self) -> str:
        name = next(
            (self.heads[head] for head in ("name", "email", "url", "class") if head in self.heads), ""
        )
        about = [f"{part} {self.spec[part]}" for part in ("key", "deployment") if self.spec.get(part)]
        of = f" of {' on '.join(about)}" if self.kind == "SloRule" and about else ""
        if self.kind == "EndCustomerLimits":
            of = f" of {self.spec.get('end_customer') or self.spec.get('customer') or 'each'}"
        where = f" ({self.heads['project']})" if "project" in self.heads else ""
        return f"{' '.join(filter(None, (_words(self.kind), name)))}{of}{where}"

    def at(self, path: str) -> str:
        """file:line of a value, or of what holds it."""
        while path and path not in self.lines:
            path = path.rpartition(".")[0]
        return f"{self.file}:{self.lines.get(path, self.lines.get('', 1))}"

    def wrong(self, path: str, message: str) -> Failure:
        return Failure(f"{self.at(path)}: {path or self.kind}: {message}")


def read(path: str) -> list[Document]:
    """All documents of a file, `-` is standard input. Raises Failure naming file, line and field."""
    import yaml

    name, text = _text(path)
    documents: list[Document] = []
    try:
        for node in yaml.compose_all(text, Loader=yaml.SafeLoader):
            if len(documents) >= MAX_DOCUMENTS:
                raise Failure(f"{name}: holds more than {MAX_DOCUMENTS} documents: apply it in parts")
            if node is not None:
                documents.append(_document(name, node))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise Failure(f"{name}:{line}: is no YAML: {getattr(error, 'problem', None) or error}") from None
    if not documents:
        raise Failure(f"{name}: holds no document")
    return documents


def _text(path: str) -> tuple[str, str]:
    import sys

    try:
        if path == "-":
            return "standard input", sys.stdin.read(MAX_BYTES)
        file = Path(path)
        if file.stat().st_size > MAX_BYTES:
            raise Failure(f"{path}: is larger than {MAX_BYTES} bytes")
        return path, file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{path}: cannot be read: {error}") from None


def _document(file: str, node: Any) -> Document:
    lines: dict[str, int] = {"": node.start_mark.line + 1}
    value = _value(node, "", lines, file)
    if not isinstance(value, dict):
        raise Failure(f"{file}:{lines['']}: a document is `kind: …` and its fields")
    loose = Document(file, str(value.get("kind", "document")), {}, {}, lines)
    kind = str(value.get("kind", ""))
    if kind not in SHAPES:
        raise loose.wrong("kind", f"{kind!r} is unknown{_near(kind, SHAPES)}; known: {', '.join(SHAPES)}")
    shape = SHAPES[kind]
    _known(loose, "", value, ("kind", "spec", *shape.heads))
    spec = value.get("spec") or {}
    if not isinstance(spec, dict):
        raise loose.wrong("spec", "must hold fields")
    _known(loose, "spec", spec, shape.spec)
    for head in shape.heads:
        if not isinstance(value.get(head), str) or not value[head]:
            raise loose.wrong(head, f"{kind} needs {head}: a text")
    for name in shape.needed:
        if name not in spec:
            raise loose.wrong("spec", f"{kind} needs {name}")
    for name, within in shape.spec.items():
        if within and name in spec:
            if not isinstance(spec[name], dict):
                raise loose.wrong(f"spec.{name}", f"must hold fields: {', '.join(within)}")
            _known(loose, f"spec.{name}", spec[name], within)
    return Document(file, kind, {head: value[head] for head in shape.heads}, spec, lines)


def _known(document: Document, path: str, value: Mapping[str, Any], names: Collection[str]) -> None:
    for name in value:
        if name not in names:
            where = f"{path}.{name}".lstrip(".")
            raise document.wrong(where, f"no such field{_near(str(name), names)}; known: {', '.join(names)}")


def _near(word: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1)
    return f", did you mean {found[0]}?" if found else ""


def _value(node: Any, path: str, lines: dict[str, int], file: str, depth: int = 0) -> Any:
    """The node as plain values, noting the line of each; twice the same name is an error, as YAML says."""
    import yaml

    if depth > 20:
        raise Failure(f"{file}:{node.start_mark.line + 1}: nested too deep")
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key, inner in node.value:
            name = str(key.value)
            where = f"{path}.{name}".lstrip(".")
            if name in found:
                raise Failure(f"{file}:{key.start_mark.line + 1}: {where}: is there twice")
            lines[where] = key.start_mark.line + 1
            found[name] = _value(inner, where, lines, file, depth + 1)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(inner, f"{path}.{n}", lines, file, depth + 1) for n, inner in enumerate(node.value)]
    loader = yaml.SafeLoader("")
    try:
        value = loader.construct_object(node)
    finally:
        loader.dispose()
    return value.isoformat() if hasattr(value, "isoformat") else value


def _words(kind: str) -> str:
    return "".join(f" {c.lower()}" if c.isupper() and n else c.lower() for n, c in enumerate(kind))


def walk(documents: list[Document], *kinds: str) -> Iterator[Document]:
    """Those of these kinds, in the order of the kinds, then of the file."""
    for kind in kinds:
        yield from (each for each in documents if each.kind == kind)
