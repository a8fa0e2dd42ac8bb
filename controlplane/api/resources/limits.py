"""Limits as they stand now: what is allowed, what is used, what is left and when it is back.

On the routers of what carries the limits: a path belongs to one router, and theirs set the same limits.
"""

from __future__ import annotations

import time
from typing import Any
from uuid import UUID

import redis
from ninja import Field, Schema

from autoscaler.house import build_cell
from billing.selectors import spent_nano
from controlplane.api.middleware import ApiRequest
from controlplane.api.operations import operation
from controlplane.api.resources import keys, organization, projects
from controlplane.api.values import KeyId, ProjectId
from controlplane.tenants import selectors
from controlplane.tenants.models import LimitColumns
from controlplane.tenants.rights import Permission


class LimitState(Schema):
    """One limit. Nulls in `used` and what follows from it: the counters cannot be asked now."""

    limit: int | None = Field(description="Null: nothing limits it at this level")
    used: int | None = Field(description="In the last minute, in flight, or spent and held of the budget")
    remaining: int | None = Field(description="Null where nothing limits it")
    reset_s: float | None = Field(
        description="Until all of it is back; null for what does not come back by itself"
    )


class LimitsState(Schema):
    """The limits of an organization, project or key. The tightest of the three counts."""

    scope: str = Field(description="Id of the organization, project or key")
    rpm: LimitState = Field(description="Requests per minute")
    input_tpm: LimitState = Field(description="Prompt tokens per minute")
    output_tpm: LimitState = Field(description="Completion tokens per minute")
    max_concurrency: LimitState = Field(description="Requests in flight")
    budget_nano: LimitState = Field(description="Money, nano-dollars; running requests hold some of it")


@operation(organization.router, "GET", "/organization/limits", Permission.ORGANIZATION_READ, LimitsState)
def get_organization_limits(request: ApiRequest) -> LimitsState:
    """The organization's limits, with what is used of them in this cell."""
    row = selectors.organization(organization_id=request.caller.organization_id)
    return _state(row, "org", f"org_{row.id.hex}", row.id)


@operation(projects.router, "GET", "/projects/{project_id}/limits", Permission.PROJECTS_READ, LimitsState)
def get_project_limits(request: ApiRequest, project_id: ProjectId) -> LimitsState:
    """A project's limits, with what is used of them in this cell."""
    row = selectors.project(organization_id=request.caller.organization_id, project_id=project_id)
    return _state(row, "prj", f"prj_{row.id.hex}", row.id)


@operation(keys.router, "GET", "/keys/{key_id}/limits", Permission.KEYS_READ, LimitsState)
def get_key_limits(request: ApiRequest, key_id: KeyId) -> LimitsState:
    """A key's limits, with what is used of them in this cell."""
    row = selectors.api_key(organization_id=request.caller.organization_id, key_id=key_id)
    return _state(row, "key", f"key_{row.id.hex}", row.id)


def _state(row: LimitColumns, scope: str, name: str, scope_id: UUID) -> LimitsState:
    seen = _counters(scope, scope_id)
    elapsed_ms = max(time.time() * 1000 - (seen.get("ms") or 0.0), 0.0) if seen is not None else 0.0

    def bucket(field: str, cap: int | None) -> LimitState:
        if cap is None or seen is None:
            return LimitState(limit=cap, used=None, remaining=None, reset_s=None)
        stored = seen.get(field)
        # As in workers/lua/lib_limits.lua: a bucket that refills evenly and was never seen is full.
        level = cap if stored is None else min(stored + elapsed_ms * cap / 60_000, cap)
        used = max(cap - int(level), 0)
        return LimitState(
            limit=cap,
            used=used,
            remaining=max(int(level), 0),
            reset_s=round((cap - level) / cap * 60, 1) if cap else None,
        )

    return LimitsState(
        scope=name,
        rpm=bucket("rq", row.rpm),
        input_tpm=bucket("in", row.input_tpm),
        output_tpm=bucket("out", row.output_tpm),
        max_concurrency=_level(row.max_concurrency, None if seen is None else int(seen.get("conc") or 0)),
        budget_nano=_level(row.budget_nano, _money(seen, scope, scope_id)),
    )


def _level(cap: int | None, used: int | None) -> LimitState:
    left = None if cap is None or used is None else max(cap - used, 0)
    return LimitState(limit=cap, used=used, remaining=left, reset_s=None)


def _money(seen: dict[str, float | int | None] | None, scope: str, scope_id: UUID) -> int | None:
    """Spent and held; from the booked events where the counter was not seeded yet."""
    if seen is None:
        return None
    spent = seen.get("spent")
    return int(spent if spent is not None else spent_nano(scope, scope_id)) + int(seen.get("held") or 0)


def _counters(scope: str, scope_id: UUID) -> dict[str, float | int | None] | None:
    """None while the cell's Redis is away."""
    names = ("rq", "in", "out", "ms", "conc", "spent", "held")
    cell = build_cell()
    try:
        values: list[Any] = cell.redis.hmget(cell.keys.limits(scope, scope_id.hex), *names)
    except redis.RedisError:
        return None
    return {name: _number(value) for name, value in zip(names, values, strict=True)}


def _number(value: bytes | None) -> float | int | None:
    """Money as an integer, exactly."""
    if value is None:
        return None
    text = value.decode()
    return int(text) if text.lstrip("-").isdigit() else float(text)
