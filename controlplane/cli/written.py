"""Rows of the API as documents of `corral apply`, for `corral get --documents`: applied at once, they change nothing.

The other direction is reconcile.py and outward.py. Values that say nothing (null, an empty list) are left out, and
secrets: what a document leaves out stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from controlplane.cli.documents import SHAPES
from controlplane.cli.failures import Failure
from controlplane.cli.steps import Present
from controlplane.cli.transport import Api

Row = Mapping[str, Any]
_NOTHING: Final[tuple[Any, ...]] = (None, [], {}, "")


def documents_of(api: Api, word: str, rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Of each row that a document can say; a revoked key is none. Raises Failure for kinds that files do not have."""
    if word not in _WRITERS:
        raise Failure(f"files of `corral apply` have no {word}; they have {', '.join(_WRITERS)}")
    kind, write = _WRITERS[word]
    present = Present(api)
    for row in rows:
        said = write(present, row)
        if said is not None:
            heads, spec = said
            kept = {name: value for name, value in spec.items() if value not in _NOTHING}
            yield {"kind": kind, **heads, **({"spec": kept} if kept else {})}


_Parts = tuple[dict[str, Any], dict[str, Any]] | None


def _organization(_: Present, row: Row) -> _Parts:
    return {}, {**_same(row, "name", "timezone", "weight"), "limits": _limits(row)}


def _project(_: Present, row: Row) -> _Parts:
    spec = {"title": row["name"], **_same(row, "weight", "zero_retention"), "limits": _limits(row)}
    return {"name": row["slug"]}, spec


def _service_account(_: Present, row: Row) -> _Parts:
    return {"name": row["name"]}, {"role": row["role"]}


def _member(_: Present, row: Row) -> _Parts:
    return {"email": row["email"]}, {"role": row["role"]}


def _deployment(present: Present, row: Row) -> _Parts:
    spec = {"model": _model(present, row["model_version_id"])}
    return _in_project(present, row), spec | _same(row, *(SHAPES["Deployment"].spec.keys() - {"model"}))


def _key(present: Present, row: Row) -> _Parts:
    if row["revoked_at"]:
        return None
    spec = _same(row, "weight", "aliases", "tags", "expires_at")
    scopes = {name: value for name, value in row["scopes"].items() if value is not None}
    return _in_project(present, row), spec | {"limits": _limits(row), "scopes": scopes}


def _budget(present: Present, row: Row) -> _Parts:
    spec = _same(row, "model", "limit_nano", "period", "rolling_hours", "thresholds", "hard")
    project = _slug(present, row["project_id"]) if row["project_id"] else None
    return {"name": row["name"]}, {"project": project, "key": row["key_id"]} | spec


def _slo_rule(present: Present, row: Row) -> _Parts:
    named = {
        "key": _name(present, "keys", row["key_id"]),
        "deployment": _name(present, "deployments", row["deployment_id"]),
    }
    if (row["key_id"] and not named["key"]) or (row["deployment_id"] and not named["deployment"]):
        return None  # about something that has ended
    spec = _same(row, "is_default", "ttft_ms", "itl_ms", "deadline_s", "objective_ppm")
    return {"class": row["slo_class"], "project": _slug(present, row["project_id"])}, named | spec


def _end_customer_limits(present: Present, row: Row) -> _Parts:
    """By its pseudonym: the id that programs send is kept nowhere."""
    return {"project": _slug(present, row["project_id"])}, {
        "customer": row["customer"],
        "limits": _limits(row) or {"rpm": None},  # excepted from those of each
    }


def _quota(_: Present, row: Row) -> _Parts:
    return None if row["own"] is None else ({"name": row["kind"]}, {"limit": row["own"]})


def _webhook(_: Present, row: Row) -> _Parts:
    return {"url": row["url"]}, _same(row, "events", "description", "enabled")


def _upstream(present: Present, row: Row) -> _Parts:
    deployment = next(each for each in present.rows("deployments") if each["id"] == row["deployment_id"])
    heads = {"name": row["name"], "project": _slug(present, deployment["project_id"])}
    target_id = row["target_deployment_id"]
    target = next((each["name"] for each in present.rows("deployments") if each["id"] == target_id), None)
    empty = ("base_url", "model") if target else ()
    of_row = [name for name in SHAPES["Upstream"].spec if name in row and name not in empty]
    named = {"deployment": deployment["name"]} | ({"target": target} if target else {})
    return heads, {**named, **_same(row, *of_row)}


_WRITERS: Final[Mapping[str, tuple[str, Callable[[Present, Row], _Parts]]]] = {
    "organization": ("Organization", _organization),
    "projects": ("Project", _project),
    "service-accounts": ("ServiceAccount", _service_account),
    "members": ("Member", _member),
    "deployments": ("Deployment", _deployment),
    "keys": ("Key", _key),
    "budgets": ("Budget", _budget),
    "slo-rules": ("SloRule", _slo_rule),
    "end-customer-limits": ("EndCustomerLimits", _end_customer_limits),
    "quotas": ("Quota", _quota),
    "webhooks": ("Webhook", _webhook),
    "upstreams": ("Upstream", _upstream),
}


def _same(row: Row, *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _limits(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row["limits"].items() if value is not None}


def _in_project(present: Present, row: Row) -> dict[str, Any]:
    return {"name": row["name"], "project": _slug(present, row["project_id"])}


def _slug(present: Present, project_id: str) -> str:
    return str(next(row["slug"] for row in present.rows("projects") if row["id"] == project_id))


def _name(present: Present, kind: str, thing_id: str | None) -> str | None:
    found = next((row for row in present.rows(kind) if thing_id and row["id"] == thing_id), None)
    return None if found is None or found.get("revoked_at") else str(found["name"])


def _model(present: Present, version_id: str) -> str:
    """By name where that means this version, else by id."""
    versions = present.rows("model-versions")
    name = next((row["name"] for row in versions if row["id"] == version_id), version_id)
    meant = next((row["id"] for row in versions if row["name"] == name and not row["retired_at"]), None)
    return str(name) if meant == version_id else version_id
