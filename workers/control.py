"""Listens on the replica's control channel: a request id means that its client has gone, one with `@` in front that
the client reads elsewhere now.

A message lost with the connection costs little: the next flush of that request says the same.
"""

from __future__ import annotations

from collections.abc import Callable

from workers.keys import MachineKeys
from workers.redis_client import Subscriber


class ControlChannel:
    """Calls `on_cancel(request_id)` or `on_moved(request_id)` on the loop."""

    def __init__(
        self,
        redis_url: str,
        keys: MachineKeys,
        replica_id: str,
        on_cancel: Callable[[str], None],
        on_moved: Callable[[str], None],
    ) -> None:
        self._channel = keys.control_channel(replica_id)
        self._on_cancel = on_cancel
        self._on_moved = on_moved
        self._subscriber = Subscriber(redis_url, name=f"ctl-{replica_id[:8]}", on_message=self._on_message)

    async def start(self, timeout_s: float) -> None:
        """RedisUnavailable when the subscription does not stand in time (it goes on trying)."""
        self._subscriber.start()
        await self._subscriber.subscribe(self._channel, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._subscriber.close()

    def _on_message(self, _channel: bytes, payload: bytes) -> None:
        text = payload.decode("ascii", "replace")
        if text.startswith("@"):
            self._on_moved(text[1:])
        else:
            self._on_cancel(text)
