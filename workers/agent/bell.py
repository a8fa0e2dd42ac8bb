"""The doorbell of a machine: control pushes to a list, the agent wakes at once.

A connection of its own, because the pop blocks. Only a wake-up: the agent's poll covers its absence. redis-py's
asyncio client is not used here: it can swallow a cancellation while it connects (seen with 8.1.0), and the agent
would never end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from workers.redis_client import parse_url
from workers.redis_connection import Connection, RedisError, backoff_s, open_connection, pack

log = logging.getLogger(__name__)

_POP_S: Final = 5  # how long Redis holds the pop: a dead connection is noticed after this and a little
_CONNECT_S: Final = 2.0


async def listen(redis_url: str, key: str, on_ring: Callable[[], None]) -> None:
    """Call `on_ring` for every push to `key`, until cancelled."""
    address = parse_url(redis_url)
    n_failures = 0
    while True:
        try:
            connection = await open_connection(
                address, client_name="bell", timeout_s=_CONNECT_S, on_orphan_error=lambda _error: None
            )
            try:
                while True:
                    if await _pop(connection, key):
                        on_ring()
                    n_failures = 0
            finally:
                connection.abort()
        except (RedisError, TimeoutError) as error:
            if n_failures == 0:
                log.warning("bell: %s", type(error).__name__)
            await asyncio.sleep(backoff_s(n_failures))
            n_failures += 1


async def _pop(connection: Connection, key: str) -> Any:
    """What was pushed, None after `_POP_S` of silence. TimeoutError when Redis does not answer at all."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    connection.send(pack(("BLPOP", key, _POP_S)), answer)
    async with asyncio.timeout(_POP_S + _CONNECT_S):
        return await answer
