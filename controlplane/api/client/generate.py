"""Makes the typed Python client from the OpenAPI document: models, a blocking and an asynchronous client.

Called by `manage.py openapi_client`. Models come from datamodel-code-generator, which is no package of the product but
of its tests (`make install-dev`); calls come from the template here, one method for each operation and one for the plan
of each write; transport.py is copied. What is generated is never committed: it is as new as its document.
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

PACKAGE: Final = "corral_client"
PLAN: Final = "application/vnd.corral.plan+json"
# The server checks; a client that checked too would refuse what a newer server allows.
_RULES: Final = frozenset(
    {
        "title",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "pattern",
        "minLength",
        "maxLength",
    }
    | {"minItems", "maxItems", "minProperties", "maxProperties", "propertyNames", "examples"}
)
_REF: Final = re.compile(r'"#/components/schemas/([^"]+)"')
_SIMPLE: Final = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}


@dataclass(frozen=True, slots=True)
class Method:
    """One operation as Python sees it. `answer` None: it answers nothing; `item`: it is a list in pages."""

    name: str
    http: str
    path: str
    summary: str
    description: str
    path_names: tuple[str, ...]
    query: tuple[tuple[str, str], ...]
    body: str | None
    answer: str | None
    item: str | None
    matches: bool
    deprecated: bool

    @property
    def is_write(self) -> bool:
        return self.http != "GET"


def generate(document: Mapping[str, Any], to: Path) -> Path:
    """Write the package under `to` and answer its folder. Raises ModuleNotFoundError without the generator."""
    document = _renamed(document)
    folder = to / PACKAGE
    folder.mkdir(parents=True, exist_ok=True)
    methods = list(_methods(document))
    models = _models(document, folder / "models.py")
    missing = {name for each in methods for name in (each.body, each.answer, each.item) if name} - models
    if missing:
        raise ValueError(f"the document names models that it does not have: {', '.join(sorted(missing))}")
    version = document["info"]["version"]
    files = {
        "_transport.py": (Path(__file__).parent / "transport.py").read_text(),
        "client.py": _client(methods, is_async=False),
        "async_client.py": _client(methods, is_async=True),
        "__init__.py": _INIT,
        "py.typed": "",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (to / "pyproject.toml").write_text(_PYPROJECT.format(package=PACKAGE, version=version))
    return folder


def _renamed(document: Mapping[str, Any]) -> dict[str, Any]:
    """With names that Python likes: `Page_KeyOut_` is `KeyOutPage`."""
    text = json.dumps(document, default=str)
    for name in document["components"]["schemas"]:
        found = re.fullmatch(r"Page_(\w+)_", name)
        if found:
            text = text.replace(f'"{name}"', f'"{found[1]}Page"').replace(
                f'schemas/{name}"', f'schemas/{found[1]}Page"'
            )
    renamed: dict[str, Any] = json.loads(text)
    return renamed


def _models(document: Mapping[str, Any], file: Path) -> set[str]:
    """Write the models; their names. The generator is imported here: the product itself does without."""
    from datamodel_code_generator import InputFileType, PythonVersion, generate
    from datamodel_code_generator.enums import DataModelType
    from datamodel_code_generator.format import Formatter

    schemas = _bare(_used(document))
    generate(
        json.dumps(
            {"openapi": "3.1.0", "info": document["info"], "paths": {}, "components": {"schemas": schemas}}
        ),
        input_file_type=InputFileType.OpenAPI,
        output=file,
        output_model_type=DataModelType.PydanticV2BaseModel,
        target_python_version=PythonVersion.PY_311,
        use_standard_collections=True,
        use_union_operator=True,
        use_schema_description=True,
        use_subclass_enum=True,
        set_default_enum_member=True,
        capitalise_enum_members=True,
        disable_timestamp=True,
        formatters=[Formatter.BUILTIN],
    )
    return set(re.findall(r"^class (\w+)\(", file.read_text(), re.M))


def _used(document: Mapping[str, Any]) -> dict[str, Any]:
    """Schemas that calls name, and those that these name."""
    schemas = document["components"]["schemas"]
    found: dict[str, Any] = {}
    todo = set(_REF.findall(json.dumps(document["paths"])))
    while todo:
        name = todo.pop()
        found[name] = schemas[name]
        todo |= set(_REF.findall(json.dumps(schemas[name]))) - found.keys()
    return {name: schema for name, schema in schemas.items() if name in found}


def _bare(value: Any, *, of_properties: bool = False) -> Any:
    """Without the rules that only the server needs, which would become a class each."""
    if isinstance(value, dict):
        return {
            key: _bare(inner, of_properties=key == "properties")
            for key, inner in value.items()
            if of_properties or key not in _RULES
        }
    return [_bare(each) for each in value] if isinstance(value, list) else value


def _methods(document: Mapping[str, Any]) -> Iterator[Method]:
    for path, each in document["paths"].items():
        for http, operation in each.items():
            parameters = operation.get("parameters", [])
            answer = _answer(operation)
            query = [
                (p["name"], _type(p["schema"]))
                for p in parameters
                if p["in"] == "query" and p["name"] != "plan"
            ]
            item = _item(document, answer) if any(name == "cursor" for name, _ in query) else None
            summary, _, rest = operation["description"].partition(". ")
            yield Method(
                name=operation["operationId"],
                http=http.upper(),
                path=path,
                summary=summary.rstrip("."),
                description=rest,
                path_names=tuple(re.findall(r"\{(\w+)\}", path)),
                query=tuple((name, kind) for name, kind in query if not (item and name == "cursor")),
                body=_body(operation),
                answer=answer,
                item=item,
                matches=any(p["name"] == "If-Match" for p in parameters),
                deprecated=bool(operation.get("deprecated")),
            )


def _body(operation: Mapping[str, Any]) -> str | None:
    content = operation.get("requestBody", {}).get("content", {})
    return _ref(content["application/json"]["schema"]) if "application/json" in content else None


def _answer(operation: Mapping[str, Any]) -> str | None:
    for status, response in operation["responses"].items():
        content = response.get("content", {})
        if status.startswith("2") and "application/json" in content:
            return _ref(content["application/json"]["schema"])
    return None


def _item(document: Mapping[str, Any], answer: str | None) -> str | None:
    """What a page holds."""
    if answer is None:
        return None
    data = document["components"]["schemas"][answer]["properties"]["data"]
    return _ref(data["items"])


def _ref(schema: Mapping[str, Any]) -> str:
    return str(schema["$ref"]).rsplit("/", 1)[-1]


def _type(schema: Mapping[str, Any]) -> str:
    """Of a parameter, without None."""
    if "$ref" in schema:
        return f"models.{_ref(schema)}"
    for choice in ("anyOf", "allOf"):
        if choice in schema:
            return " | ".join(
                dict.fromkeys(_type(each) for each in schema[choice] if each.get("type") != "null")
            )
    if schema.get("format") == "date-time":
        return "datetime"
    return _SIMPLE.get(schema.get("type", ""), "str")


def _client(methods: list[Method], *, is_async: bool) -> str:
    name, transport = ("AsyncClient", "AsyncTransport") if is_async else ("Client", "Transport")
    iterator = "AsyncIterator" if is_async else "Iterator"
    http = "httpx.AsyncClient" if is_async else "httpx.Client"
    parts = [
        _HEAD.format(
            name=name,
            transport=transport,
            iterator=iterator,
            http=http,
            kind="asynchronous" if is_async else "blocking",
            word="async " if is_async else "",
            wait="await " if is_async else "",
            a="a" if is_async else "",
        )
    ]
    for method in methods:
        parts.append(_method(method, is_async=is_async, iterator=iterator))
        if method.is_write:
            parts.append(_plan(method, is_async=is_async))
    return "\n".join(parts)


def _method(method: Method, *, is_async: bool, iterator: str) -> str:
    word, wait = ("async ", "await ") if is_async else ("", "")
    doc = _doc(method)
    if method.item:
        signature = _signature(method)
        params = ", ".join(f'"{name}": {_safe(name)}' for name, _ in method.query)
        return (
            f"    def {method.name}({signature}) -> {iterator}[models.{method.item}]:\n"
            f"{doc}        return self._transport.pages(models.{method.item}, {_path(method)}, {{{params}}})\n"
        )
    extras = _EXTRAS if method.is_write else ()
    signature = _signature(method, extras=extras)
    call = _prepare(
        method, params=", ".join(f'"{name}": {_safe(name)}' for name, _ in method.query), extras=extras
    )
    if method.answer is None:
        return (
            f"    {word}def {method.name}({signature}) -> None:\n"
            f"{doc}        {wait}self._transport.nothing({call})\n"
        )
    return (
        f"    {word}def {method.name}({signature}) -> models.{method.answer}:\n"
        f"{doc}        return {wait}self._transport.model(models.{method.answer}, {call})\n"
    )


_EXTRAS: Final = ("if_match", "idempotency_key")


def _plan(method: Method, *, is_async: bool) -> str:
    word, wait = ("async ", "await ") if is_async else ("", "")
    call = _prepare(method, params='"plan": True', extras=())
    return (
        f"    {word}def plan_{method.name}({_signature(method)}) -> models.Plan:\n"
        f'        """What `{method.name}` would change, cost and disrupt; nothing of it is done."""\n'
        f"        return {wait}self._transport.model(models.Plan, {call})\n"
    )


def _signature(method: Method, extras: tuple[str, ...] = ()) -> str:
    parts = ["self", *(f"{_safe(name)}: str" for name in method.path_names)]
    if method.body:
        parts.append(f"body: models.{method.body}")
    named = [f"{_safe(name)}: {kind} | None = None" for name, kind in method.query]
    named += [f"{name}: str | None = None" for name in extras if name != "if_match" or method.matches]
    return ", ".join([*parts, *(["*", *named] if named else [])])


def _prepare(method: Method, *, params: str, extras: tuple[str, ...]) -> str:
    parts = [f'"{method.http}"', _path(method)]
    if params:
        parts.append(f"params={{{params}}}")
    if method.body:
        parts.append("body=body")
    parts += [f"{name}={name}" for name in extras if name != "if_match" or method.matches]
    return f"prepare({', '.join(parts)})"


def _path(method: Method) -> str:
    if not method.path_names:
        return f'"{method.path}"'
    return (
        'f"' + re.sub(r"\{(\w+)\}", lambda found: f"{{quote({_safe(found[1])}, safe='')}}", method.path) + '"'
    )


def _doc(method: Method) -> str:
    text = method.summary + ("." if method.description else "")
    notes = [method.description] if method.description else []
    if method.deprecated:
        notes.append("Deprecated: the answer's headers say until when, and what to use instead.")
    lines = [text, *([""] if notes else []), *notes]
    body = (
        "\n".join(f"        {line}".rstrip() for line in lines)
        .lstrip()
        .replace('"""', "'''")
        .replace("\\", "\\\\")
    )
    return f'        """{body}' + ("\n        " if notes else "") + '"""\n'


def _safe(name: str) -> str:
    return f"{name}_" if keyword.iskeyword(name) else name


_HEAD: Final = '''"""The {kind} client, generated from the OpenAPI document: change the document, not this file."""

from __future__ import annotations

from collections.abc import {iterator}
from datetime import datetime  # noqa: F401 - of parameters
from types import TracebackType
from urllib.parse import quote

import httpx

from . import models
from ._transport import {transport}, prepare


class {name}:
    """`base_url`: the console's address. `token`: a management token (mt-crl-…). Raises ApiError for refusals."""

    def __init__(self, base_url: str, token: str, *, http: {http} | None = None) -> None:
        self._transport = {transport}(base_url, token, http=http)

    {word}def close(self) -> None:
        """End its connections."""
        {wait}self._transport.close()

    {word}def __{a}enter__(self) -> {name}:
        return self

    {word}def __{a}exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        {wait}self.close()
'''
_INIT: Final = '''"""Client of the Corral provisioning API, generated from its OpenAPI document."""

from . import models
from ._transport import ApiError, FieldError
from .async_client import AsyncClient
from .client import Client

__all__ = ["ApiError", "AsyncClient", "Client", "FieldError", "models"]
'''
_PYPROJECT: Final = """[project]
name = "corral-client"
version = "{version}"
requires-python = ">=3.11"
dependencies = ["httpx>=0.27", "pydantic>=2.7"]

[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[tool.setuptools]
packages = ["{package}"]

[tool.setuptools.package-data]
{package} = ["py.typed"]
"""
