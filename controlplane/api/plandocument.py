"""What a plan says: the document that `?plan=true` answers, and the audit entries it is made of.

Filled by plans.py (what changes) and planeffects.py (what it costs, whom it disrupts).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from ninja import Field, Schema


@dataclass(frozen=True, slots=True)
class Written:
    """One audit entry of the planned call."""

    action: str
    kind: str
    thing: UUID
    changes: dict[str, list[Any]]

    def before(self, field: str) -> Any:
        return self.changes.get(field, [None, None])[0]

    def after(self, field: str) -> Any:
        return self.changes.get(field, [None, None])[1]


class FieldChange(Schema):
    """One field of one thing. JSON has no word for "was not there": that is null too."""

    field: str
    before: Any = None
    after: Any = None


class Change(Schema):
    """One thing that would be created, changed or deleted."""

    action: str = Field(description="create, update or delete", examples=["update"])
    kind: str = Field(examples=["deployment"])
    id: str | None = Field(description="Null for what would be created: its id is not known before")
    name: str | None = None
    fields: list[FieldChange]


class FromTo(Schema):
    """Nano-dollars an hour, before and after."""

    before: int
    after: int


class Cost(Schema):
    """What the change does to the rate of spending on machines. A replica's part of its machine is reckoned."""

    machine_nano_per_h: int = Field(
        description="Price of one more machine, of the size whose replicas cost least each",
        examples=[1_006_000_000],
    )
    replicas_per_machine: int = Field(
        description="Replicas that share it, each on GPUs of its own", examples=[4]
    )
    least_nano_per_h: FromTo = Field(description="With the least replicas that are kept")
    most_nano_per_h: FromTo = Field(description="With the most replicas that load may bring")


class ReplicaHit(Schema):
    """A replica that would be drained."""

    id: str
    deployment: str
    phase: str
    why: str = Field(description="deleted, replaced, surplus or drained")
    n_streams: int | None = Field(description="Requests it runs now; null where that cannot be asked")


class KeyHit(Schema):
    """A key or token that would stop working."""

    id: str
    name: str
    ends_at: datetime | None = Field(description="Null: at once")
    last_used_at: datetime | None


class NarrowedKey(Schema):
    """A key that would go on with less."""

    id: str
    name: str
    loses: list[str] = Field(
        description="In words: what it may no longer do",
        examples=[["models other than chat", "the alias gpt-4o"]],
    )


class MemberHit(Schema):
    """A person who would lose rights."""

    id: str
    email: str
    loses: list[str] = Field(description="Permissions, as in docs/permissions.md")


class GrantHit(Schema):
    """A tenant who could no longer call a deployment."""

    name: str = Field(description="The model they send")
    grantee_id: str


class Disruption(Schema):
    """Who would notice. Empty lists: nobody."""

    replicas: list[ReplicaHit]
    n_streams: int | None = Field(description="In flight on those replicas; they end or move on")
    keys: list[KeyHit]
    narrowed: list[NarrowedKey]
    tokens: list[KeyHit]
    members: list[MemberHit]
    grants: list[GrantHit]
    summary: list[str] = Field(description="The same in sentences")


class Plan(Schema):
    """What a write would do, sent with `?plan=true`. Nothing of it happened."""

    status: int = Field(description="What the call itself would answer", examples=[201])
    n_changes: int
    changes: list[Change]
    cost: Cost | None = Field(description="Null: it costs what it cost before")
    disrupts: Disruption
