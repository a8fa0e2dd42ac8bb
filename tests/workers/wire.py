"""Records of the version before, and its structures made again from their recorded shape, to read ours with.

`python -m tests.workers.wire` records this tree as the version before, for the next one: run it when a release is made,
never to make a test pass. What is recorded: the shape of every structure that travels, one record of each as short and
one as long as can be, and the names of the scripts that machines call.
"""

from __future__ import annotations

import enum
import json
import subprocess
import types
import typing
from pathlib import Path
from typing import Any

import msgspec

from workers import contract, records, scripts
from workers.agent import enrol

RECORDED = Path(__file__).with_name("wire_before.json")
_BUILTIN = {"list": list, "dict": dict, "tuple": tuple, "str": str, "int": int, "float": float, "bool": bool}


def travelling() -> dict[str, Any]:
    """Every enum and structure that one process writes and another reads, in order of definition."""
    found = {
        name: value
        for name, value in vars(contract).items()
        if isinstance(value, type)
        and (issubclass(value, msgspec.Struct | enum.Enum) or _is_named_tuple(value))
        and value.__module__ == contract.__name__
    }
    return found | {"Admitted": records.Admitted, "Credentials": enrol.Credentials}


def sample(kind: Any, *, full: bool) -> Any:
    """A value of this type: everything set, or only what must be."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return sample(next(arg for arg in args if arg is not type(None)), full=full)
    if origin is tuple:
        return tuple(sample(arg, full=full) for arg in args if arg is not Ellipsis)
    if origin is list:
        return [sample(args[0], full=full)]
    if origin is dict:
        return {"name": sample(args[1], full=full)}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        hints = typing.get_type_hints(kind)
        fields = [f for f in msgspec.structs.fields(kind) if full or f.required]
        return kind(**{f.name: sample(hints[f.name], full=full) for f in fields})
    if _is_named_tuple(kind):
        return kind(*(sample(hint, full=full) for hint in typing.get_type_hints(kind).values()))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return next(iter(kind))
    return {str: "text", int: 7, float: 1.5, bool: True, bytes: b"bytes", object: "anything"}[kind]


def recorded() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORDED.read_text())
    return found


def made_again(shapes: dict[str, Any]) -> dict[str, Any]:
    """The recorded enums and structures as types of their own."""
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        if "members" in shape:
            made[name] = enum.StrEnum(name, dict(shape["members"]))
            continue
        fields = []
        for field in shape["fields"]:
            annotation = eval(
                field["type"], {"__builtins__": _BUILTIN | {"bytes": bytes, "object": object}}, made
            )
            fields.append((field["name"], annotation, *([_default(field)] if "default" in field else [])))
        made[name] = msgspec.defstruct(
            name, fields, array_like=shape["array_like"], kw_only=not shape["array_like"]
        )
    return made


def _default(field: dict[str, Any]) -> Any:
    value = field["default"]
    return msgspec.field(default_factory=type(value)) if isinstance(value, list | dict) else value


def _is_named_tuple(kind: Any) -> bool:
    """It travels as an array, like a structure that says so."""
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_field_defaults")


def _shape(kind: Any) -> dict[str, Any]:
    if issubclass(kind, enum.Enum):
        return {"members": [[member.name, member.value] for member in kind]}
    fields = []
    if _is_named_tuple(kind):
        for name, annotation in kind.__annotations__.items():
            default = kind._field_defaults.get(name, msgspec.NODEFAULT)
            told = {} if default is msgspec.NODEFAULT else {"default": msgspec.to_builtins(default)}
            fields.append({"name": name, "type": getattr(annotation, "__forward_arg__", annotation), **told})
        return {"array_like": True, "fields": fields}
    for field in msgspec.structs.fields(kind):
        entry: dict[str, Any] = {"name": field.name, "type": kind.__annotations__[field.name]}
        if field.default is not msgspec.NODEFAULT:
            entry["default"] = msgspec.to_builtins(field.default)
        elif field.default_factory is not msgspec.NODEFAULT:
            entry["default"] = msgspec.to_builtins(field.default_factory())
        fields.append(entry)
    return {"array_like": kind.__struct_config__.array_like, "fields": fields}


def _record() -> dict[str, Any]:
    kinds = travelling()
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    examples = {
        name: [
            {
                "msgpack": msgspec.msgpack.encode(value).hex(),
                "json": msgspec.json.encode(value).decode(),
            }
            for value in (sample(kind, full=False), sample(kind, full=True))
        ]
        for name, kind in kinds.items()
        if issubclass(kind, msgspec.Struct)
    }
    return {
        "revision": revision,
        "shapes": {name: _shape(kind) for name, kind in kinds.items()},
        "examples": examples,
        "message": contract.celery_message("a1" * 16, 3, "b2" * 16).decode(),
        "machine_scripts": {script.name: script.sha for script in scripts.MACHINE_SCRIPTS},
    }


if __name__ == "__main__":
    RECORDED.write_text(json.dumps(_record(), indent=1) + "\n")
