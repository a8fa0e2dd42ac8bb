"""Who is told what: no process has a secret it does not need."""

import json
from pathlib import Path

import psycopg
import pytest

from infra.local.environment import (
    PROCESSES,
    adopt,
    external_dsns,
    given,
    process_environment,
    save,
    stack_environment,
    stack_secrets,
)
from infra.local.postgres import EmbeddedPostgres
from infra.local.stackconfig import StackConfig

DSNS = {
    role: f"postgresql://corral_{role}:{role}-password@127.0.0.1:1/corral"
    for role in ("owner", "app", "operator")
}


@pytest.fixture
def stack(tmp_path: Path) -> dict[str, str]:
    return stack_environment(
        StackConfig(var=tmp_path),
        ports={"gateway": 8000, "web": 8080, "control_metrics": 8090},
        engine="toy",
        pg_dsns=DSNS,
        redis_url="redis://corral:redis-password@127.0.0.1:1/0",
    )


def test_only_migrations_know_the_owner_and_gateways_neither_operator_nor_session_key(
    stack: dict[str, str],
) -> None:
    told = {kind: process_environment(kind, stack, {}) for kind in PROCESSES}
    assert {kind for kind, env in told.items() if "CORRAL_PG_DSN_OWNER" in env} == {"migrate"}
    assert "CORRAL_PG_DSN_OPERATOR" not in told["gateway"] and "CORRAL_SECRET_KEY" not in told["gateway"]
    assert {kind: env["CORRAL_DB_ROLE"] for kind, env in told.items()} == {
        "gateway": "app",
        "web": "app",
        "control": "operator",
        "beat": "operator",
        "quickstart": "operator",
        "migrate": "owner",
    }
    assert all(env["CORRAL_GATEWAY_URL"] == "http://127.0.0.1:8000" for env in told.values())


def test_what_we_inherit_passes_but_for_secrets_of_other_stacks(stack: dict[str, str]) -> None:
    inherited = {
        "PATH": "/bin",
        "CORRAL_LOG_LEVEL": "DEBUG",
        "CORRAL_SECRET_KEY": "x",
        "CORRAL_DATABASE_URL": "y",
    }
    env = process_environment("gateway", stack, inherited)
    assert (env["PATH"], env["CORRAL_LOG_LEVEL"]) == ("/bin", "DEBUG")
    assert "CORRAL_SECRET_KEY" not in env and "CORRAL_DATABASE_URL" not in env


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    first = stack_secrets(tmp_path)
    assert stack_secrets(tmp_path) == first
    assert len(bytes.fromhex(first["key_pepper"])) == 32 and len(first["secret_key"]) >= 50
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600


def test_command_run_by_hand_gets_the_environment_of_its_stack(tmp_path: Path, stack: dict[str, str]) -> None:
    save(tmp_path, stack)
    assert (tmp_path / "environment.json").stat().st_mode & 0o777 == 0o600
    environ = {"CORRAL_VAR": str(tmp_path), "CORRAL_LOG_LEVEL": "DEBUG"}
    adopt(["manage.py", "create_key", "k"], environ)
    assert environ["CORRAL_DB_ROLE"] == "operator" and environ["CORRAL_PG_DSN_APP"] == DSNS["app"]
    migrating = {"CORRAL_VAR": str(tmp_path)}
    adopt(["manage.py", "migrate"], migrating)
    assert migrating["CORRAL_DB_ROLE"] == "owner"


def test_and_the_settings_that_its_stack_was_started_with(tmp_path: Path, stack: dict[str, str]) -> None:
    at_start = {"CORRAL_MAX_MACHINES": "3", "CORRAL_CELL": "other", "CORRAL_DB_ROLE": "app", "PATH": "/bin"}
    at_start |= {
        "CORRAL_SECRET_KEY": "of another stack",
        "CORRAL_DATABASE_URL": "postgresql://admin:hush@h/d",
        "CORRAL_EMAIL_URL": "smtp://us:hush@h",
        "CORRAL_API_TOKEN": "hush",
    }
    save(tmp_path, given(at_start) | stack)
    environ = {"CORRAL_VAR": str(tmp_path)}
    adopt(["manage.py", "quarantine"], environ)
    assert environ["CORRAL_MAX_MACHINES"] == "3", "or it would go by another pool than the control worker"
    assert (environ["CORRAL_CELL"], environ["CORRAL_DB_ROLE"]) == (stack["CORRAL_CELL"], "operator")
    assert environ["CORRAL_SECRET_KEY"] == stack["CORRAL_SECRET_KEY"]
    assert "CORRAL_DATABASE_URL" not in environ and "PATH" not in environ
    assert "hush" not in (tmp_path / "environment.json").read_text()


@pytest.mark.parametrize("argv", [["manage.py"], ["manage.py", "up"], ["manage.py", "down"]])
def test_commands_over_the_stack_itself_are_left_alone(
    tmp_path: Path, stack: dict[str, str], argv: list[str]
) -> None:
    save(tmp_path, stack)
    environ = {"CORRAL_VAR": str(tmp_path)}
    adopt(argv, environ)
    assert environ == {"CORRAL_VAR": str(tmp_path)}


def test_environment_that_is_there_already_wins(tmp_path: Path, stack: dict[str, str]) -> None:
    save(tmp_path, stack)
    environ = {"CORRAL_VAR": str(tmp_path), "CORRAL_PG_DSN_APP": "postgresql://elsewhere"}
    adopt(["manage.py", "create_key"], environ)
    assert "CORRAL_REDIS_URL" not in environ


def test_administrators_url_makes_roles_and_database_on_an_external_server(
    tmp_path: Path, pg_server: EmbeddedPostgres
) -> None:
    before = json.loads((pg_server.base / "credentials.json").read_text())
    config = StackConfig(var=tmp_path, database_url=pg_server.dsn("superuser", "external"))
    try:
        dsns = external_dsns(config)
        assert external_dsns(config) == dsns
        with psycopg.connect(dsns["owner"], autocommit=True) as owner:
            owner.execute("CREATE TABLE mine (id int)")
        with psycopg.connect(dsns["app"]) as app, pytest.raises(psycopg.errors.InsufficientPrivilege):
            app.execute("CREATE TABLE intruder (id int)")
    finally:
        pg_server.drop_database("external")
        pg_server.bootstrap()  # roles are the server's: give them back the passwords of this run
    assert json.loads((pg_server.base / "credentials.json").read_text()) == before


def test_external_server_that_is_away_is_named_without_its_password(tmp_path: Path) -> None:
    config = StackConfig(var=tmp_path, database_url="postgresql://admin:hush@127.0.0.1:1/corral")
    with pytest.raises(RuntimeError, match=r"CORRAL_DATABASE_URL \(127.0.0.1:1\)") as caught:
        external_dsns(config)
    assert "hush" not in str(caught.value)
