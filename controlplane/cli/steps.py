"""What `corral apply` compares and calls: a step is one thing, with the calls that make it as its document says.

Used by the makers of each kind (reconcile.py, outward.py). Reads the API, changes nothing. Bodies may need the id of
what an earlier step makes, hence they are made when they are sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any, Final

from controlplane.cli.documents import Document
from controlplane.cli.kinds import KINDS, listed
from controlplane.cli.transport import Api

LIMIT_NAMES: Final = ("rpm", "input_tpm", "output_tpm", "max_concurrency", "budget_nano")


@dataclass(frozen=True, slots=True)
class Call:
    """One write. `waits`: it needs what an earlier step does first. `under`: where its body stands in the file,
    save for fields that are called otherwise there (`in_file`: as the API calls them to their place)."""

    method: str
    path: Callable[[], str]
    body: Callable[[], Any]
    waits: bool = False
    under: str = "spec"
    keeps: Callable[[Any], None] = lambda _: None
    in_file: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Step:
    """One thing: created, changed, deleted, or as it should be already (no calls)."""

    title: str
    action: str
    document: Document | None
    calls: list[Call] = field(default_factory=list)
    note: str = ""


class Present:
    """What is there, each list read once. `renew`: secrets that files name are sent although there are some."""

    def __init__(self, api: Api, *, renew: bool = False) -> None:
        self._api = api
        self.renew = renew
        self.coming: set[tuple[str, str, str]] = set()  # (kind, project, name) that documents make
        self.released: set[tuple[str | None, ...]] = (
            set()
        )  # where an earlier step takes a default service class away

    def rows(self, kind: str) -> list[dict[str, Any]]:
        return self._lists(kind)

    def found(self, kind: str, **filters: Any) -> Iterator[dict[str, Any]]:
        """Rows that the API finds by what only it can tell, newest first."""
        return self._api.pages(KINDS[kind].path, **filters)

    @cached_property
    def _cache(self) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _lists(self, kind: str) -> list[dict[str, Any]]:
        if kind not in self._cache:
            self._cache[kind] = listed(self._api, KINDS[kind])
        return self._cache[kind]

    @cached_property
    def organization(self) -> dict[str, Any]:
        found: dict[str, Any] = self._api.get("/organization")
        return found

    def one(self, kind: str, /, **values: Any) -> dict[str, Any] | None:
        """The newest row with these values."""
        return next((row for row in self.rows(kind) if all(row.get(k) == v for k, v in values.items())), None)

    def project(self, slug: str) -> dict[str, Any] | None:
        return self.one("projects", slug=slug) or self.one("projects", id=slug)

    def deployment(self, project_id: str, name: str) -> dict[str, Any] | None:
        return self.one("deployments", project_id=project_id, name=name)

    def key(self, project_id: str, name: str) -> dict[str, Any] | None:
        return self.one("keys", project_id=project_id, name=name, revoked_at=None)

    def is_to_come(self, word: str, project: str, name: str) -> bool:
        """Whether a document of this run makes it."""
        return (word.capitalize(), project, name) in self.coming

    def remember(self, kind: str) -> Callable[[Any], None]:
        """What a call made counts as there from now on."""
        return lambda made: self.rows(kind).insert(0, made)


def patch(
    document: Document,
    path: str,
    row: Mapping[str, Any],
    names: tuple[str, ...],
    values: Mapping[str, Any] | None = None,
    in_file: Mapping[str, str] | None = None,
) -> list[Call]:
    """A PATCH of what differs; none where nothing does."""
    wanted = {**given(document.spec, *names), **(values or {})}
    change = {name: value for name, value in wanted.items() if not same(row.get(name), value)}
    return [Call("PATCH", lambda: path, lambda: change, in_file=in_file or {})] if change else []


def limits(document: Document, path: str, row: Mapping[str, Any], spec: Mapping[str, Any]) -> list[Call]:
    """A PUT of all limits where one differs: those left out of `limits` are no limits."""
    if "limits" not in spec:
        return []
    wanted = limits_in(document, spec)["limits"]
    if all(row["limits"].get(name) == wanted.get(name) for name in LIMIT_NAMES):
        return []
    return [Call("PUT", lambda: path, lambda: wanted, under="spec.limits")]


def limits_in(document: Document, spec: Mapping[str, Any]) -> dict[str, Any]:
    if "limits" not in spec:
        return {}
    found = dict(spec["limits"])
    if "budget_usd" in found:
        found["budget_nano"] = nano(document, "spec.limits.budget_usd", found.pop("budget_usd"))
    return {"limits": found}


def nano(document: Document, path: str, dollars: Any) -> int | None:
    if dollars is None:
        return None
    try:
        return int(Decimal(str(dollars)) * 1_000_000_000)
    except (InvalidOperation, ValueError, OverflowError):
        raise document.wrong(path, f"{dollars!r} is no amount of dollars") from None


def given(spec: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: spec[name] for name in names if name in spec}


def same(present: Any, wanted: Any) -> bool:
    """Of an object only what is named; instants as instants."""
    if isinstance(present, dict) and isinstance(wanted, dict) and wanted:
        return covers(present, wanted)
    if isinstance(present, str) and isinstance(wanted, str) and present != wanted:
        from datetime import datetime

        try:
            return datetime.fromisoformat(present) == datetime.fromisoformat(wanted)
        except (ValueError, TypeError):
            return False
    return bool(present == wanted)


def covers(present: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    return all(same(present.get(name), value) for name, value in wanted.items())


def project_id(present: Present, document: Document) -> str:
    """Of the project that a document names. Raises Failure."""
    found = present.project(document.heads["project"])
    if found is None:
        raise document.wrong("project", f"there is no project {document.heads['project']!r}")
    return str(found["id"])


def settled(step: Step) -> Step:
    if not step.calls:
        step.action = "same"
    return step
