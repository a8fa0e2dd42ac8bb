"""The migrations are the models, and can be undone."""

import subprocess
import sys
from io import StringIO

import psycopg
import pytest
from django.core.management import call_command

from infra.local.postgres import EmbeddedPostgres
from tests.database import acting_as


@pytest.mark.django_db
def test_no_model_has_changed_without_a_migration() -> None:
    with acting_as("corral_owner"):  # it reads the history, which is none of the serving roles' business
        said = StringIO()
        call_command("makemigrations", check=True, dry_run=True, stdout=said)
    assert said.getvalue() == "No changes detected\n"


def test_migrations_can_be_undone_and_done_again(pg_server: EmbeddedPostgres, monkeypatch) -> None:
    name = "corral_undo"
    pg_server.create_database(name)
    monkeypatch.setenv("CORRAL_DB_ROLE", "owner")
    monkeypatch.setenv("CORRAL_PG_DSN_OWNER", pg_server.dsn("owner", name))

    def migrate(*arguments: str) -> None:
        command = [sys.executable, "manage.py", "migrate", "--verbosity=0", *arguments]
        subprocess.run(command, check=True, timeout=60)

    def objects() -> set[tuple[str, ...]]:
        with psycopg.connect(pg_server.dsn("owner", name)) as owner:
            return set(
                owner.execute(
                    "SELECT 'function', proname FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
                    "UNION ALL SELECT 'table', relname FROM pg_class "
                    "WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') "
                    "UNION ALL SELECT 'policy', tablename || '.' || policyname FROM pg_policies"
                ).fetchall()
            )

    try:
        migrate()
        there = objects()
        migrate("autoscaler", "zero")
        migrate("deployments", "zero")
        migrate("billing", "zero")
        migrate("tenants", "0001")
        assert not {item for item in objects() if item[0] in ("function", "policy")}
        migrate()
        assert objects() == there
    finally:
        pg_server.drop_database(name)
