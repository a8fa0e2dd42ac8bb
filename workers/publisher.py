"""From engine steps to Redis: one fenced flush per gateway and step, self-clocked, pipelined, bounded.

serve.py opens an `Output` per attempt and adds tokens to it; each gateway has a `Lane` that turns what has
gathered into one call of the flush script. Tokens leave at once, unless a flush left less than `flush_spacing_s`
ago: so an idle lane and an engine at its own pace are not delayed, and an engine that is faster merges steps. An end
waits for nothing: the client of a plain answer sees nothing before it, and its slot is taken until then. No flush
waits for the answer to another: a round trip delays every token alike.
Tokens of one output that gather while a lane is busy leave as one entry. When Redis is away, unanswered flushes
are sent again byte for byte and in order (the offsets make that safe: what was applied comes back as a
duplicate), after a wait that nothing shortens.
Runs on the engine loop only. Never logs text.
"""

from __future__ import annotations

import asyncio
import bisect
import functools
import logging
import math
import operator
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import msgspec

from workers.config import ServeTuning
from workers.contract import FlushVerdict
from workers.keys import MachineKeys
from workers.output import Output
from workers.redis_client import Client, RedisUnavailable
from workers.scripts import FLUSH

log = logging.getLogger(__name__)

_encode: Final = msgspec.msgpack.Encoder().encode
_VERDICT_OF: Final = {ord(v.value): v for v in FlushVerdict}
_ACCEPTED, _DUPLICATE = ord(FlushVerdict.ACCEPTED.value), ord(FlushVerdict.DUPLICATE.value)
_TOLD = (ord(FlushVerdict.CANCELLED.value), ord(FlushVerdict.MOVED.value))  # accepted, and there is news
_KEPT = (_ACCEPTED, _DUPLICATE, *_TOLD)
_FIELDS_PER_ENTRY: Final = 7
_RETRY_S: Final = 0.05  # first wait after a failed flush; doubles to the last
_RETRY_MAX_S: Final = 1.0


class _Batch:
    """One call of the flush script, kept until answered: the `number`th of its lane. `entries` are (output, tokens, is
    the end).
    """

    __slots__ = ("args", "entries", "n_refused", "n_tokens", "number")

    def __init__(
        self, number: int, args: list[Any], entries: list[tuple[Output, int, bool]], n_tokens: int
    ) -> None:
        self.number = number
        self.args = args
        self.entries = entries
        self.n_tokens = n_tokens
        self.n_refused = 0


_number: Final = operator.attrgetter("number")


class Lane:
    """The flushes to one gateway. Lives while an output is open or something is unanswered."""

    def __init__(self, publisher: Publisher, gateway: str) -> None:
        self.gateway = gateway
        self.n_open = 0
        self.n_pending = 0  # tokens not accepted yet: gathering, in flight, or to be sent again
        self.n_ending = 0  # ends that gather
        self._publisher = publisher
        self._gathering: dict[Output, None] = {}
        self._again: deque[_Batch] = deque()  # by number
        self._n_batches = self._n_in_flight = 0
        self._sent_at_s = -math.inf  # the last flush, on the loop's clock
        self._scheduled = self._spacing = self._backing_off = False
        self._doubtful = False  # the last answer was a failure
        self._retry_s = _RETRY_S
        self._room = asyncio.Event()
        self._room.set()

    @property
    def full(self) -> bool:
        return self.n_pending > self._publisher.tuning.max_pending_tokens

    @property
    def idle(self) -> bool:
        return not (self.n_open or self._gathering or self._again or self._n_in_flight)

    async def room(self) -> None:
        """Wait while the lane is full."""
        while self.full:
            self._room.clear()
            await self._room.wait()

    def enqueue(self, output: Output) -> None:
        self._gathering[output] = None
        self._schedule()

    def forget(self, output: Output) -> None:
        if output in self._gathering:
            del self._gathering[output]
            self.n_pending -= len(output.ids)
            self.n_ending -= output.end is not None
        output.ids, output.text, output.logprobs, output.end = [], "", None, None
        self._open_room()

    def pass_on(self, output: Output, other: Lane) -> None:
        """Let `other` send what has gathered of this output."""
        if output in self._gathering:
            del self._gathering[output]
            self.n_pending -= len(output.ids)
            other.n_pending += len(output.ids)
            self.n_ending -= output.end is not None
            other.n_ending += output.end is not None
            other.enqueue(output)
            self._open_room()

    def _schedule(self) -> None:
        """Flush at the end of this loop pass, when every stream of the step has added its tokens."""
        if not self._scheduled:
            self._scheduled = True
            self._publisher.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self._backing_off:
            return
        while (self._again or self._gathering) and self._may_send():
            self._send(self._again.popleft() if self._again else self._gather())

    def _may_send(self) -> bool:
        """Whether another flush may leave now; where only the spacing forbids it, it will leave in time."""
        tuning = self._publisher.tuning
        if self._doubtful:  # one asks, the others follow its answer: else they might be taken before it
            return self._n_in_flight == 0
        if (self.n_ending or self._again) and self._n_in_flight < tuning.flush_depth_ends:
            return True
        if self._n_in_flight >= tuning.flush_depth_far:
            return False
        wait_s = self._sent_at_s + tuning.flush_spacing_s - self._publisher.loop.time()
        if wait_s > 0 and not self._spacing:
            self._spacing = True
            self._publisher.loop.call_later(wait_s, self._spaced)
        return wait_s <= 0

    def _spaced(self) -> None:
        self._spacing = False
        self._flush()

    def _try_again(self) -> None:
        self._backing_off = False
        self._flush()

    def _gather(self) -> _Batch:
        tuning = self._publisher.tuning
        args: list[Any] = [
            self._publisher.prefix,
            self.gateway,
            tuning.journal_life_ms,
            tuning.usage_stream_max,
        ]
        entries: list[tuple[Output, int, bool]] = []
        n_tokens = n_ends = 0
        for output in list(self._gathering)[: tuning.flush_max_entries]:
            del self._gathering[output]
            ids, n, at, end = output.ids, len(output.ids), output.offset, output.end
            # Field order of contract.FrameEntry and contract.JournalEntry (array_like); choice is always 0.
            frame = _encode((output.stream, 0, at, n, output.text, end, output.logprobs))
            journal = _encode((0, at, ids, output.text, end, output.logprobs))
            args += (output.request_id, output.epoch, at, at + n, frame, journal, output.usage)
            entries.append((output, n, end is not None))
            n_ends += end is not None
            n_tokens += n
            output.offset = at + n
            output.n_unanswered += 1
            output.ids, output.text, output.logprobs, output.end, output.usage = [], "", None, None, b""
        if n_ends:
            self.n_ending -= n_ends
            self._publisher.before_ends()
        self._n_batches += 1
        return _Batch(self._n_batches, args, entries, n_tokens)

    def _send(self, batch: _Batch) -> None:
        self._n_in_flight += 1
        self._sent_at_s = self._publisher.loop.time()
        reply = self._publisher.client.evalsha(FLUSH, (), batch.args)
        reply.add_done_callback(functools.partial(self._answered, batch))

    def _answered(self, batch: _Batch, reply: asyncio.Future[Any]) -> None:
        self._n_in_flight -= 1
        error = asyncio.CancelledError() if reply.cancelled() else reply.exception()
        if error is not None:
            self._failed(batch, error)
            return
        self._retry_s, self._doubtful = _RETRY_S, False
        self.n_pending -= batch.n_tokens
        self._open_room()
        for (output, n, is_end), code in zip(batch.entries, reply.result(), strict=True):
            output.n_unanswered -= 1
            if code in _KEPT:
                output.n_accepted += n
                if is_end and output.ended is not None and not output.ended.done():
                    output.ended.set_result(True)
                elif code in _TOLD and output.on_verdict is not None:
                    output.on_verdict(_VERDICT_OF[code])
            elif output.closed_by is None:
                verdict = _VERDICT_OF[code]
                output.close(verdict)
                if output.on_verdict is not None:
                    output.on_verdict(verdict)
        self._publisher.n_flushes += 1
        self._publisher.n_tokens += batch.n_tokens
        if self._gathering or self._again:
            self._flush()

    def _failed(self, batch: _Batch, error: BaseException) -> None:
        """Keep the batch and try again; a Redis that answers and keeps refusing gets a bounded number of
        tries.
        """
        self._publisher.n_failed_flushes += 1
        self._doubtful = True
        if not self._backing_off:
            self._backing_off = True
            self._publisher.loop.call_later(self._retry_s, self._try_again)
            self._retry_s = min(self._retry_s * 2, _RETRY_MAX_S)
        code = getattr(error, "code", type(error).__name__)
        # A full Redis is a Redis that is away: somebody will make room. It says so before a script's first write.
        if not isinstance(error, RedisUnavailable) and "OOM" not in str(error):
            batch.n_refused += 1
            if batch.n_refused >= self._publisher.tuning.max_refusals:
                self._give_up(batch, code)
                return
        # Those that were not sent with it stay behind it: an entry that came before its predecessor would be a gap.
        bisect.insort(self._again, batch, key=_number)

    def _give_up(self, batch: _Batch, code: str) -> None:
        """Not our keys any more, or a fault of ours: these requests cannot end here."""
        log.error("flush refused for good", extra={"code": code, "n_streams": len(batch.entries)})
        self.n_pending -= batch.n_tokens
        for output, _, _ in batch.entries:
            output.n_unanswered -= 1
            if output.closed_by is None:
                output.close(FlushVerdict.STALE)
                if output.on_verdict is not None:
                    output.on_verdict(FlushVerdict.STALE)
        self._open_room()
        self._publisher.on_refused(code)

    def _open_room(self) -> None:
        if not self.full:
            self._room.set()


class Publisher:
    """All lanes of a replica."""

    def __init__(
        self,
        client: Client,
        keys: MachineKeys,
        tuning: ServeTuning,
        on_refused: Callable[[str], None] = lambda code: None,
    ) -> None:
        """`on_refused(code)`: Redis answers, and will not take a flush; the replica is of no use any more."""
        self.client = client
        self.on_refused = on_refused
        # Called before a flush that ends requests is sent.
        self.before_ends: Callable[[], None] = lambda: None
        self.tuning = tuning
        self.prefix = keys.prefix
        self.loop = asyncio.get_running_loop()
        self.n_flushes = self.n_tokens = self.n_failed_flushes = 0
        self._lanes: dict[str, Lane] = {}

    def open(self, request_id: str, epoch: int, gateway: str, stream: int, offset: int) -> Output:
        """The output of one attempt, whose next token has `offset`. `close` it when the attempt is over."""
        lane = self._lanes.get(gateway)
        if lane is None:
            lane = self._lanes[gateway] = Lane(self, gateway)
        lane.n_open += 1
        return Output(lane, request_id, epoch, stream, offset)

    def close(self, output: Output) -> None:
        lane = output.lane
        lane.n_open -= 1
        for gateway, other in list(self._lanes.items()) if lane.n_open == 0 else ():
            if other.idle:
                del self._lanes[gateway]

    def move(self, output: Output, gateway: str, stream: int) -> None:
        """From now on to another gateway or stream. What has left stays in order before it: one connection carries
        every lane. (Should that connection break just now, a flush may come too early and be refused as a gap; the
        attempt is then claimed again.)
        """
        output.stream = stream
        old = output.lane
        if output.closed_by is not None or old.gateway == gateway:
            return
        lane = self._lanes.get(gateway)
        if lane is None:
            lane = self._lanes[gateway] = Lane(self, gateway)
        old.pass_on(output, lane)
        lane.n_open += 1
        self.close(output)
        output.lane = lane

    async def settle(self, output: Output, timeout_s: float) -> bool:
        """Wait until nothing of this output is gathering or unanswered; False when that takes too long."""
        deadline_s = self.loop.time() + timeout_s
        while output.n_unanswered or output.ids:
            if self.loop.time() >= deadline_s:
                return False
            await asyncio.sleep(0.002)
        return True
