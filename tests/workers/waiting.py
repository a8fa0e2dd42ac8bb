"""Waiting for a condition with a deadline, instead of sleeping and hoping."""

import asyncio
import time
from collections.abc import Callable

DEADLINE_S = 60.0
_STEP_S = 0.005


async def until(condition: Callable[[], object], what: str) -> None:
    """Return once `condition()` holds; fail naming `what` if it never does."""
    end_at = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_at, f"waited {DEADLINE_S} s in vain for: {what}"
        await asyncio.sleep(_STEP_S)


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """The same on a plain thread."""
    end_at = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_at, f"waited {deadline_s} s in vain for: {what}"
        time.sleep(_STEP_S)
