"""Frames from the machines, fanned out to this process's streams by token offset.

One subscription per gateway; pub/sub delivers at most once, so the offset decides: equal to what the stream
has = taken, lower = a repetition, higher = a gap, filled from the journal. A frame counts only if the machine
on whose channel it came is the one the request is bound to: a machine cannot speak for another's requests.
Everything that is not plainly next goes through one path, `catch_up`: ask the request record where it runs,
read the journal there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from controlplane.gateway.errors import from_wire, unavailable
from controlplane.gateway.stream import MAX_HELD_BACK, HeldBack, Stream
from workers.contract import (
    Ask,
    FrameEntry,
    JournalEntry,
    decode_error,
    decode_frame,
    decode_journal_entry,
)
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError, RedisUnavailable

log = logging.getLogger(__name__)

_MAX_MACHINES: Final = 4_096  # channel names remembered
_MAX_READERS: Final = 64  # journals read at once
_PAGE: Final = 512  # journal entries a read
_MAX_ROUNDS: Final = 8  # readings of one journal before the stall check takes over
# The subscription may be back before the connection that reads journals; longer absences are the watch's.
_RECONNECT_S: Final = 5.0
_RESOLVE_INTERVAL_S: Final = 0.05  # between looks at one record because of frames from elsewhere
# Such looks that one machine can cause; a mass move of requests needs hundreds.
_MAX_RESOLVES_PER_S: Final = 1_000


class Inbox:
    """Streams by number, and the frames for them. Belongs to one event loop."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        on_end: Callable[[Stream], None],
        on_ask: Callable[[Stream, str, Ask], None],
    ) -> None:
        """`on_end(stream)`: its last entry came; `on_ask(stream, machine, ask)`: a machine says that the stream
        needs more of its money."""
        self.streams: dict[int, Stream] = {}
        self.n_frames = self.n_entries = self.n_unknown = self.n_foreign = 0
        self.n_bad_frames = self.n_catch_ups = self.n_repeated = 0
        self._redis = redis
        self._keys = keys
        self._on_end = on_end
        self._on_ask = on_ask
        self._machines: dict[bytes, str] = {}
        self._resolves: dict[str, int] = {}  # by machine, since
        self._resolves_since = 0.0
        self._readers = asyncio.Semaphore(_MAX_READERS)
        self._tasks: set[asyncio.Task[None]] = set()

    def on_frame(self, channel: bytes, payload: bytes) -> None:
        """A frame arrived. Never raises: a machine may send anything."""
        machine = self._machines.get(channel) or self._learn(channel)
        try:
            entries = decode_frame(payload)
        except ValueError:  # msgspec's errors, and text that is no UTF-8
            self.n_bad_frames += 1
            return
        self.n_frames += 1
        self.n_entries += len(entries)
        now = time.monotonic()
        streams = self.streams
        for entry in entries:
            stream = streams.get(entry.stream)
            if stream is None:
                self.n_unknown += 1
            elif stream.live_machine != machine:
                self._unexpected(stream, machine, entry, now)
            elif entry.offset == stream.have:
                if stream.end is None:
                    stream.accept(entry.n, entry.text, entry.end, now, entry.logprobs)
                    if entry.end is not None:
                        self._on_end(stream)
            elif entry.offset > stream.have:
                self._hold_back(stream, machine, entry)
                self.catch_up(stream)
            elif entry.ask is not None:
                self._on_ask(stream, machine, entry.ask)
            else:
                self.n_repeated += 1

    def catch_up(self, stream: Stream) -> None:
        """Find out where the request runs and read from its journal what the stream lacks. At most one at a
        time."""
        if stream.catching_up or stream.end is not None:
            return
        stream.catching_up = True
        stream.paused = False
        stream.live_machine = None
        self.n_catch_ups += 1
        task = asyncio.get_running_loop().create_task(self._catch_up(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def take_early(self, stream: Stream) -> None:
        """Frames came before the answer of the admission that caused them, as the first of one loop pass may: taken
        now, or read from the journal where they are not all and only what its replica's machine sent."""
        machine = stream.live_machine
        if machine is None or stream.catching_up or not self._take_held_back(stream, machine, only=True):
            self.catch_up(stream)

    def catch_up_all(self) -> None:
        """Frames may have been missed (the subscription was interrupted)."""
        for stream in self.streams.values():
            if stream.admitted:
                self.catch_up(stream)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _learn(self, channel: bytes) -> str:
        machine = self._keys.machine_of_channel(channel)
        if len(self._machines) >= _MAX_MACHINES:
            self._machines.clear()
        self._machines[channel] = machine
        return machine

    def _unexpected(self, stream: Stream, machine: str, entry: FrameEntry, now: float) -> None:
        """A frame that is not from where the stream is known to run: moved, not known yet, paused, or a
        lie."""
        if stream.end is not None:
            return
        if entry.ask is not None:
            self._on_ask(stream, machine, entry.ask)  # whose request it is, the script knows
            return
        if stream.paused:
            return
        # Frames may overtake the answer of the admission that caused them.
        if stream.catching_up or not stream.admitted:
            self._hold_back(stream, machine, entry)
            return
        if stream.live_machine is not None:
            self.n_foreign += 1
        if now >= stream.resolve_after and self._may_resolve(machine, now):
            stream.resolve_after = now + _RESOLVE_INTERVAL_S
            self._hold_back(stream, machine, entry)
            self.catch_up(stream)

    def _may_resolve(self, machine: str, now: float) -> bool:
        if now - self._resolves_since >= 1.0:
            self._resolves_since = now
            self._resolves.clear()
        n = self._resolves.get(machine, 0)
        self._resolves[machine] = n + 1
        return n < _MAX_RESOLVES_PER_S

    @staticmethod
    def _hold_back(stream: Stream, machine: str, entry: FrameEntry) -> None:
        if len(stream.held_back) < MAX_HELD_BACK:
            stream.held_back.append(
                HeldBack(machine, entry.offset, entry.n, entry.text, entry.end, entry.logprobs)
            )
        else:
            stream.overflowed = True

    async def _catch_up(self, stream: Stream) -> None:
        try:
            async with self._readers:
                try:
                    await self._read_until_level(stream)
                except RedisUnavailable:
                    await self._redis.connect(_RECONNECT_S)
                    await self._read_until_level(stream)
        except RedisError:
            pass  # the next frame, the stall check or the reconnect tries again
        except ValueError:
            log.error("journal of req_%s is not readable", stream.request)
            stream.fail(unavailable("journal_unreadable", "the answer was lost on its way: try again"))
        finally:
            stream.catching_up = False
            stream.held_back.clear()

    async def _read_until_level(self, stream: Stream) -> None:
        for _ in range(_MAX_ROUNDS):
            stream.overflowed = False
            state, mid, was_mid, error = await self._redis.call(
                "HMGET", self._keys.request(stream.request), "state", "mid", "was_mid", "error"
            )
            if state is None:
                stream.fail(unavailable("request_lost", "the request was lost: send it again"))
                return
            if error:  # given up; the notice that says so may have been lost
                stream.fail(from_wire(decode_error(error)))
                return
            is_done = state == b"done"
            # Settled by somebody else meanwhile: the journal still lies where it ran last.
            machine = (mid or (was_mid if is_done else None) or b"").decode()
            if machine and not stream.is_greedy and await self._is_behind(stream, machine):
                stream.fail(
                    unavailable("answer_lost", "a part of the answer was lost: send the request again")
                )
                return
            if machine:
                await self._read_journal(stream, self._keys.machine(machine).journal(stream.request))
            if stream.end is not None or stream.paused:
                return
            if is_done:
                stream.fail(unavailable("request_lost", "the request ended without an answer: send it again"))
                return
            stream.machine = machine or None
            if not machine:
                return  # it waits in the queue; whoever gets it will be asked about at its first frame
            if self._take_held_back(stream, machine):
                stream.live_machine = None if stream.paused or stream.end else machine
                return

    async def _is_behind(self, stream: Stream, machine: str) -> bool:
        """Whether the cell knows of fewer tokens than its client has seen: Redis came back without the end of its log.

        The replica makes them anew; sampled, they would be others, and what follows would not fit.
        """
        n = await self._redis.call("HGET", self._keys.machine(machine).lease(stream.request), "n")
        return n is not None and int(n) < stream.have

    async def _read_journal(self, stream: Stream, journal: str) -> None:
        while not stream.paused and stream.end is None:
            page = await self._redis.call("LRANGE", journal, stream.n_entries, stream.n_entries + _PAGE - 1)
            for raw in page:
                entry = decode_journal_entry(raw)
                if not self._take(stream, entry, len(entry.token_ids)):
                    raise msgspec.ValidationError("journal offsets do not continue")
                if stream.paused:
                    return
            if len(page) < _PAGE:
                return

    def _take_held_back(self, stream: Stream, machine: str, *, only: bool = False) -> bool:
        """Take what that machine sent meanwhile; False when something is still missing in between, or, with `only`,
        another sent some of it."""
        held_back, stream.held_back = stream.held_back, []
        for entry in held_back:
            if stream.paused:
                return True
            if entry.machine != machine:
                if only:
                    return False
            elif not self._take(stream, entry, entry.n):
                return False
        return not stream.overflowed

    def _take(self, stream: Stream, entry: JournalEntry | HeldBack, n: int) -> bool:
        """Take an entry if it is next; False when there is a gap before it."""
        if stream.end is not None or entry.offset < stream.have:
            return True
        if entry.offset > stream.have:
            return False
        stream.accept(n, entry.text, entry.end, time.monotonic(), entry.logprobs)
        if entry.end is not None:
            self._on_end(stream)
        return True
