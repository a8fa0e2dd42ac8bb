"""Run by the published litellm's own Python, not by ours: `with_the_package.py DSN` fills an empty database.

Applies the migrations that litellm-proxy-extras brings, then makes keys with the proxy's own generation function and
client class; only Prisma's engine, which comes from elsewhere than PyPI, is replaced by a few lines of SQL. Prints
JSON: versions, and the text of every key, which litellm itself stores nowhere.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"

import psycopg
from psycopg import sql


def migrate(connection: psycopg.Connection[Any]) -> int:
    """Every migration of the package, in order."""
    import litellm_proxy_extras

    found = sorted((Path(litellm_proxy_extras.__file__).parent / "migrations").glob("*/migration.sql"))
    for path in found:
        connection.execute(path.read_text())
    return len(found)


class Table:
    """The one call that the proxy makes of Prisma where it stores a row."""

    def __init__(self, connection: psycopg.Connection[Any], name: str) -> None:
        self._connection = connection
        self._name = name

    async def upsert(self, where: dict[str, Any], data: dict[str, Any], **_: Any) -> Any:
        row = insert(self._connection, self._name, data["create"], list(where))
        return SimpleNamespace(**row)


def insert(
    connection: psycopg.Connection[Any], table: str, values: dict[str, Any], unique: list[str]
) -> dict[str, Any]:
    """Insert, unless it is there; what is JSON there arrives as text already, or as a dict."""
    given = {
        name: json.dumps(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if value is not None
    }
    statement = sql.SQL(
        "INSERT INTO {} ({}) VALUES ({}) ON CONFLICT ({}) DO NOTHING RETURNING row_to_json({}.*)"
    ).format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, given)),
        sql.SQL(", ").join(sql.Placeholder() for _ in given),
        sql.SQL(", ").join(map(sql.Identifier, unique)),
        sql.Identifier(table),
    )
    found = connection.execute(statement, list(given.values())).fetchone()
    return dict(found[0]) if found else {}


def rows(connection: psycopg.Connection[Any]) -> None:
    """What the keys belong to: an organization, budgets, teams, people."""
    by = {"created_by": "admin", "updated_by": "admin"}
    stamp = {"updated_at": datetime.now(UTC).replace(tzinfo=None)}
    for budget in (
        {"budget_id": "b-org", "max_budget": 5000.0, "budget_duration": "30d", "rpm_limit": 9000},
        {"budget_id": "b-shared", "soft_budget": 2.5, "max_budget": 4.25, "budget_duration": "1d"},
    ):
        insert(connection, "LiteLLM_BudgetTable", {**budget, **by, **stamp}, ["budget_id"])
    organization = {
        "organization_id": "org-research", "organization_alias": "Research", "budget_id": "b-org", "models": [],
        "spend": 1.0,
    }  # fmt: skip
    insert(connection, "LiteLLM_OrganizationTable", {**organization, **by, **stamp}, ["organization_id"])
    aliases = {"aliases": {"gpt-4o": "toy-chat"}}
    model_id = insert(connection, "LiteLLM_ModelTable", {**aliases, **by, **stamp}, ["id"])["id"]
    for team in (
        {
            "team_id": "team-search", "team_alias": "Search", "organization_id": "org-research", "tpm_limit": 100_000,
            "rpm_limit": 600, "max_budget": 100.0, "budget_duration": "7d", "spend": 12.5, "model_id": model_id,
            "models": ["toy-chat", "gpt-4o", "team/*"],
        },
        {"team_id": "team-old", "team_alias": "Old", "blocked": True, "models": []},
        {"team_id": "litellm-dashboard", "team_alias": "UI", "models": []},
    ):  # fmt: skip
        insert(connection, "LiteLLM_TeamTable", {**team, **stamp}, ["team_id"])
    for user in (
        {"user_id": "u-ada", "user_email": "ada@example.org", "models": [], "max_budget": 10.0, "spend": 4.0},
        {"user_id": "u-bob", "user_email": "bob@example.org", "models": [], "user_role": "proxy_admin"},
    ):
        insert(connection, "LiteLLM_UserTable", user, ["user_id"])


# (name, what the generation function is given)
KEYS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "search",
        {
            "key_alias": "search backend", "team_id": "team-search", "models": ["toy-chat"], "rpm_limit": 60,
            "tpm_limit": 20_000, "max_parallel_requests": 8, "key_max_budget": 25.5, "key_budget_duration": "30d",
            "metadata": {"tags": ["prod", "eu"]}, "aliases": {"fast": "toy-chat"}, "user_id": "u-bob",
        },
    ),
    ("team", {"key_alias": "whole team", "team_id": "team-search", "models": ["all-team-models"]}),
    ("ada", {"key_alias": "ada's own", "user_id": "u-ada", "models": []}),
    ("shared", {"key_alias": "shared budget", "budget_id": "b-shared", "models": []}),
    ("expiring", {"key_alias": "a month", "duration": "30d", "models": []}),
    ("blocked", {"key_alias": "blocked", "blocked": True, "models": []}),
    ("old", {"key_alias": "of a blocked team", "team_id": "team-old", "models": []}),
    ("chat only", {"key_alias": "chat only", "allowed_routes": ["/chat/completions"], "models": []}),
    ("custom", {"key_alias": "own text", "key": "sk-my-own-secret-text", "models": []}),
    ("manager", {"key_alias": "manages", "key_type": "management", "allowed_routes": ["management_routes"]}),
    ("dashboard", {"team_id": "litellm-dashboard", "duration": "24h"}),
)  # fmt: skip


async def keys(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """{name: text} of keys made by the proxy's own code."""
    from litellm.proxy import proxy_server
    from litellm.proxy.management_endpoints.key_management_endpoints import generate_key_helper_fn
    from litellm.proxy.utils import PrismaClient

    client = object.__new__(PrismaClient)  # without the engine: its own insert_data and hash_token are used
    client.db = SimpleNamespace(  # type: ignore[misc]
        litellm_verificationtoken=Table(connection, "LiteLLM_VerificationToken"),
        litellm_usertable=Table(connection, "LiteLLM_UserTable"),
    )
    proxy_server.prisma_client = client
    made = {}
    for name, given in KEYS:
        answer = await generate_key_helper_fn(request_type="key", table_name="key", **given)
        made[name] = answer["token"]
    return made


def after(connection: psycopg.Connection[Any], made: dict[str, str]) -> None:
    """What time does: a key expired, and one was rotated with a grace period."""
    from litellm.proxy.utils import hash_token

    now = datetime.now(UTC).replace(tzinfo=None)
    connection.execute(
        'UPDATE "LiteLLM_VerificationToken" SET expires = %s WHERE token = %s',
        (now - timedelta(days=1), hash_token(made["manager"])),
    )
    old = "sk-text-before-the-rotation"
    connection.execute(
        'INSERT INTO "LiteLLM_DeprecatedVerificationToken" (id, token, active_token_id, revoke_at) '
        "VALUES (%s, %s, %s, %s)",
        ("d-1", hash_token(old), hash_token(made["search"]), now + timedelta(days=2)),
    )
    made["rotated"] = old


def main() -> None:
    with psycopg.connect(sys.argv[1], autocommit=True) as connection:
        n = migrate(connection)
        rows(connection)
        made = asyncio.run(keys(connection))
        after(connection, made)
    version = {name: importlib.metadata.version(name) for name in ("litellm", "litellm-proxy-extras")}
    print(json.dumps({"versions": version, "migrations": n, "keys": made}))


if __name__ == "__main__":
    main()
