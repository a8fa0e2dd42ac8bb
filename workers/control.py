"""Listens on the replica's control channel: a request id means that its client has gone, one with `@` in front that
the client reads elsewhere now, `!sleep` and `!wake` are its agent's orders (rest.py), and `<request> <tokens> <0 or 1>`
how many tokens its money pays for by now (1: no more is left).

A message lost with the connection costs little: the next flush of a cancelled request says the same, and whoever
waits for money asks again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from workers.keys import MachineKeys
from workers.redis_client import Subscriber

SLEEP: Final = "!sleep"
WAKE: Final = "!wake"


class ControlChannel:
    """Calls `on_cancel(request_id)`, `on_moved(request_id)`, `on_grant(request_id, n_tokens, final)` or
    `on_rest(asleep)` on the loop."""

    def __init__(
        self,
        redis_url: str,
        keys: MachineKeys,
        replica_id: str,
        on_cancel: Callable[[str], None],
        on_moved: Callable[[str], None],
        on_grant: Callable[[str, int, bool], None],
        on_rest: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self._channel = keys.control_channel(replica_id)
        self._on_cancel = on_cancel
        self._on_moved = on_moved
        self._on_grant = on_grant
        self._on_rest = on_rest
        self._subscriber = Subscriber(redis_url, name=f"ctl-{replica_id[:8]}", on_message=self._on_message)

    async def start(self, timeout_s: float) -> None:
        """RedisUnavailable when the subscription does not stand in time (it goes on trying)."""
        self._subscriber.start()
        await self._subscriber.subscribe(self._channel, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._subscriber.close()

    def _on_message(self, _channel: bytes, payload: bytes) -> None:
        request_id, *grant = payload.decode("ascii", "replace").split(" ")
        if len(grant) == 2 and all(part.isdigit() for part in grant):
            self._on_grant(request_id, int(grant[0]), grant[1] == "1")
        elif request_id.startswith("@"):
            self._on_moved(request_id[1:])
        elif request_id in (SLEEP, WAKE):
            self._on_rest(request_id == SLEEP)
        elif not grant:
            self._on_cancel(request_id)
