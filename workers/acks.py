"""Acknowledgements on their own connection: those of one hub pass leave together and nobody waits for the reply.

The transport's channels use it, on the hub's thread. No ack is forgotten: what a broken connection did not
confirm is sent by the next one that records under the same key (sending one twice does no harm).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from workers.redis_connection import pack

log = logging.getLogger(__name__)

MAX_LEFT_BEHIND: Final = 65_536

# Acks that wait for the next connection, by unacked key.
_left_behind: dict[str, list[str]] = {}


class AckPipe:
    """Removes delivery tags from kombu's records: hash `unacked_key`, sorted set `index_key`.

    `connect` makes a redis-py connection; it is called at the first flush, and after a failed one.
    """

    def __init__(self, connect: Callable[[], Any], unacked_key: str, index_key: str) -> None:
        self._connect = connect
        self._unacked_key = unacked_key
        self._index_key = index_key
        self._waiting: list[str] = []
        self._sent: list[str] = []  # on the wire, reply not read yet
        self._connection: Any = None
        self._is_closed = False

    def add(self, delivery_tag: str) -> None:
        """Take an ack: it leaves with the next flush, or by the next connection if this one has closed."""
        if self._is_closed:
            self._leave([delivery_tag])
        else:
            self._waiting.append(delivery_tag)

    def flush(self) -> None:
        """Send what waits, after reading the reply to the batch before, long there by now.

        Raises what redis-py raises when the connection is lost or refused; the acks are kept.
        """
        if _left_behind and self._unacked_key in _left_behind:
            self._waiting += _left_behind.pop(self._unacked_key)
        if not self._waiting:
            return
        try:
            self._read_reply()
            if self._connection is None:
                self._connection = self._connect()
            self._sent, self._waiting = self._waiting, []
            # In this order: cut off in between, what is left is an index entry, which restoring ignores.
            forget = pack(("HDEL", self._unacked_key, *self._sent))
            remove = pack(("ZREM", self._index_key, *self._sent))
            self._connection.send_packed_command([forget + remove])
        except BaseException:
            self._disconnect()
            raise

    def close(self) -> None:
        """Flush, wait for the reply, disconnect; what could not be confirmed is left for the next connection."""
        self._is_closed = True
        try:
            self.flush()
            self._read_reply()
        except Exception as exc:
            log.warning("acks left for the next connection to Redis: %s", type(exc).__name__)
        self._disconnect()
        if self._waiting:
            self._leave(self._waiting)
            self._waiting = []

    def _read_reply(self) -> None:
        if self._sent:
            self._connection.read_response()
            self._connection.read_response()
            self._sent = []

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._waiting, self._sent = self._sent + self._waiting, []
        if connection is not None:
            connection.disconnect()

    def _leave(self, tags: list[str]) -> None:
        left = _left_behind.setdefault(self._unacked_key, [])
        left.extend(tags[: MAX_LEFT_BEHIND - len(left)])
