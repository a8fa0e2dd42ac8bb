"""What one attempt sends to one client stream, until a lane of the publisher takes it along.

serve.py adds tokens and the end; publisher.py drains and answers. On the engine loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from workers.contract import End, FlushVerdict


class Lane(Protocol):
    """What an output needs of the lane that takes it along (publisher.py)."""

    gateway: str
    n_open: int
    n_pending: int
    n_ending: int

    @property
    def full(self) -> bool:
        """Whether generations should be held back."""

    async def room(self) -> None:
        """Wait while it is full."""

    def enqueue(self, output: Output) -> None:
        """`output` has something to send."""

    def forget(self, output: Output) -> None:
        """`output` has nothing to send any more."""

    def pass_on(self, output: Output, other: Any) -> None:
        """`other`, a lane of the same kind, takes over what has gathered."""


class Output:
    """What one attempt sends to one client stream. Offsets count tokens from 0 over all attempts.

    `closed_by` is the verdict that ended it from outside (stale, gap, budget); nothing added later is sent.
    `on_verdict(verdict)` is called for those, and when the client turns out to have gone or to read elsewhere.
    """

    __slots__ = (
        "closed_by",
        "end",
        "ended",
        "epoch",
        "ids",
        "lane",
        "logprobs",
        "n_accepted",
        "n_unanswered",
        "offset",
        "on_verdict",
        "request_id",
        "stream",
        "text",
        "usage",
    )

    def __init__(self, lane: Lane, request_id: str, epoch: int, stream: int, offset: int) -> None:
        self.lane = lane
        self.request_id = request_id
        self.epoch = epoch
        self.stream = stream
        self.offset = self.n_accepted = offset
        self.ids: list[int] = []
        self.text = ""
        self.logprobs: list[object] | None = None
        self.end: End | None = None
        self.usage = b""
        self.n_unanswered = 0
        self.closed_by: FlushVerdict | None = None
        self.ended: asyncio.Future[bool] | None = None
        self.on_verdict: Callable[[FlushVerdict], None] | None = None

    def add(self, ids: list[int], text: str, logprobs: list[object] | None = None) -> None:
        """Tokens of a step. Text without tokens waits for the next tokens or the end."""
        if self.closed_by is not None:
            return
        if ids and not self.ids:
            self.lane.enqueue(self)
        self.ids += ids
        self.text += text
        if logprobs:
            self.logprobs = logprobs if self.logprobs is None else self.logprobs + logprobs
        self.lane.n_pending += len(ids)

    def finish(self, end: End, usage: bytes) -> asyncio.Future[bool]:
        """The last entry. The future gives True once Redis holds it, False when it was refused
        (`closed_by`).
        """
        loop = asyncio.get_running_loop()
        self.ended = loop.create_future()
        if self.closed_by is not None:
            self.ended.set_result(False)
            return self.ended
        self.end, self.usage = end, usage
        self.lane.n_ending += 1
        self.lane.enqueue(self)
        return self.ended

    def drop(self) -> None:
        """Send nothing further; what has left has left."""
        if self.closed_by is None:
            self.close(FlushVerdict.STALE)

    def close(self, verdict: FlushVerdict) -> None:
        """Ended from outside: what has gathered is dropped, later tokens are ignored."""
        self.closed_by = verdict
        self.lane.forget(self)
        if self.ended is not None and not self.ended.done():
            self.ended.set_result(False)
