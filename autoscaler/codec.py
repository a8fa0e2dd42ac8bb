"""Frozen dataclasses to JSON values and back, exactly: a stored decision must replay to the same commands.

Called where decisions and memories meet the database. Knows str, int, float, bool, None, enums of text,
tuples, mappings by text, dataclasses, and unions of dataclasses (told apart by the field `kind`). Pure; unknown
fields are ignored and absent ones take their default, so rows written by the version before and after this one
can be read.
"""

import enum
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

T = TypeVar("T")


class CodecError(ValueError):
    """The JSON value is not one of this type; the message names the field."""


def to_json(value: object) -> Any:
    """JSON value of a dataclass, tuple or scalar. Raises CodecError for anything else."""
    if is_dataclass(value) and not isinstance(value, type):
        body = {f.name: to_json(getattr(value, f.name)) for f in fields(value)}
        kind = getattr(type(value), "KIND", None)
        return body if kind is None else {"kind": kind, **body}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if value is None or isinstance(value, str | int | float):
        return value
    raise CodecError(f"cannot store a {type(value).__name__}")


def from_json(wanted: type[T], value: Any) -> T:
    """The `wanted` that `to_json` made this value from. Raises CodecError."""
    return cast(T, _read(wanted, value, wanted.__name__))


def union_from_json(members: tuple[type[T], ...], value: Any) -> T:
    """One of several dataclasses that carry a KIND. Raises CodecError."""
    return cast(T, _read_union(members, value, "kind"))


def _read(wanted: Any, value: Any, path: str) -> Any:
    origin = get_origin(wanted)
    if origin in (Union, types.UnionType):
        return _read_union(get_args(wanted), value, path)
    if origin is tuple:
        if not isinstance(value, list):
            raise CodecError(f"{path}: expected a list, got {type(value).__name__}")
        return tuple(_read(get_args(wanted)[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise CodecError(f"{path}: expected an object, got {type(value).__name__}")
        each = get_args(wanted)[1]
        return {key: _read(each, item, f"{path}.{key}") for key, item in value.items()}
    if is_dataclass(wanted):
        return _read_dataclass(wanted, value, path)
    if issubclass(wanted, enum.Enum):
        try:
            return wanted(value)
        except ValueError as error:
            raise CodecError(f"{path}: {error}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise CodecError(f"{path}: expected {wanted.__name__}, got {type(value).__name__}")
    return value


def _read_union(members: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and type(None) in members:
        return None
    rest = [member for member in members if member is not type(None)]
    if len(rest) == 1:
        return _read(rest[0], value, path)
    kind = value.get("kind") if isinstance(value, dict) else None
    for member in rest:
        if kind is not None and getattr(member, "KIND", None) == kind:
            return _read(member, value, f"{path}:{kind}")
    raise CodecError(f"{path}: unknown kind {kind!r}")


def _read_dataclass(wanted: Any, value: Any, path: str) -> Any:
    if not isinstance(value, dict):
        raise CodecError(f"{path}: expected an object, got {type(value).__name__}")
    hints = _hints(wanted)
    found = {}
    for field in fields(wanted):
        if field.name in value:
            found[field.name] = _read(hints[field.name], value[field.name], f"{path}.{field.name}")
        elif field.default is MISSING and field.default_factory is MISSING:
            raise CodecError(f"{path}.{field.name}: missing")
    return wanted(**found)


@cache
def _hints(wanted: Any) -> dict[str, Any]:
    return get_type_hints(wanted)
