"""What an import would make, and what it leaves out: plain values between plan.py (which decides) and carry.py (which
writes).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from controlplane.policy.periods import Period
from controlplane.tenants.key_scopes import NO_SCOPES, KeyScopes
from controlplane.tenants.limits import NO_LIMITS, Limits


class Fate(StrEnum):
    """What becomes of a row."""

    NEW = "new"
    THERE = "already there"  # imported before, or the organization that was named
    LEFT = "left out"


@dataclass(frozen=True, slots=True)
class PlannedBudget:
    """A budget with a window, or a soft one."""

    name: str
    limit_nano: int
    period: Period
    rolling_hours: int | None = None
    hard: bool = True
    model: str = ""


@dataclass(frozen=True, slots=True)
class PlannedOrganization:
    id: UUID
    name: str
    slug: str
    fate: Fate
    limits: Limits = NO_LIMITS
    budgets: tuple[PlannedBudget, ...] = ()
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True)
class PlannedProject:
    id: UUID
    organization_id: UUID
    name: str
    slug: str
    fate: Fate
    limits: Limits = NO_LIMITS
    budgets: tuple[PlannedBudget, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedKey:
    """A key; `lookup` and `digest` are keyed hashes of its SHA-256, which goes no further."""

    id: UUID
    organization_id: UUID
    project_id: UUID
    name: str
    lookup: str
    digest: bytes = field(repr=False)
    last4: str = ""
    fate: Fate = Fate.NEW
    limits: Limits = NO_LIMITS
    budgets: tuple[PlannedBudget, ...] = ()
    scopes: KeyScopes = NO_SCOPES
    aliases: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    expires_at: datetime | None = None
    is_revoked: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """Something that could not be carried over, or not as it was. The same of many is told once, with their number."""

    kind: str  # key, team, organization, project, user, model, setting …
    name: str
    what: str
    remedy: str


@dataclass(slots=True)
class Plan:
    """Everything that would be made, in the order of making."""

    where: str
    organizations: list[PlannedOrganization] = field(default_factory=list)
    projects: list[PlannedProject] = field(default_factory=list)
    keys: list[PlannedKey] = field(default_factory=list)
    left: list[Note] = field(default_factory=list)  # rows of which nothing is made
    notes: list[Note] = field(default_factory=list)
    models: list[str] = field(default_factory=list)  # names that keys are meant to call

    @property
    def rows(self) -> list[PlannedOrganization | PlannedProject | PlannedKey]:
        return [*self.organizations, *self.projects, *self.keys]

    def counts(self) -> dict[str, Counter[str]]:
        """{thing: {fate: how many}}."""
        found = {
            "organizations": Counter(row.fate.value for row in self.organizations),
            "projects": Counter(row.fate.value for row in self.projects),
            "keys": Counter(row.fate.value for row in self.keys),
            "budgets": Counter(row.fate.value for row in self.rows for _ in row.budgets),
        }
        for note in self.left:
            found.setdefault(f"{note.kind}s", Counter())[Fate.LEFT.value] += 1
        return found

    @property
    def is_new(self) -> bool:
        """Whether carrying it out would change anything."""
        return any(row.fate is Fate.NEW for row in self.rows)
