"""What the rows look at: an answer that has begun, the replica that serves it, how often it was tried."""

from __future__ import annotations

from tests.protocol.fleet import Front
from tests.protocol.surface import Answer
from tests.protocol.world import World

LONG, SHORT = 60, 8  # tokens, of 40 ms each


async def shown(w: World, *answers: Answer, n_chars: int = 20) -> None:
    """Until so much of each answer has been read."""
    await w.until(lambda: all(len(answer.text) >= n_chars for answer in answers))


async def running(w: World, answer: Answer) -> Front:
    """The replica that serves it, once it shows something."""
    await shown(w, answer)
    front = w.front_of(answer.request)
    assert front is not None
    return front


def attempts(w: World, answer: Answer) -> int:
    return int(w.record(answer.request)[b"attempt"])


def crashes(w: World, answer: Answer) -> int:
    return int(w.record(answer.request)[b"crashes"])
