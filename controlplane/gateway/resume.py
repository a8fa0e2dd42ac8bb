"""A client that comes back: its request is attached to, replayed from the journal, or continued where it was cut off.

Called by the generation handler for calls with Last-Event-ID or Idempotency-Key, and for GET /v1/requests/<id>/events.
The record of the request is the authority, so any gateway process may serve it, also one that was started later. What
another project asks for does not exist here. A request that still runs moves to this process (last to ask wins); one
that ended is read from its journal; one that was cancelled goes on as a new request that inherits the journal and is
charged for the rest only.
"""

from __future__ import annotations

from controlplane.gateway.dispatch import Dispatcher
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import NO_RETRY, ApiError, bad_request
from controlplane.gateway.identity import Asked, Digests, EventId, Note
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.gateway.opening import Opener
from controlplane.gateway.records import Found, Records, not_kept, was_cut_off
from controlplane.gateway.reopen import Reopener, origin_of
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.stream import Resumed, Stream
from controlplane.gateway.tools import letter_of
from workers.contract import JournalEntry
from workers.engine.base import resume_blockers
from workers.keys import RETENTION_MS, CellKeys
from workers.redis_client import Client


class Resumer:
    """One gateway process's way back to requests. Belongs to one event loop."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        gateway: str,
        opener: Opener,
        dispatcher: Dispatcher,
        ends: Ends,
        digests: Digests,
        *,
        timeout_s: float,
    ) -> None:
        self.n_continued = 0
        self._opener = opener
        self._dispatcher = dispatcher
        self._ends = ends
        self._digests = digests
        self._records = Records(redis, keys, gateway, int(timeout_s * 1000) + RETENTION_MS)
        self._reopener = Reopener(redis, keys, gateway, opener, ends, timeout_s=timeout_s)

    @property
    def n_resumed(self) -> int:
        """Clients that came back and were served."""
        return self._reopener.n_reopened + self.n_continued

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
            first = await self._records.take(key.project, key_digest, request_id)
            if first is None:
                try:
                    stream = self._opener.open(request_id, key, deployment, request)
                except ApiError:  # of a service class that the request may not have
                    self._records.retract(key.project, request_id, key_digest=key_digest)
                    raise
                stream.keep = True
                stream.idempotency = key_digest
                stream.note = Note(
                    request.endpoint,
                    request.stream,
                    request.include_usage,
                    keyed=True,
                    digest=digest,
                    calls=letter_of(request.calls),
                ).encode()
                return stream
        else:
            first = asked.event.request
            if asked.key is not None:
                await self._records.check_same(key.project, self._digests.key(asked.key), first)
        number = self._opener.next_number()
        found = await self._records.find(first, key, digest, number)
        if found.verdict != "done":
            is_greedy = request.body.temperature == 0
            return self._reopener.attached(first, found, number, asked.event, key, request.stream, is_greedy)
        journal, last = await self._records.last_entry(found)
        n_produced = 0 if last is None else last.offset + len(last.token_ids)
        if asked.event is not None and asked.event.n_tokens > n_produced:
            raise bad_request(
                f"Last-Event-ID is ahead of the answer ({n_produced} tokens): send the id of an event received",
                "Last-Event-ID",
                "invalid_event_id",
            )
        if last is None and found.machine:
            raise not_kept(key)
        if last is not None and last.end is not None and not was_cut_off(last):
            return self._reopener.replayed(first, found, number, asked.event, key, request.stream)
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
        number = self._opener.next_number()
        found = await self._records.find(first, key, "", number)
        if found.verdict != "done":
            stream = self._reopener.attached(
                first, found, number, event, key, streaming=True, is_greedy=False
            )
            return stream, found.note.include_usage
        _, last = await self._records.last_entry(found)
        if last is None and found.machine:
            raise not_kept(key)
        if last is None or last.end is None or was_cut_off(last):
            raise ApiError(
                409,
                "body_needed",
                "the answer was cut off when its connection broke: send the request itself again, with Last-Event-ID, "
                "to go on",
                headers=NO_RETRY,
            )
        return self._reopener.replayed(
            first, found, number, event, key, streaming=True
        ), found.note.include_usage

    async def admit(self, stream: Stream, request: GenerationRequest, body: bytes) -> None:
        """Admission of what took a key or continues a request: where it is refused, that is given back."""
        try:
            await self._dispatcher.admit(stream, request, body)
        except ApiError:
            if not stream.admitted:
                first = "" if stream.origin is None else stream.origin.request
                self._records.retract(
                    stream.key.project, stream.request, key_digest=stream.idempotency, first=first
                )
            raise

    async def _continued(
        self,
        first: str,
        found: Found,
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
        origin = origin_of(Resumed.CONTINUED, first, found.created_ms, event, n_carried, n_charged)
        stream = self._opener.open(request_id, key, deployment, request, origin)
        stream.note = found.note._replace(n_carried=n_carried, n_carried_prompt=n_charged).encode()
        stream.keep = found.note.keyed
        try:
            await self._records.inherit(stream, first, found.request, journal if n_carried else "", last)
            await self.admit(stream, request, body)
        except BaseException:
            self._ends.close(stream)
            raise
        self.n_continued += 1
        if n_carried:
            self._ends.inbox.catch_up(stream)
        return stream
