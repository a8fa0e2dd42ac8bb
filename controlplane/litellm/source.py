"""The rows of a LiteLLM proxy that matter here, from its Postgres or from a dump of it.

Reads only, and only these tables; columns that a version of LiteLLM does not have yet are as if empty. Of keys there is
the SHA-256 alone, as LiteLLM stores it. Never logged, never stored.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import IO, Any, Final

import msgspec
import psycopg

CONNECT_TIMEOUT_S: Final = 10
STATEMENT_TIMEOUT_S: Final = 120
MAX_ROWS: Final = 1_000_000  # of one table: what is more is no table of keys

Json = dict[str, Any] | list[Any] | None


class SourceError(Exception):
    """It cannot be read; the message says what to do."""


class Budget(msgspec.Struct, kw_only=True):
    """LiteLLM_BudgetTable: limits that several things may share."""

    budget_id: str
    max_budget: Decimal | None = None
    soft_budget: Decimal | None = None
    max_parallel_requests: int | None = None
    tpm_limit: int | None = None
    rpm_limit: int | None = None
    tpd_limit: int | None = None
    model_max_budget: Json = None
    budget_duration: str | None = None


class Organization(msgspec.Struct, kw_only=True):
    organization_id: str
    organization_alias: str = ""
    budget_id: str | None = None
    models: list[str] = []
    spend: Decimal = Decimal(0)
    created_at: datetime | None = None


class Team(msgspec.Struct, kw_only=True):
    team_id: str
    team_alias: str | None = None
    organization_id: str | None = None
    members_with_roles: Json = None
    metadata: Json = None
    max_budget: Decimal | None = None
    soft_budget: Decimal | None = None
    spend: Decimal = Decimal(0)
    models: list[str] = []
    max_parallel_requests: int | None = None
    tpm_limit: int | None = None
    rpm_limit: int | None = None
    tpd_limit: int | None = None
    budget_duration: str | None = None
    blocked: bool = False
    model_max_budget: Json = None
    budget_limits: Json = None
    policies: list[str] = []
    access_group_ids: list[str] = []
    model_id: int | None = None
    created_at: datetime | None = None


class Project(msgspec.Struct, kw_only=True):
    """LiteLLM_ProjectTable: a part of a team."""

    project_id: str
    project_alias: str | None = None
    team_id: str | None = None
    budget_id: str | None = None
    metadata: Json = None
    models: list[str] = []
    spend: Decimal = Decimal(0)
    model_rpm_limit: Json = None
    model_tpm_limit: Json = None
    blocked: bool = False
    created_at: datetime | None = None


class User(msgspec.Struct, kw_only=True):
    user_id: str
    user_alias: str | None = None
    user_email: str | None = None
    user_role: str | None = None
    organization_id: str | None = None
    max_budget: Decimal | None = None
    spend: Decimal = Decimal(0)
    models: list[str] = []
    metadata: Json = None
    max_parallel_requests: int | None = None
    tpm_limit: int | None = None
    rpm_limit: int | None = None
    budget_duration: str | None = None
    model_max_budget: Json = None
    policies: list[str] = []
    created_at: datetime | None = None


class Key(msgspec.Struct, kw_only=True):
    """LiteLLM_VerificationToken. `token` is the SHA-256 of the key's text, in hex."""

    token: str
    key_name: str | None = None
    key_alias: str | None = None
    spend: Decimal = Decimal(0)
    expires: datetime | None = None
    models: list[str] = []
    aliases: Json = None
    config: Json = None
    router_settings: Json = None
    user_id: str | None = None
    team_id: str | None = None
    agent_id: str | None = None
    project_id: str | None = None
    organization_id: str | None = None
    permissions: Json = None
    max_parallel_requests: int | None = None
    metadata: Json = None
    blocked: bool | None = None
    tpm_limit: int | None = None
    rpm_limit: int | None = None
    tpd_limit: int | None = None
    max_budget: Decimal | None = None
    budget_duration: str | None = None
    allowed_routes: list[str] = []
    key_type: str | None = None
    policies: list[str] = []
    access_group_ids: list[str] = []
    model_max_budget: Json = None
    budget_fallbacks: Json = None
    budget_limits: Json = None
    budget_id: str | None = None
    object_permission_id: str | None = None
    auto_rotate: bool | None = None
    created_at: datetime | None = None


class RotatedKey(msgspec.Struct, kw_only=True):
    """LiteLLM_DeprecatedVerificationToken: an old text that goes on for a while beside its key's new one."""

    token: str
    active_token_id: str
    revoke_at: datetime
    created_at: datetime | None = None


class ModelAliases(msgspec.Struct, kw_only=True):
    """LiteLLM_ModelTable: a team's other names of models."""

    id: int
    aliases: Json = None


class EndUser(msgspec.Struct, kw_only=True):
    user_id: str
    alias: str | None = None
    budget_id: str | None = None
    blocked: bool = False


class TeamMember(msgspec.Struct, kw_only=True):
    user_id: str
    team_id: str
    budget_id: str | None = None


class AccessGroup(msgspec.Struct, kw_only=True):
    access_group_id: str
    access_group_name: str
    access_model_names: list[str] = []


class StoredModel(msgspec.Struct, kw_only=True):
    """LiteLLM_ProxyModelTable: a model that was added at run time. Its parameters are encrypted there."""

    model_name: str
    litellm_params: Json = None
    model_info: Json = None


TABLES: Final[dict[str, type[msgspec.Struct]]] = {
    "LiteLLM_BudgetTable": Budget,
    "LiteLLM_OrganizationTable": Organization,
    "LiteLLM_TeamTable": Team,
    "LiteLLM_ProjectTable": Project,
    "LiteLLM_UserTable": User,
    "LiteLLM_VerificationToken": Key,
    "LiteLLM_DeprecatedVerificationToken": RotatedKey,
    "LiteLLM_ModelTable": ModelAliases,
    "LiteLLM_EndUserTable": EndUser,
    "LiteLLM_TeamMembership": TeamMember,
    "LiteLLM_AccessGroupTable": AccessGroup,
    "LiteLLM_ProxyModelTable": StoredModel,
}
REQUIRED: Final = "LiteLLM_VerificationToken"


class Source:
    """All rows by table, in the order of their ids, so that the same source makes the same plan."""

    def __init__(self, rows: dict[str, list[Any]], where: str) -> None:
        self.where = where

        def of(table: str, key: str) -> list[Any]:
            return sorted(rows.get(table, ()), key=lambda row: getattr(row, key))

        self.budgets = {row.budget_id: row for row in of("LiteLLM_BudgetTable", "budget_id")}
        self.organizations: list[Organization] = of("LiteLLM_OrganizationTable", "organization_id")
        self.teams: list[Team] = of("LiteLLM_TeamTable", "team_id")
        self.projects: list[Project] = of("LiteLLM_ProjectTable", "project_id")
        self.users: list[User] = of("LiteLLM_UserTable", "user_id")
        self.keys: list[Key] = of("LiteLLM_VerificationToken", "token")
        self.rotated: list[RotatedKey] = of("LiteLLM_DeprecatedVerificationToken", "token")
        self.model_aliases = {row.id: row for row in of("LiteLLM_ModelTable", "id")}
        self.end_users: list[EndUser] = of("LiteLLM_EndUserTable", "user_id")
        self.team_members: list[TeamMember] = of("LiteLLM_TeamMembership", "team_id")
        self.access_groups: list[AccessGroup] = of("LiteLLM_AccessGroupTable", "access_group_id")
        self.models: list[StoredModel] = of("LiteLLM_ProxyModelTable", "model_name")


def from_database(dsn: str) -> Source:
    """Read a running LiteLLM's database, in one read-only transaction. Raises SourceError."""
    rows: dict[str, list[Any]] = {}
    try:
        with psycopg.connect(
            dsn,
            connect_timeout=CONNECT_TIMEOUT_S,
            options=f"-c statement_timeout={STATEMENT_TIMEOUT_S * 1000} -c default_transaction_read_only=on",
        ) as connection:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            there = {
                name
                for (name,) in connection.execute(
                    "SELECT table_name FROM information_schema.tables WHERE table_schema = ANY (current_schemas(false))"
                )
            }
            for table in TABLES:
                if table in there:
                    # As text: floats keep the digits that were written.
                    found = connection.execute(f'SELECT to_jsonb(t)::text FROM "{table}" t LIMIT {MAX_ROWS}')  # noqa: S608
                    rows[table] = [_row(table, json.loads(text, parse_float=Decimal)) for (text,) in found]
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"--database-url: {reason}; give the DATABASE_URL of the LiteLLM proxy") from None
    return _complete(rows, "its database")


def from_dump(path: Path) -> Source:
    """Read a plain dump (`pg_dump --data-only`, also gzipped), a line at a time. Raises SourceError."""
    rows: dict[str, list[Any]] = {}
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as raw:
            if raw.read(5) == b"PGDMP":
                raise SourceError(
                    f"--dump: {path.name} is in pg_dump's custom format; make a plain one: "
                    "pg_dump --data-only --format=plain"
                )
            raw.seek(0)
            file = io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
            for table, columns, cells in _copied(file):
                rows.setdefault(table, []).append(_row(table, _typed(table, columns, cells)))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"--dump: {path} cannot be read: {error}") from None
    return _complete(rows, path.name)


def _complete(rows: dict[str, list[Any]], where: str) -> Source:
    if REQUIRED not in rows:
        raise SourceError(f"{where} has no table {REQUIRED}: is it that of a LiteLLM proxy, with its data?")
    return Source(rows, where)


def _row(table: str, values: dict[str, Any]) -> Any:
    kept = {name: value for name, value in values.items() if value is not None}
    try:
        row = msgspec.convert(kept, TABLES[table], strict=False)
    except msgspec.ValidationError as error:
        raise SourceError(
            f"{table}: {error}: this version of LiteLLM keeps it in a form unknown here"
        ) from None
    for name in ("created_at", "expires", "revoke_at"):
        at = getattr(row, name, None)
        if at is not None and at.tzinfo is None:  # LiteLLM writes UTC
            setattr(row, name, at.replace(tzinfo=UTC))
    return row


# -- COPY, as pg_dump writes it

_ESCAPES: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


def _copied(lines: IO[str]) -> Iterator[tuple[str, list[str], list[str | None]]]:
    """(table, columns, cells) of every row of ours."""
    table, columns, is_ours = "", [""], False
    for line in lines:
        if not table:
            if line.startswith("COPY "):
                name, _, rest = line[5:].partition(" (")
                table = name.rsplit(".", 1)[-1].strip('"')
                columns = [column.strip().strip('"') for column in rest.partition(")")[0].split(",")]
                is_ours = table in TABLES
            elif line.startswith("INSERT INTO "):
                raise SourceError("--dump: rows are INSERTs; make the dump without --inserts")
        elif line == "\\.\n":
            table = ""
        elif is_ours:
            cells = [None if cell == "\\N" else _unescaped(cell) for cell in line.rstrip("\n").split("\t")]
            if len(cells) != len(columns):
                raise SourceError(f"--dump: a row of {table} has {len(cells)} of {len(columns)} columns")
            yield table, columns, cells


def _unescaped(cell: str) -> str:
    if "\\" not in cell:
        return cell
    out, at = [], 0
    while at < len(cell):
        if cell[at] == "\\" and at + 1 < len(cell):
            at += 1
            out.append(_ESCAPES.get(cell[at], cell[at]))
        else:
            out.append(cell[at])
        at += 1
    return "".join(out)


def _typed(table: str, columns: Iterable[str], cells: Iterable[str | None]) -> dict[str, Any]:
    """A row's values, as far as they are of interest, from their texts."""
    wanted = {field.name: str(field.type) for field in msgspec.structs.fields(TABLES[table])}
    found: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        kind = wanted.get(column)
        if kind is None or cell is None:
            continue
        if "list[str]" in kind:
            found[column] = _array(cell)
        elif "dict" in kind:
            found[column] = json.loads(cell, parse_float=Decimal)
        elif "bool" in kind:
            found[column] = cell == "t"
        elif "datetime" in kind:
            found[column] = cell.replace(" ", "T")
        else:
            found[column] = cell
    return found


def _array(text: str) -> list[str]:
    """A one-dimensional text array: {a,"b,c",NULL}."""
    items, at = [], 1
    while at < len(text) - 1:
        if text[at] == '"':
            end, item = at + 1, []
            while text[end] != '"':
                end += text[end] == "\\"
                item.append(text[end])
                end += 1
            items.append("".join(item))
            at = end + 2
        else:
            end = text.find(",", at)
            end = len(text) - 1 if end < 0 else end
            if text[at:end] != "NULL":
                items.append(text[at:end])
            at = end + 1
    return items
