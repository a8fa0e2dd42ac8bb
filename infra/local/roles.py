"""The three PostgreSQL roles and the database they share, made by a superuser, again and again without harm.

`corral_owner` owns the schema and runs migrations; `corral_app` serves tenants and is subject to row-level
security; `corral_operator` is the house's own (its policies allow all rows). None is a superuser or may
bypass RLS: as superuser RLS is void. Called by postgres.py, and by hand for an external server. Grants on
tables are made by migrations.
"""

from collections.abc import Mapping

import psycopg
from psycopg import sql

OWNER, APP, OPERATOR = "corral_owner", "corral_app", "corral_operator"
ROLES = (OWNER, APP, OPERATOR)
DATABASE = "corral"
# What a session of a serving role waits for at most, where the process could not say so itself: a pooler in transaction
# mode refuses startup options.
_SERVING = {
    "statement_timeout": "10s",
    "lock_timeout": "3s",
    "idle_in_transaction_session_timeout": "30s",
}


def ensure_roles(
    superuser: psycopg.Connection, passwords: Mapping[str, str], *, owner_creates_databases: bool
) -> None:
    """Roles exist with these passwords and attributes. `owner_creates_databases` is for test servers."""
    for role in ROLES:
        found = superuser.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,)).fetchone()
        createdb = sql.SQL("CREATEDB" if owner_creates_databases and role == OWNER else "NOCREATEDB")
        superuser.execute(
            sql.SQL(
                "{verb} ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOREPLICATION {createdb} "
                "PASSWORD {password}"
            ).format(
                verb=sql.SQL("ALTER" if found else "CREATE"),
                role=sql.Identifier(role),
                createdb=createdb,
                password=sql.Literal(passwords[role]),
            )
        )
        superuser.execute(sql.SQL("ALTER ROLE {} SET timezone TO 'UTC'").format(sql.Identifier(role)))
        for name, value in _SERVING.items() if role != OWNER else ():
            superuser.execute(
                sql.SQL("ALTER ROLE {} SET {} TO {}").format(
                    sql.Identifier(role), sql.Identifier(name), sql.Literal(value)
                )
            )


def ensure_database(superuser: psycopg.Connection, name: str, template: str | None = None) -> None:
    """Database `name` exists, owned by corral_owner, open to our roles only. `superuser` autocommits."""
    if superuser.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,)).fetchone() is None:
        statement = sql.SQL("CREATE DATABASE {} OWNER {}").format(sql.Identifier(name), sql.Identifier(OWNER))
        if template is not None:
            statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
        superuser.execute(statement)
    database = sql.Identifier(name)
    superuser.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(database))
    superuser.execute(
        sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(
            database, sql.SQL(", ").join(map(sql.Identifier, (APP, OPERATOR)))
        )
    )


def ensure_schema(in_database: psycopg.Connection) -> None:
    """Schema public of this database belongs to corral_owner; the others may use it, not create in it."""
    in_database.execute(sql.SQL("ALTER SCHEMA public OWNER TO {}").format(sql.Identifier(OWNER)))
    in_database.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    in_database.execute(
        sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(
            sql.SQL(", ").join(map(sql.Identifier, (APP, OPERATOR)))
        )
    )
