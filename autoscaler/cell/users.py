"""Redis users of machines: each reaches only what lies under its own prefix."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import redis

from autoscaler.cell.connection import Connection


class Users(Connection):
    """Makes and removes them; the digests of their passwords are in Postgres."""

    def set_user(self, machine: str, password_sha256_hex: str) -> None:
        """Make (or make again) the machine's user, and save the list where the server keeps one."""
        keys = self._machine(machine)
        self._acl("SETUSER", keys.redis_user, *keys.acl_rules(password_sha256_hex))
        self._save_users()

    def has_user(self, machine: str) -> bool:
        return self._acl("GETUSER", self._machine(machine).redis_user) is not None

    def delete_machine(self, machine: str) -> None:
        """Its user goes, with all its connections, and what control and agent told each other.

        Usage that was not booked yet stays.
        """
        keys = self._machine(machine)
        self._acl("DELUSER", keys.redis_user)
        self._save_users()
        self.redis.delete(keys.desired, keys.bell, keys.actual, keys.heartbeat())

    def _save_users(self) -> None:
        # A server without an ACL file refuses; the digests in Postgres make the users again.
        with contextlib.suppress(redis.ResponseError):
            self._acl("SAVE")

    def _acl(self, *args: str) -> Any:
        return cast(Any, self.redis).execute_command("ACL", *args)
