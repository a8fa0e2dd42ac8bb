"""A LiteLLM proxy's database on the run's Postgres, with rows as its own code would write them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from controlplane.gateway.directory import PgDirectory
from infra.local.postgres import EmbeddedPostgres
from tests.controlplane.gateway.harness import Running

TABLES = Path(__file__).with_name("tables.sql")
# Texts of keys, by name; LiteLLM stores their SHA-256.
TEXTS = {
    name: f"sk-{name}-AbC_dEf-0123456789"
    for name in (
        "search",
        "team",
        "ada",
        "loose",
        "blocked",
        "old",
        "expired",
        "manager",
        "dashboard",
        "shared",
    )
}


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def database(server: EmbeddedPostgres, name: str = "litellm_proxy") -> Iterator[str]:
    """The DSN of an empty database of this name, gone afterwards."""
    with server.connect() as superuser:
        superuser.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield f"{server.dsn('superuser').rpartition('/')[0]}/{name}"
    finally:
        with server.connect() as superuser:
            superuser.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def put(connection: psycopg.Connection[Any], table: str, **values: Any) -> None:
    given = {n: json.dumps(v) if isinstance(v, dict) else v for n, v in values.items()}
    connection.execute(
        sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
            sql.Identifier(table),
            sql.SQL(", ").join(map(sql.Identifier, given)),
            sql.SQL(", ").join(sql.Placeholder() for _ in given),
        ),
        list(given.values()),
    )


def put_key(connection: psycopg.Connection[Any], name: str, **values: Any) -> None:
    text = TEXTS[name]
    row = {"key_name": f"sk-...{text[-4:]}", "key_alias": f"{name} key", "models": [], **values}
    put(connection, "LiteLLM_VerificationToken", token=sha256(text), **row)


def fill(dsn: str) -> None:
    """One of everything."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(TABLES.read_text())
        put(
            connection, "LiteLLM_BudgetTable", budget_id="b1", max_budget=5000.0, budget_duration="30d",
            rpm_limit=9000,
        )  # fmt: skip
        put(connection, "LiteLLM_BudgetTable", budget_id="b2", soft_budget=2.5, max_budget=4.25)
        put(
            connection, "LiteLLM_OrganizationTable", organization_id="o1", organization_alias="Research & Co.",
            budget_id="b1", models=[],
        )  # fmt: skip
        put(connection, "LiteLLM_ModelTable", aliases={"gpt-4o": "toy-chat"})
        put(
            connection, "LiteLLM_TeamTable", team_id="t1", team_alias="Search", organization_id="o1", rpm_limit=600,
            tpm_limit=100_000, max_budget=0.1, budget_duration="7d", spend=12.5, model_id=1,
            models=["toy-chat", "gpt-4o", "team/*"],
        )  # fmt: skip
        put(connection, "LiteLLM_TeamTable", team_id="t2", team_alias="Search", models=[], blocked=True)
        put(connection, "LiteLLM_UserTable", user_id="u1", user_email="ada@example.org", models=[], max_budget=10,
            spend=4)  # fmt: skip
        put(connection, "LiteLLM_UserTable", user_id="u2", user_email="bob@example.org", models=[])
        put(connection, "LiteLLM_EndUserTable", user_id="e1", budget_id="b2")
        put(connection, "LiteLLM_SpendLogs", request_id="r1", messages={"secret": "a prompt\tof\nsomebody"})
        put_key(
            connection, "search", team_id="t1", user_id="u2", models=["toy-chat", "elsewhere"], rpm_limit=60,
            tpm_limit=20_000, max_parallel_requests=8, max_budget=25.1, budget_duration="30d", spend=3.3,
            metadata={"tags": ["prod", "eu, west"], "guardrails": ["pii"]}, aliases={"fast": "toy-chat"},
            model_max_budget={"toy-chat": {"budget_limit": 1.5, "time_period": "1d"}},
        )  # fmt: skip
        put_key(connection, "team", team_id="t1", models=["all-team-models"])
        put_key(connection, "ada", user_id="u1")
        put_key(connection, "loose", allowed_routes=["/chat/completions"], expires="2099-01-02 03:04:05")
        put_key(connection, "shared", budget_id="b2", spend=1.25)
        put_key(connection, "blocked", blocked=True)
        put_key(connection, "old", team_id="t2")
        put_key(connection, "expired", expires="2024-01-01 00:00:00")
        put_key(connection, "manager", allowed_routes=["management_routes"])
        put_key(connection, "dashboard", team_id="litellm-dashboard")


CONFIG = """
model_list:
  - model_name: toy-chat
    litellm_params: {model: hosted_vllm/Qwen/Qwen3-8B, api_base: http://10.0.0.7:8000/v1, api_key: secret-in-the-file}
  - model_name: claude
    litellm_params: {model: anthropic/claude-sonnet-4-5, api_key: os.environ/ANTHROPIC_API_KEY}
    model_info: {access_groups: [big]}
  - model_name: gpt-4.1
    litellm_params: {model: gpt-4.1}
    model_info: {access_groups: [big]}
router_settings:
  model_group_alias: {latest: toy-chat}
  fallbacks: [{claude: [gpt-4.1]}]
litellm_settings: {timezone: Europe/Berlin, callbacks: [langfuse]}
general_settings: {master_key: sk-1234, alerting: [slack]}
"""


def ask_postgres(gw: Running, directory: PgDirectory) -> None:
    """This gateway's keys and changes come from there, not from the harness' memory."""
    gw.gateway.key_cache._directory = gw.gateway.feed._directory = directory
    gw.gateway.feed._watermark = None
