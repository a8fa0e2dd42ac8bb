"""Redis users of machines: each reaches only what lies under its own prefix."""

from __future__ import annotations

import contextlib
from typing import Any, cast

import redis

from autoscaler.cell.connection import Connection
from autoscaler.cell.desired import BELL_MAX


class Users(Connection):
    """Makes and removes them; the digests of their passwords are in Postgres."""

    def set_user(self, machine: str, *passwords_sha256_hex: str) -> None:
        """Make (or make again) the machine's user, with these passwords and no others, and save the list where the
        server keeps one. Who is connected stays so.
        """
        keys = self._machine(machine)
        self._acl("SETUSER", keys.redis_user, *keys.acl_rules(*passwords_sha256_hex))
        self._save_users()

    def offer_password(self, machine: str, box: str, life_ms: int) -> None:
        """Put a sealed password before the machine's agent."""
        keys = self._machine(machine)
        pipeline = self.redis.pipeline(transaction=True)
        pipeline.set(keys.password, box, px=life_ms)
        pipeline.lpush(keys.bell, "1")
        pipeline.ltrim(keys.bell, 0, BELL_MAX - 1)
        pipeline.execute()

    def end_offer(self, machine: str) -> None:
        self.redis.delete(self._machine(machine).password)

    def disconnect(self, machine: str) -> int:
        """End all connections of its user, whoever has them; how many. The machine's own come back at once."""
        user = self._machine(machine).redis_user
        return int(cast(Any, self.redis).execute_command("CLIENT", "KILL", "USER", user))

    def has_user(self, machine: str) -> bool:
        return self._acl("GETUSER", self._machine(machine).redis_user) is not None

    def user_digests(self, machine: str) -> frozenset[str] | None:
        """SHA-256 (hex) of the passwords that its user is let in by; None without such a user."""
        found = cast(dict[str, Any] | None, self.redis.acl_getuser(self._machine(machine).redis_user))
        return None if found is None else frozenset(str(p).removeprefix("#") for p in found["passwords"])

    def machine_users(self) -> frozenset[str]:
        """Ids of the machines that this Redis has a user for, of whatever cell and state."""
        names = [name.decode() for name in self._acl("USERS")]
        return frozenset(name[2:] for name in names if name.startswith("m-"))

    def delete_user(self, machine: str) -> None:
        """With all its connections: whoever holds its password is out at once."""
        self._acl("DELUSER", self._machine(machine).redis_user)
        self._save_users()

    def delete_machine(self, machine: str) -> None:
        """Its user goes, with all its connections, and what control and agent told each other.

        Usage that was not booked yet stays.
        """
        keys = self._machine(machine)
        self.delete_user(machine)
        self.redis.delete(keys.desired, keys.bell, keys.actual, keys.heartbeat(), keys.password)

    def _save_users(self) -> None:
        # A server without an ACL file refuses; the digests in Postgres make the users again.
        with contextlib.suppress(redis.ResponseError):
            self._acl("SAVE")

    def _acl(self, *args: str) -> Any:
        return cast(Any, self.redis).execute_command("ACL", *args)
