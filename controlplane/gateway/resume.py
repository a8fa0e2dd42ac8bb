"""A client that comes back: its request is attached to, replayed from the journal, or continued where it was cut off.

Called by the generation handler for calls with Last-Event-ID or Idempotency-Key, and for GET /v1/requests/<id>/events.
The record of the request is the authority, so any gateway process may serve it, also one that was started later. What
another project asks for does not exist here. A request that still runs moves to this process (last to ask wins); one
that ended is read from its journal; one that was cancelled goes on as a new request that inherits the journal and is
charged for the rest only.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final, NamedTuple

from controlplane.gateway.auth import Deployment, KeyContext
from controlplane.gateway.dispatch import Dispatcher
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import NO_RETRY, ApiError, bad_request, from_wire, unavailable
from controlplane.gateway.identity import Asked, Digests, EventId, Note
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.stream import Origin, Resumed, Stream
from workers import scripts
from workers.contract import (
    FinishReason,
    JournalEntry,
    Notice,
    WireError,
    decode_error,
    decode_journal_entry,
    encode,
)
from workers.engine.base import resume_blockers
from workers.keys import RETENTION_MS, CellKeys
from workers.redis_client import Client, RedisError

# A key or continuation whose request has not been admitted for so long belongs to a gateway that died.
ADMISSION_MS: Final = 5_000
# How long a call waits for an admission, or the end of a cancelled request, that is under way: a step or two, usually.
PATIENCE_S: Final = 5.0
_KEY_PATIENCE_S: Final = 1.0
_POLL_S: Final = 0.05
# The replica may have flushed to the stream before just as it was told to move: looked up once, soon.
_LOOK_AGAIN_S: Final = 0.1

_SUPERSEDED: Final = WireError(
    409,
    "superseded",
    "another connection has taken this request over: this one ends here, the answer goes there",
)


class _Found(NamedTuple):
    """What attach.lua answers about a request that exists."""

    verdict: str  # running | queued | ending | done
    request: str  # the latest that continues what was asked for, or that itself
    note: Note
    admitted_ms: int
    machine: str  # '' = it never was on one
    deployment: str
    price_version: str
    created_ms: int
    gateway: str
    stream: int
    n_tokens: int
    error: WireError | None  # why nobody served it


class Resumer:
    """One gateway process's way back to requests. Belongs to one event loop."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        gateway: str,
        dispatcher: Dispatcher,
        ends: Ends,
        digests: Digests,
        *,
        timeout_s: float,
    ) -> None:
        self.n_resumed = self.n_continued = 0
        self._redis = redis
        self._keys = keys
        self._gateway = gateway
        self._dispatcher = dispatcher
        self._ends = ends
        self._digests = digests
        self._timeout_s = timeout_s
        self._life_ms = int(timeout_s * 1000) + RETENTION_MS

    async def open(
        self,
        asked: Asked,
        request_id: str,
        key: KeyContext,
        deployment: Deployment,
        request: GenerationRequest,
        body: bytes,
    ) -> Stream:
        """The stream that answers a call with these headers: of the request they name, or, for an idempotency key used
        for the first time, a new one that is still to be admitted (`admit`).

        ApiError: 404 (no such request of this project), 409 (another body; in use; cannot be continued), 410 (not kept
        any more), 503 (try again shortly).
        """
        digest = self._digests.body(request.endpoint, body)
        if asked.event is None:
            assert asked.key is not None
            key_digest = self._digests.key(asked.key)
            first = await self._take(key.project, key_digest, request_id)
            if first is None:
                stream = self._dispatcher.open(request_id, key, deployment, request)
                stream.keep = True
                stream.idempotency = key_digest
                stream.note = Note(
                    request.endpoint, request.stream, request.include_usage, keyed=True, digest=digest
                ).encode()
                return stream
        else:
            first = asked.event.request
            if asked.key is not None:
                await self._check_same(key.project, self._digests.key(asked.key), first)
        number = self._dispatcher.next_number()
        found = await self._find(first, key, digest, number)
        if found.verdict != "done":
            is_greedy = request.body.temperature == 0
            return self._attached(first, found, number, asked.event, key, request.stream, is_greedy)
        journal, last = await self._last_entry(found)
        n_produced = 0 if last is None else last.offset + len(last.token_ids)
        if asked.event is not None and asked.event.n_tokens > n_produced:
            raise bad_request(
                f"Last-Event-ID is ahead of the answer ({n_produced} tokens): send the id of an event received",
                "Last-Event-ID",
                "invalid_event_id",
            )
        if last is None and found.machine:
            raise _not_kept(key)
        if last is not None and last.end is not None and not _was_cut_off(last):
            return self._replayed(first, found, number, asked.event, key, request.stream)
        return await self._continued(
            first, found, journal, last, asked.event, request_id, key, deployment, request, body
        )

    async def follow(self, first: str, event: EventId | None, key: KeyContext) -> tuple[Stream, bool]:
        """(stream, whether it reports usage) of a request by its id, as server-sent events, whatever it was sent as.

        ApiErrors as of `open`; a request that was cut off needs its body to go on (409).
        """
        if event is not None and event.request != first:
            raise bad_request(
                "Last-Event-ID is of another request than the path", "Last-Event-ID", "invalid_event_id"
            )
        number = self._dispatcher.next_number()
        found = await self._find(first, key, "", number)
        if found.verdict != "done":
            stream = self._attached(first, found, number, event, key, streaming=True, is_greedy=False)
            return stream, found.note.include_usage
        _, last = await self._last_entry(found)
        if last is None and found.machine:
            raise _not_kept(key)
        if last is None or last.end is None or _was_cut_off(last):
            raise ApiError(
                409,
                "body_needed",
                "the answer was cut off when its connection broke: send the request itself again, with Last-Event-ID, "
                "to go on",
                headers=NO_RETRY,
            )
        return self._replayed(first, found, number, event, key, streaming=True), found.note.include_usage

    async def admit(self, stream: Stream, request: GenerationRequest, body: bytes) -> None:
        """Admission of what took a key or continues a request: where it is refused, that is given back."""
        try:
            await self._dispatcher.admit(stream, request, body)
        except ApiError:
            if not stream.admitted:
                self._retract(stream)
            raise

    # -- finding it

    async def _take(self, project: str, digest: str, request_id: str) -> str | None:
        """Take an idempotency key: None when it is ours now, else the request it names."""
        deadline = time.monotonic() + _KEY_PATIENCE_S
        while True:
            args = (self._keys.prefix, _now_ms(), project, digest, request_id, self._life_ms, ADMISSION_MS)
            verdict = await self._run(scripts.IDEM, args)
            if verdict[0] == b"taken":
                return None
            if verdict[0] == b"known":
                return str(verdict[1].decode())
            if time.monotonic() >= deadline:
                raise ApiError(
                    409,
                    "request_in_progress",
                    "a request with this Idempotency-Key is just being admitted: send it again shortly",
                    retry_after_s=verdict[1] / 1000,
                )
            await asyncio.sleep(_POLL_S)

    async def _check_same(self, project: str, digest: str, first: str) -> None:
        try:
            held = await self._redis.call("GET", self._keys.idempotency(project, digest))
        except RedisError as error:
            raise _cell_away() from error
        if held is not None and held.split()[0].decode() != first:
            raise ApiError(
                409,
                "idempotency_key_reused",
                "Idempotency-Key and Last-Event-ID are of different requests: send one of them",
                param="Idempotency-Key",
                headers=NO_RETRY,
            )

    async def _find(self, first: str, key: KeyContext, digest: str, number: int) -> _Found:
        """Where the request stands; attached to stream `number` if it runs. Waits while it is just ending."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            args = (
                self._keys.prefix,
                _now_ms(),
                first,
                key.project,
                digest,
                self._gateway,
                number,
                ADMISSION_MS,
            )
            answer = await self._run(scripts.ATTACH, args)
            verdict = answer[0].decode()
            if verdict == "unknown":
                raise ApiError(
                    404,
                    "request_not_found",
                    "there is no such request: requests are kept until 15 minutes after their end, for API keys of the "
                    "project that sent them",
                )
            if verdict == "differs":
                raise ApiError(
                    409,
                    "body_differs",
                    "this Idempotency-Key or Last-Event-ID belongs to a request with another body or endpoint: send "
                    "the same bytes, or leave the header out",
                    headers=NO_RETRY,
                )
            if verdict not in ("busy", "ending"):
                found = _found(answer)
                if found.error is not None and found.error.status not in (503, 504):
                    raise from_wire(found.error)
                return found
            if time.monotonic() >= deadline:
                raise unavailable("request_ending", "the request is just being ended: try again shortly")
            await asyncio.sleep(_POLL_S)

    async def _last_entry(self, found: _Found) -> tuple[str, JournalEntry | None]:
        """(key of its journal, last entry of it); None where nothing was produced or is kept."""
        places = [self._keys.journal(found.request)]
        if found.machine:
            places.insert(0, self._keys.machine(found.machine).journal(found.request))
        try:
            for journal in places:
                tail = await self._redis.call("LRANGE", journal, -1, -1)
                if tail:
                    return journal, decode_journal_entry(tail[0])
        except RedisError as error:
            raise _cell_away() from error
        except ValueError as error:  # what a machine wrote
            raise unavailable("journal_unreadable", "the answer was lost on its way: try again") from error
        return "", None

    # -- going on with it

    def _attached(
        self,
        first: str,
        found: _Found,
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
        if stream.n_seen > found.n_tokens and not is_greedy:
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

    def _replayed(
        self, first: str, found: _Found, number: int, event: EventId | None, key: KeyContext, streaming: bool
    ) -> Stream:
        stream = self._reopen(Resumed.REPLAYED, first, found, number, event, key, streaming)
        stream.settled = True  # long ago, or by intake
        self._ends.inbox.catch_up(stream)
        return stream

    def _reopen(
        self,
        how: Resumed,
        first: str,
        found: _Found,
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
            left_s = max(1.0, left_s - (_now_ms() - found.admitted_ms) / 1000)
        stream = self._dispatcher.reopen(
            number,
            found.request,
            key,
            deployment,
            _origin(how, first, found.created_ms, event, found.note.n_carried, found.note.n_carried_prompt),
            endpoint=found.note.endpoint,
            streaming=streaming,
            admitted_ms=found.admitted_ms,
            timeout_s=left_s,
        )
        # At other prices than those pinned the settlement is intake's, which knows them.
        stream.settled = deployment.price_version != found.price_version
        self.n_resumed += 1
        return stream

    def _supersede(self, found: _Found) -> None:
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

    async def _continued(
        self,
        first: str,
        found: _Found,
        journal: str,
        last: JournalEntry | None,
        event: EventId | None,
        request_id: str,
        key: KeyContext,
        deployment: Deployment,
        request: GenerationRequest,
        body: bytes,
    ) -> Stream:
        """A new request that goes on after the last entry, admitted."""
        n_carried, n_charged = 0, found.note.n_carried_prompt
        if last is not None:
            n_carried = last.offset + len(last.token_ids)
            n_charged = max(n_charged, last.end.n_prompt if last.end else 0)
        if n_carried:
            blockers = resume_blockers(request.sampling(1))
            if blockers:
                raise ApiError(
                    409,
                    "cannot_continue",
                    f"the answer was cut off and cannot be continued exactly (because of {', '.join(blockers)}): send "
                    "it again without Last-Event-ID and with a new Idempotency-Key",
                    param=blockers[0],
                    headers=NO_RETRY,
                )
        origin = _origin(Resumed.CONTINUED, first, found.created_ms, event, n_carried, n_charged)
        stream = self._dispatcher.open(request_id, key, deployment, request, origin)
        stream.note = found.note._replace(n_carried=n_carried, n_carried_prompt=n_charged).encode()
        stream.keep = found.note.keyed
        try:
            await self._inherit(stream, first, found.request, journal if n_carried else "", last)
            await self.admit(stream, request, body)
        except BaseException:
            self._ends.close(stream)
            raise
        self.n_resumed += 1
        self.n_continued += 1
        if n_carried:
            self._ends.inbox.catch_up(stream)
        return stream

    async def _inherit(
        self, stream: Stream, first: str, latest: str, journal: str, last: JournalEntry | None
    ) -> None:
        """Copy the journal without its end, and be the one that continues it."""
        rest = b""
        has_end = last is not None and last.end is not None
        if has_end and last is not None and (last.token_ids or last.text):
            rest = encode(
                JournalEntry(last.choice, last.offset, last.token_ids, last.text, None, last.logprobs)
            )
        verdict = await self._run(
            scripts.CONTINUE,
            (
                self._keys.prefix,
                _now_ms(),
                first,
                latest,
                stream.request,
                journal,
                int(has_end),
                rest if journal else b"",
                self._life_ms,
                ADMISSION_MS,
            ),
        )
        if verdict == b"gone":
            raise _not_kept(stream.key)
        if verdict != b"ok":
            raise unavailable("request_in_progress", "the request is just being continued: try again shortly")

    def _retract(self, stream: Stream) -> None:
        """Sent before the refusal, so that the client's next try finds it done."""
        first = "" if stream.origin is None else stream.origin.request
        self._redis.fire(
            "EVALSHA", scripts.RETRACT.sha, 0, self._keys.prefix, stream.request, stream.key.project,
            stream.idempotency, first,
        )  # fmt: skip

    async def _run(self, script: scripts.Script, args: tuple[Any, ...]) -> Any:
        try:
            return await self._redis.evalsha(script, (), args)
        except RedisError as error:
            raise _cell_away() from error


def _found(answer: list[Any]) -> _Found:
    verdict, request, note, admitted_ms, machine, deployment, price, created_ms, gateway, stream, n_tokens = (
        part.decode() for part in answer[:11]
    )
    error = answer[11]
    return _Found(
        verdict,
        request,
        Note.decode(note),
        int(admitted_ms),
        machine,
        deployment,
        price,
        int(created_ms),
        gateway,
        int(stream),
        int(n_tokens),
        decode_error(error) if error else None,
    )


def _origin(
    how: Resumed, first: str, created_ms: int, event: EventId | None, n_carried: int, n_charged: int
) -> Origin:
    n_seen, n_tail = (-1, 0) if event is None else (event.n_tokens, event.n_tail)
    return Origin(first, created_ms, how, n_seen, n_tail, n_carried, n_charged)


def _was_cut_off(last: JournalEntry) -> bool:
    """It ended by a disconnect or a failure of ours, and not as an answer (or a refusal that would come again)."""
    end = last.end
    if end is None or end.reason is FinishReason.ABORT:
        return True
    return end.reason is FinishReason.ERROR and (end.error is None or end.error.status >= 500)


def _not_kept(key: KeyContext) -> ApiError:
    if key.zero_retention:
        return ApiError(
            410,
            "answer_not_kept",
            "this project keeps nothing: an answer can be read again only while it runs and for half a minute after",
        )
    return ApiError(410, "answer_expired", "the answer is not kept any more: send the request anew")


def _cell_away() -> ApiError:
    return unavailable("cell_unavailable", "the service is restarting: try again shortly", 1.0)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
