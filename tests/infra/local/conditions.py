"""Waiting in tests: poll a condition up to a deadline, never sleep and hope."""

import time
from collections.abc import Callable
from typing import Any


def until(question: Callable[[], Any], what: str, timeout_s: float = 60.0) -> Any:
    """The first truthy answer; AssertionError saying `what` did not happen in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.01)
    raise AssertionError(f"not within {timeout_s} s: {what}")
