"""An embedded PostgreSQL 18: the server of a PyPI package, run the way a server should be.

SCRAM for everybody, TCP on loopback only, no socket, fsync on, an unprivileged account under root; data,
passwords and roles survive restarts, kill -9 and reboots. Called by stack.py and the tests. Must never trust
a connection, log a statement, or end a process that is not this data directory's.
"""

import os
import secrets
import signal
import subprocess
from pathlib import Path

import psycopg
from psycopg import sql

from infra.local import roles
from infra.local.embedded import HOST, EmbeddedServer
from infra.local.pghome import PostgresHome, remove_home, resolve_home
from infra.local.privatefile import read_json, write_private_json
from infra.local.process import unprivileged_account

SUPERUSER = "postgres"

_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "max_connections": "200",  # 2 gateways, web threads, control threads, a human with psql
    "superuser_reserved_connections": "5",
    "shared_buffers": "64MB",
    "huge_pages": "off",
    "io_method": "sync",  # the default keeps three worker processes for a load this server never sees
    "jit": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "max_logical_replication_workers": "0",
    "min_wal_size": "32MB",
    "max_wal_size": "256MB",
    "synchronous_commit": "on",  # the ledger lives here: a commit that was answered is on disk
    "timezone": "UTC",
    "log_timezone": "UTC",
    "lc_messages": "C",
    "log_checkpoints": "off",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "log_min_error_statement": "panic",  # statements hold values
    "log_error_verbosity": "terse",  # and so do DETAIL lines
}
_NOT_DURABLE = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off", "autovacuum": "off"}
_HBA = f"# Written at every start: no socket, no trust, loopback only\nhost all all {HOST}/32 scram-sha-256\n"


class EmbeddedPostgres(EmbeddedServer):
    """One server over one data directory; `start`, `wait_ready`, `stop`: see EmbeddedServer.

    `durable` False turns fsync off and lets corral_owner create databases: for throwaway test servers only.
    """

    program = "postgres"
    # fast shutdown, immediate shutdown, last resort
    stop_steps = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))

    def __init__(self, data_dir: Path, port: int | None = None, *, durable: bool = True) -> None:
        super().__init__(data_dir, port)
        self.account = unprivileged_account()
        self.durable = durable
        self._credentials_path = self.base / "credentials.json"
        self._home: PostgresHome | None = None

    def _prepare(self) -> None:
        self._home = resolve_home(self.base, self.account)
        if not (self._home.data / "PG_VERSION").exists():
            self._initdb(self._home)
        self._end_leftovers(self._home.data)
        # PostgreSQL refuses to start when a stale file's pid is anybody's by now (a container's restart).
        (self._home.data / "postmaster.pid").unlink(missing_ok=True)
        settings = {**_SETTINGS, **({} if self.durable else _NOT_DURABLE), "port": str(self.port)}
        lines = [f"{name} = '{value}'" for name, value in settings.items()]
        self._write_for_server("postgresql.conf", "# Written at every start.\n" + "\n".join(lines) + "\n")
        self._write_for_server("pg_hba.conf", _HBA)

    def argv(self) -> list[str]:
        """Command of the server, once prepared."""
        home = self._prepared()
        return [str(home.bin / "postgres"), "-D", str(home.data)]

    def is_ready(self) -> bool:
        """Whether a query is answered now."""
        try:
            with self.connect(timeout_s=2) as connection:
                return connection.execute("SELECT 1").fetchone() == (1,)
        except psycopg.OperationalError:
            return False

    def destroy(self) -> None:
        """Stop and delete the data for good."""
        self.stop()
        remove_home(self.base)

    # -- databases and roles ---------------------------------------------------------------------------------

    def bootstrap(self) -> None:
        """Roles, database `corral`, ownership of its schema; safe to repeat."""
        with self.connect() as superuser:
            roles.ensure_roles(superuser, self._credentials(), owner_creates_databases=not self.durable)
        self.create_database(roles.DATABASE)

    def rotate_logins(self) -> None:
        """New passwords on the other login of each role; `dsn` names it from now on. The former work on."""
        credentials = roles.rotated(self._credentials())
        write_private_json(self._credentials_path, credentials)
        with self.connect() as superuser:
            roles.ensure_roles(superuser, credentials, owner_creates_databases=not self.durable)

    def retire_logins(self) -> None:
        """The former logins end, with the sessions that still have them."""
        credentials = roles.retired(self._credentials())
        with self.connect() as superuser:
            roles.ensure_roles(superuser, credentials, owner_creates_databases=not self.durable)
        write_private_json(self._credentials_path, credentials)

    def create_database(self, name: str, template: str | None = None) -> None:
        """A database beside `corral`, set up like it; `template` (idle, without connections) is copied."""
        with self.connect() as superuser:
            roles.ensure_database(superuser, name, template)
        with self.connect(name) as in_database:
            roles.ensure_schema(in_database)

    def drop_database(self, name: str) -> None:
        """Drop it if it exists, ending its connections."""
        with self.connect() as superuser:
            superuser.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def dsn(self, role: str, database: str = roles.DATABASE) -> str:
        """postgresql:// URL of `owner`, `app`, `operator` or `superuser`. Holds a password: never log it."""
        passwords = self._credentials()
        user = SUPERUSER if role == "superuser" else roles.login_of(f"corral_{role}", passwords)
        if user not in passwords:
            raise ValueError(f"role {role!r}: must be owner, app, operator or superuser")
        return f"postgresql://{user}:{passwords[user]}@{HOST}:{self.port}/{database}"

    def connect(self, database: str = "postgres", timeout_s: int = 5) -> psycopg.Connection:
        """A superuser connection in autocommit, for set-up only."""
        dsn = self.dsn("superuser", database)
        return psycopg.connect(dsn, autocommit=True, connect_timeout=timeout_s, sslmode="disable")

    # -- inside ----------------------------------------------------------------------------------------------

    def _prepared(self) -> PostgresHome:
        if self._home is None:
            raise RuntimeError("prepare() or start() first")
        return self._home

    def _credentials(self) -> dict[str, str]:
        """Role → password, made up on first use. URL-safe characters, so they need no quoting in a DSN."""
        stored = read_json(self._credentials_path)
        if stored is None:
            if self._home is not None and (self._home.data / "PG_VERSION").exists():
                raise RuntimeError(f"{self._credentials_path} is gone: restore it, or remove {self.base}")
            stored = {role: secrets.token_urlsafe(24) for role in (SUPERUSER, *roles.ROLES)}
            write_private_json(self._credentials_path, stored)
        return dict(stored)

    def _initdb(self, home: PostgresHome) -> None:
        """Initialise beside the final place and rename: a half-made directory never counts."""
        fresh, password_file = home.root / "data.new", home.root / "data.password"
        if fresh.exists():
            subprocess.run(["/bin/rm", "-rf", str(fresh)], check=True, timeout=60)
        fresh.mkdir(mode=0o700)
        password_file.unlink(missing_ok=True)
        descriptor = os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(self._credentials()[SUPERUSER] + "\n")
        if self.account:
            os.chown(fresh, self.account.uid, self.account.gid)
            os.chown(password_file, self.account.uid, self.account.gid)
        try:
            made = subprocess.run(
                [
                    str(home.bin / "initdb"),
                    f"--pgdata={fresh}",
                    f"--username={SUPERUSER}",
                    f"--pwfile={password_file}",
                    "--auth=scram-sha-256",
                    "--encoding=UTF8",
                    "--locale-provider=builtin",
                    "--locale=C.UTF-8",  # the same order on every machine, none of its locales needed
                    "--no-instructions",
                    *([] if self.durable else ["--no-sync"]),
                ],
                cwd="/",
                env=self.env(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                user=self.account.uid if self.account else None,
                group=self.account.gid if self.account else None,
                extra_groups=[] if self.account else None,
            )
        finally:
            password_file.unlink(missing_ok=True)
        if made.returncode != 0:
            raise RuntimeError(f"initdb failed in {fresh}:\n{made.stdout}{made.stderr}")
        fresh.rename(home.data)

    def _write_for_server(self, name: str, text: str) -> None:
        path = self._prepared().data / name
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        if self.account:
            os.chown(path, self.account.uid, self.account.gid)
