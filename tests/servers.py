"""Throwaway PostgreSQL and Redis of one test run: addresses first, servers when a test asks.

Settings are read when Django is imported, long before the first fixture runs; so ports and passwords are
settled at once (the ports held by bound sockets) and put into the environment, and a run that needs no
server starts none. The embedded ones always: a newer server on PATH would hide what the packaged one lacks.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
import time
from pathlib import Path

from infra.local.embedded import EmbeddedServer
from infra.local.postgres import EmbeddedPostgres
from infra.local.redis import EmbeddedRedis

_PREFIX = "corral-test-run-"
_YOUNG_S = 60


class ThrowawayServers:
    """Both servers of this run, in a temporary directory that `destroy` removes."""

    def __init__(self) -> None:
        _sweep()
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
        self._alive = (self.directory / "alive").open("w")
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self.directory.chmod(0o711)  # PostgreSQL runs as another user when we are root
        holds = _hold_port(), _hold_port()
        pg_port, redis_port = (int(hold.getsockname()[1]) for hold in holds)
        self.postgres = EmbeddedPostgres(self.directory / "postgres", pg_port, durable=False)
        self.redis = EmbeddedRedis(self.directory / "redis", redis_port)
        self._holds: dict[EmbeddedServer, socket.socket] = {self.postgres: holds[0], self.redis: holds[1]}

    def environment(self) -> dict[str, str]:
        """What every component reads, pointing at these servers."""
        return {
            "CORRAL_VAR": str(self.directory / "var"),
            "CORRAL_CELL": "c0",
            "CORRAL_REDIS_URL": self.redis.url(),
            "CORRAL_PG_DSN_OWNER": self.postgres.dsn("owner"),
            "CORRAL_PG_DSN_APP": self.postgres.dsn("app"),
            "CORRAL_PG_DSN_OPERATOR": self.postgres.dsn("operator"),
            "CORRAL_DB_ROLE": "app",
            "CORRAL_SECRET_KEY": secrets.token_urlsafe(48),
            "CORRAL_KEY_PEPPER": secrets.token_hex(32),
        }

    def start(self, server: EmbeddedServer) -> None:
        """Start one of the two (once); it answers when this returns."""
        hold = self._holds.pop(server, None)
        if hold is None:
            return
        hold.close()
        server.start()
        server.wait_ready()

    def destroy(self) -> None:
        """End both and remove their data."""
        for server in (self.redis, self.postgres):
            server.destroy()
        for hold in self._holds.values():
            hold.close()
        self._alive.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def _sweep() -> None:
    """Remove what killed runs left behind: a run that lives holds its file locked, soon after it has begun."""
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (directory / "alive").open("r+") as alive:
            if time.time() - directory.stat().st_mtime < _YOUNG_S:
                continue
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)


def _hold_port() -> socket.socket:
    """A free port nobody else is given until the socket is closed."""
    hold = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    hold.bind(("127.0.0.1", 0))
    return hold


SERVERS = ThrowawayServers()
os.environ.update(SERVERS.environment())
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "controlplane.settings")
