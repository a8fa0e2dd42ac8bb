"""Changing the secrets of the running local stack while it works: the new one is added beside the old, processes learn
of it one by one, then the old one ends.

Called by `manage.py rotate` and by the drill. Every step can be repeated: what a killed rotation left half-way is gone
on with. Secrets are never printed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psycopg
from psycopg import sql

from infra.local import environment
from infra.local.postgres import EmbeddedPostgres
from infra.local.privatefile import read_json, write_private_json
from infra.local.redis import EmbeddedRedis
from infra.local.rolling import restart_all
from infra.local.stackconfig import ROOT

KINDS: Final = ("pepper", "secret-key", "database", "redis")
_KEYS: Final = (sql.Identifier("tenants_apikey"),)
_TOKENS: Final = (sql.Identifier("tenants_managementtoken"), sql.Identifier("scim_scimtoken"))
RESEAL_TIMEOUT_S: Final = 300.0
_OLD: Final = sql.SQL(
    "SELECT count(*) FROM {} WHERE revoked_at IS NULL AND (expires_at IS NULL OR expires_at > now()) AND pepper <> %s"
)


class RotationError(RuntimeError):
    """It cannot be done as things are; the message says why and what to do."""


@dataclass(frozen=True)
class Left:
    """Keys and tokens that still need the former pepper: they were not used since it changed."""

    n_keys: int
    n_tokens: int

    def __bool__(self) -> bool:
        return bool(self.n_keys or self.n_tokens)


class Rotation:
    """Of one running stack with embedded servers."""

    def __init__(self, var: Path, say: Callable[[str], None]) -> None:
        self._var = var
        self._say = say
        ports = read_json(var / "ports.json") or {}
        self._postgres = (
            EmbeddedPostgres(var / "postgres", ports["postgres"]) if "postgres" in ports else None
        )
        self._redis = EmbeddedRedis(var / "redis", ports["redis"]) if "redis" in ports else None

    def rotate(self, kinds: Iterable[str]) -> None:
        """Replace these secrets. The former pepper and secret key stay valid until `finish`."""
        kinds = set(kinds)
        for kind, server in (("database", self._postgres), ("redis", self._redis)):
            if kind in kinds and server is None:
                raise RotationError(
                    f"{kind}: this stack uses a server of yours; change its passwords there (docs/operations.md)"
                )
        if "database" in kinds and self._postgres:
            self._postgres.rotate_logins()
            self._say("database: second logins work")
        if "redis" in kinds and self._redis:
            self._redis.rotate_password()
            self._say("redis: a second password works")
        kept = environment.stack_secrets(self._var)
        if "secret-key" in kinds:
            if "secret_key_previous" in kept:
                self._reseal()  # what lies under the one before would be lost
            kept |= {"secret_key_previous": kept["secret_key"], "secret_key": secrets.token_urlsafe(48)}
        if "pepper" in kinds:
            kept.setdefault("digest_secret", kept["key_pepper"])  # where the two were one
            kept.setdefault("key_pepper_next", secrets.token_hex(32))
        self._spread(kept)
        if "pepper" in kinds:  # everybody accepts it: now it may be written
            kept |= {"key_pepper_previous": kept["key_pepper"], "key_pepper": kept.pop("key_pepper_next")}
            self._spread(kept)
        if "secret-key" in kinds:
            self._reseal()
        if "database" in kinds and self._postgres:
            self._postgres.retire_logins()
            self._say("database: the former logins have ended")
        if "redis" in kinds and self._redis:
            self._redis.retire_password()
            self._say("redis: the former password has ended")

    def finish(self, kinds: Iterable[str], *, force: bool = False) -> None:
        """Former pepper and secret key end. RotationError while keys still need the pepper, unless `force`."""
        kept = environment.stack_secrets(self._var)
        kinds = set(kinds)
        left = self.left()
        if "pepper" in kinds and left and not force:
            raise RotationError(
                f"{left.n_keys} keys and {left.n_tokens} tokens were not used since the pepper changed and would be "
                "worthless: wait, revoke them, or end them with --force"
            )
        if "secret-key" in kinds and "secret_key_previous" in kept:
            self._reseal()
        for kind, name in (("pepper", "key_pepper_previous"), ("secret-key", "secret_key_previous")):
            if kind in kinds:
                kept.pop(name, None)
        self._spread(kept)

    def left(self) -> Left:
        """What is not kept under the present pepper yet."""
        pepper = bytes.fromhex(environment.stack_secrets(self._var)["key_pepper"])
        present = hashlib.sha256(b"pepper id\0" + pepper).hexdigest()[:8]
        dsn = environment.load(self._var)["CORRAL_PG_DSN_OPERATOR"]
        with psycopg.connect(dsn, connect_timeout=5) as operator:

            def count(tables: Iterable[sql.Identifier]) -> int:
                found = (operator.execute(_OLD.format(table), (present,)).fetchone() for table in tables)
                return sum(int(row[0]) for row in found if row)

            return Left(n_keys=count(_KEYS), n_tokens=count(_TOKENS))

    def _reseal(self) -> None:
        """Secrets that must be read again are sealed under the present key. RotationError where that did not work."""
        stack = environment.load(self._var)
        done = subprocess.run(
            [sys.executable, "manage.py", "reseal"],
            cwd=ROOT,
            env=environment.process_environment("control", stack, os.environ)
            | {"CORRAL_LOG_LEVEL": "WARNING"},
            capture_output=True,
            text=True,
            timeout=RESEAL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise RotationError(f"reseal: {done.stderr.strip().rpartition(chr(10))[2]}; run it again")
        self._say(f"secret-key: {done.stdout.strip()}")

    def _spread(self, kept: dict[str, str]) -> None:
        """Into the files that processes are started from, and into the processes."""
        write_private_json(self._var / "secrets.json", kept)
        stack = environment.load(self._var) | environment.secret_variables(self._var)
        if self._postgres:
            for role in ("owner", "app", "operator"):
                stack[f"CORRAL_PG_DSN_{role.upper()}"] = self._postgres.dsn(role)
        if self._redis:
            stack["CORRAL_REDIS_URL"] = self._redis.url()
        environment.save(self._var, stack)
        restart_all(self._var, self._say)
