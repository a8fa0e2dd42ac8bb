"""When an endpoint that fails is left alone, and when it is tried again: pure.

Closed: all may call. After `threshold` failures in a row, or when the endpoint itself says so (429, 503 with
Retry-After), open for a while, longer each time. Then half open: one call at a time is let through, and what comes of
it decides. Instants are seconds of any one clock.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Final

MAX_PAUSE_S: Final = 300.0


class State(enum.StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(slots=True)
class Breaker:
    """Of one endpoint. `pause_s` is the first pause; each that follows without a success doubles it."""

    threshold: int = 5
    pause_s: float = 5.0
    code: str = field(default="", init=False)  # of the last failure, empty after a success
    _n_failures: int = field(default=0, init=False)
    _n_opened: int = field(default=0, init=False)
    _until_s: float = field(default=0.0, init=False)
    _probing: bool = field(default=False, init=False)

    def state(self, now_s: float) -> State:
        if not self._n_opened:
            return State.CLOSED
        return State.OPEN if now_s < self._until_s else State.HALF_OPEN

    def opens_in_s(self, now_s: float) -> float:
        """How long it will still be left alone."""
        return max(0.0, self._until_s - now_s) if self._n_opened else 0.0

    def enter(self, now_s: float) -> bool:
        """Whether a call may be made now. True must be followed by one of `succeeded`, `failed`, `left`."""
        state = self.state(now_s)
        if state is State.CLOSED:
            return True
        if state is State.OPEN or self._probing:
            return False
        self._probing = True
        return True

    def offered(self, slots: int, now_s: float) -> int:
        """How many requests it should be given at once."""
        state = self.state(now_s)
        return slots if state is State.CLOSED else min(slots, int(state is State.HALF_OPEN))

    def succeeded(self) -> None:
        self.code = ""
        self._n_failures = self._n_opened = 0
        self._probing = False

    def left(self) -> None:
        """The call was given up by who made it: it says nothing of the endpoint."""
        self._probing = False

    def failed(self, code: str, now_s: float, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: what the endpoint asked for; it is believed up to MAX_PAUSE_S."""
        self.code = code
        self._n_failures += 1
        probed, self._probing = self._probing, False
        if retry_after_s is not None:
            self._n_opened = max(self._n_opened, 1)
            self._until_s = max(self._until_s, now_s + min(max(retry_after_s, 0.1), MAX_PAUSE_S))
        elif probed or (self._n_failures >= self.threshold and now_s >= self._until_s):
            self._until_s = now_s + min(self.pause_s * 2**self._n_opened, MAX_PAUSE_S)
            self._n_opened = min(self._n_opened + 1, 16)
