"""Server-sent events out of bytes as they come, within bounds: pure.

Only `data` matters to us; names, ids and comments are read over. A line or an event longer than the bound is no event
of a language model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

MAX_EVENT_BYTES: Final = 1 << 20


class SseError(ValueError):
    """What comes is no stream of events; the message says why."""


class EventParser:
    """`feed` bytes, get the data of the events that are complete."""

    __slots__ = ("_data", "_held", "_max_bytes", "_n_data")

    def __init__(self, max_bytes: int = MAX_EVENT_BYTES) -> None:
        self._held = bytearray()
        self._data: list[bytes] = []
        self._n_data = 0
        self._max_bytes = max_bytes

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Raises SseError for a line or event beyond the bound."""
        self._held += piece
        while (cut := self._held.find(b"\n")) >= 0:
            line = bytes(self._held[:cut]).removesuffix(b"\r")
            del self._held[: cut + 1]
            if len(line) > self._max_bytes:
                raise SseError("an event is too long")
            if not line:
                if self._data:
                    yield b"\n".join(self._data)
                    self._data, self._n_data = [], 0
            elif line.startswith(b"data:"):
                value = line[5:].removeprefix(b" ")
                self._n_data += len(value)
                if self._n_data > self._max_bytes:
                    raise SseError("an event is too long")
                self._data.append(value)
        if len(self._held) > self._max_bytes:
            raise SseError("a line is too long")

    def flush(self) -> bytes | None:
        """At the end: the last event, where the blank line after it is missing."""
        rest = list(self.feed(b"\n\n"))
        return rest[-1] if rest else None
