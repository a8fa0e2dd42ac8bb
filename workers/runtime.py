"""What the Celery pool of this process hands jobs to: an asyncio loop on another thread, and one coroutine.

The replica front installs it before it starts Celery; `celery inspect` and friends never do, so they never
start a loop. One per process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

Handler = Callable[[str, int], Coroutine[Any, Any, None]]


@dataclass(frozen=True, slots=True)
class Runtime:
    """`handler(request_id, epoch)` runs on `loop`, which must be running on a thread of its own.

    It should return when the attempt is over, however it ended. It is cancelled on revoke (the
    CancelledError's args are `("revoked",)`) and after the grace when the worker stops (`("stopping",)`). If
    that escapes it when stopping, the message goes back to the queue; if it returns, it is acknowledged.
    """

    loop: asyncio.AbstractEventLoop
    handler: Handler
    stop_grace_s: float = 10.0  # on a warm stop, how long running jobs may take to finish by themselves
    cancel_grace_s: float = 5.0  # and how long they may take to end once cancelled (journal, hand-off)


_installed: Runtime | None = None


def install(runtime: Runtime | None) -> None:
    """Make `runtime` the one of this process; None removes it."""
    global _installed
    _installed = runtime


def current() -> Runtime:
    """The installed runtime; RuntimeError if this process is not a replica front."""
    if _installed is None:
        raise RuntimeError("no runtime installed: call workers.runtime.install() before starting the worker")
    return _installed
