"""A real PgBouncer in transaction mode before the run's PostgreSQL."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psycopg

from infra.local.ports import HOST, free_port
from infra.local.postgres import EmbeddedPostgres
from infra.local.process import spawn, unprivileged_account
from tests.infra.local.conditions import until

PROGRAM = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")


@dataclass(frozen=True)
class Pooler:
    """`pool_size` server connections for each role."""

    server: EmbeddedPostgres
    port: int

    def dsn(self, role: str) -> str:
        parts = urlsplit(self.server.dsn(role))
        return parts._replace(netloc=f"{parts.username}:{parts.password}@{HOST}:{self.port}").geturl()


@contextmanager
def pooler(server: EmbeddedPostgres, *, pool_size: int) -> Iterator[Pooler]:
    """Started on a free port, ended and removed afterwards."""
    assert PROGRAM is not None
    account = unprivileged_account()  # PgBouncer refuses root
    directory = Path(tempfile.mkdtemp(prefix="corral-pooler-"))
    port = free_port()
    roles = [urlsplit(server.dsn(role)) for role in ("app", "operator")]
    users, settings = directory / "users.txt", directory / "pgbouncer.ini"
    users.write_text("".join(f'"{role.username}" "{role.password}"\n' for role in roles))
    settings.write_text(
        f"[databases]\ncorral = host={HOST} port={server.port}\n"
        f"[pgbouncer]\nlisten_addr = {HOST}\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = scram-sha-256\nauth_file = {users}\npool_mode = transaction\n"
        f"default_pool_size = {pool_size}\nmax_client_conn = 200\nquery_wait_timeout = 10\n"
    )
    if account is not None:
        for path in (directory, users, settings):
            os.chown(path, account.uid, account.gid)
    log = directory / "log"
    process: subprocess.Popen[bytes] = spawn(
        [PROGRAM, str(settings)], env={"PATH": os.defpath}, log_path=log, account=account
    )
    try:
        found = Pooler(server, port)

        def answers() -> bool:
            assert process.poll() is None, log.read_text()
            try:
                psycopg.connect(found.dsn("app"), connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers, "the pooler answers")
        yield found
    finally:
        process.kill()
        process.wait(5)
        shutil.rmtree(directory, ignore_errors=True)
