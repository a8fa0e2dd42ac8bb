"""Streams for requests that were admitted before: attached to one that still runs, or replayed from the journal.

Called by resume.py with what the cell knows of the request. A request that still runs moves to this process (last to
ask wins), and whoever had it is told.
"""

from __future__ import annotations

import asyncio
from typing import Final

from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError, from_wire, unavailable
from controlplane.gateway.identity import EventId
from controlplane.gateway.keycontext import KeyContext
from controlplane.gateway.opening import Opener
from controlplane.gateway.records import Found
from controlplane.gateway.stream import Origin, Resumed, Stream
from controlplane.gateway.tools import reader_of
from workers.contract import Notice, WireError, encode
from workers.keys import CellKeys
from workers.redis_client import Client

# The replica may have flushed to the stream before just as it was told to move: looked up once, soon.
_LOOK_AGAIN_S: Final = 0.1

_SUPERSEDED: Final = WireError(
    409,
    "superseded",
    "another connection has taken this request over: this one ends here, the answer goes there",
)


class Reopener:
    """Streams of one gateway process for requests that somebody had before."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        gateway: str,
        opener: Opener,
        ends: Ends,
        *,
        timeout_s: float,
    ) -> None:
        self.n_reopened = 0
        self._redis = redis
        self._keys = keys
        self._gateway = gateway
        self._opener = opener
        self._ends = ends
        self._timeout_s = timeout_s

    def attached(
        self,
        first: str,
        found: Found,
        number: int,
        event: EventId | None,
        key: KeyContext,
        streaming: bool,
        is_greedy: bool,
    ) -> Stream:
        stream = self._reopen(Resumed.ATTACHED, first, found, number, event, key, streaming)
        stream.is_greedy = is_greedy
        stream.keep = found.note.keyed
        stream.queued = found.verdict == "queued"
        self._supersede(found)
        if event is not None and event.n_tokens > found.n_tokens and not is_greedy:
            # Redis is back without the end of its log: sampled anew, the tokens would not fit what the client has.
            stream.fail(unavailable("answer_lost", "a part of the answer was lost: send the request again"))
            return stream
        inbox = self._ends.inbox
        inbox.catch_up(stream)

        def look_again() -> None:
            if not (stream.over or stream.paused):
                inbox.catch_up(stream)

        asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, look_again)
        return stream

    def replayed(
        self, first: str, found: Found, number: int, event: EventId | None, key: KeyContext, streaming: bool
    ) -> Stream:
        stream = self._reopen(Resumed.REPLAYED, first, found, number, event, key, streaming)
        stream.settled = True  # long ago, or by intake
        self._ends.inbox.catch_up(stream)
        return stream

    def _reopen(
        self,
        how: Resumed,
        first: str,
        found: Found,
        number: int,
        event: EventId | None,
        key: KeyContext,
        streaming: bool,
    ) -> Stream:
        deployment = next((d for d in key.deployments.values() if d.id == found.deployment), None)
        if deployment is None:
            raise ApiError(404, "model_not_found", "the model of this request does not exist any more")
        left_s = self._timeout_s
        if how is Resumed.ATTACHED:
            # By the cell's clock: two gateways' may be minutes apart.
            left_s = max(1.0, left_s - found.age_ms / 1000)
        stream = self._opener.reopen(
            number,
            found.request,
            key,
            deployment,
            origin_of(how, first, found.created_ms, event, found.note.n_carried, found.note.n_carried_prompt),
            endpoint=found.note.endpoint,
            streaming=streaming,
            admitted_ms=found.admitted_ms,
            timeout_s=left_s,
            calls=reader_of(found.note.calls),
        )
        # At other prices than those pinned the settlement is intake's, which knows them.
        stream.settled = deployment.price_version != found.price_version
        self.n_reopened += 1
        return stream

    def _supersede(self, found: Found) -> None:
        """Tell whoever had it that it is gone."""
        if found.gateway != self._gateway:
            notice = Notice(request=found.request, error=_SUPERSEDED, stream=found.stream)
            self._redis.fire("PUBLISH", self._keys.notice_channel(found.gateway), encode(notice))
            return
        streams = self._ends.inbox.streams
        old = streams.get(found.stream)
        if old is None:
            return
        if old.abandoned:
            del streams[old.number]
        else:
            old.keep = False
            old.fail(from_wire(_SUPERSEDED))


def origin_of(
    how: Resumed, first: str, created_ms: int, event: EventId | None, n_carried: int, n_charged: int
) -> Origin:
    """A request as its client knows it, with what the client has seen of it."""
    n_seen, n_tail = (-1, 0) if event is None else (event.n_tokens, event.n_tail)
    return Origin(first, created_ms, how, n_seen, n_tail, n_carried, n_charged)
