"""The three PostgreSQL roles and the database they share, made by a superuser, again and again without harm.

`corral_owner` owns the schema and runs migrations; `corral_app` serves tenants and is subject to row-level
security; `corral_operator` is the house's own (its policies allow all rows). None is a superuser or may
bypass RLS: as superuser RLS is void. Called by postgres.py, and by hand for an external server. Grants on
tables are made by migrations.
"""

import secrets
from collections.abc import Mapping

import psycopg
from psycopg import sql

OWNER, APP, OPERATOR = "corral_owner", "corral_app", "corral_operator"
ROLES = (OWNER, APP, OPERATOR)
DATABASE = "corral"
_SECOND = "_b"  # of the other login of a role
_ACTIVE = "login:"  # before a role in a credentials file: which of its logins processes use
# What a session of a serving role waits for at most, where the process could not say so itself: a pooler in transaction
# mode refuses startup options.
_SERVING = {
    "statement_timeout": "10s",
    "lock_timeout": "3s",
    "idle_in_transaction_session_timeout": "30s",
}


def login_of(role: str, credentials: Mapping[str, str]) -> str:
    """Who processes log in as to act as this role: itself, or its second login (`rotated`)."""
    return credentials.get(_ACTIVE + role, role)


def rotated(credentials: Mapping[str, str]) -> dict[str, str]:
    """The same with a new password on the other login of each role, which is the active one from now on.

    A role has one password; two logins that act as the same role have two, so that nobody is locked out meanwhile.
    What is half-way through a rotation stays as it is.
    """
    found = dict(credentials)
    if not is_rotating(found):
        for role in ROLES:
            other = role if login_of(role, found) != role else role + _SECOND
            found[other] = secrets.token_urlsafe(24)
            found[_ACTIVE + role] = other
    return found


def is_rotating(credentials: Mapping[str, str]) -> bool:
    """Whether former logins still work."""
    return any(role in credentials and role + _SECOND in credentials for role in ROLES)


def retired(credentials: Mapping[str, str]) -> dict[str, str]:
    """The same without the logins that are not active."""
    dead = {name for role in ROLES for name in (role, role + _SECOND) if name != login_of(role, credentials)}
    return {name: value for name, value in credentials.items() if name not in dead}


def ensure_roles(
    superuser: psycopg.Connection, passwords: Mapping[str, str], *, owner_creates_databases: bool
) -> None:
    """Roles exist with these passwords and attributes; a login that is not named has none, and its sessions end.

    `owner_creates_databases` is for test servers.
    """
    for role in ROLES:
        createdb = owner_creates_databases and role == OWNER
        _ensure_login(superuser, role, passwords.get(role), createdb=createdb)
        second = role + _SECOND
        if second in passwords or _exists(superuser, second):
            _ensure_login(superuser, second, passwords.get(second), createdb=False)
            names = {"role": sql.Identifier(role), "second": sql.Identifier(second)}
            superuser.execute(sql.SQL("GRANT {role} TO {second}").format(**names))
            superuser.execute(sql.SQL("ALTER ROLE {second} SET role TO {role}").format(**names))


def _ensure_login(superuser: psycopg.Connection, name: str, password: str | None, *, createdb: bool) -> None:
    found = _exists(superuser, name)
    superuser.execute(
        sql.SQL(
            "{verb} ROLE {role} LOGIN NOSUPERUSER NOBYPASSRLS NOCREATEROLE NOREPLICATION {createdb} "
            "PASSWORD {password}"
        ).format(
            verb=sql.SQL("ALTER" if found else "CREATE"),
            role=sql.Identifier(name),
            createdb=sql.SQL("CREATEDB" if createdb else "NOCREATEDB"),
            password=sql.SQL("NULL") if password is None else sql.Literal(password),
        )
    )
    settings = {"timezone": "UTC", **({} if name.startswith(OWNER) else _SERVING)}
    for setting, value in settings.items():
        superuser.execute(
            sql.SQL("ALTER ROLE {} SET {} TO {}").format(
                sql.Identifier(name), sql.Identifier(setting), sql.Literal(value)
            )
        )
    if password is None:
        superuser.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", (name,)
        )


def _exists(superuser: psycopg.Connection, name: str) -> bool:
    return superuser.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (name,)).fetchone() is not None


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
