"""POST /v1/chat/completions, /v1/completions, /v1/messages (and its count_tokens), /v1/responses, and the way back to
them: from bytes to an answer, whole or streamed.

Called by the app with an authenticated key. Headers wait for the replica's first word, so that its refusal
still gets a proper status; only a client that waits for a replica gets its headers early, with comments that
say why. Whatever happens, the stream is closed here once, which cancels what has not ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass
from typing import Any, Final

from controlplane.gateway import exchange, schemas, writers
from controlplane.gateway.dispatch import Dispatcher
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError, ClientGone, Headers, from_wire, unavailable
from controlplane.gateway.http import JSON, Receive, Send, respond
from controlplane.gateway.identity import Asked
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.gateway.messages import parse_count, parse_messages
from controlplane.gateway.opening import Opener
from controlplane.gateway.responses import parse_responses
from controlplane.gateway.resume import Resumer
from controlplane.gateway.shadows import Shadows
from controlplane.gateway.stages import StageBoard, comment_of
from controlplane.gateway.stream import Origin, Stream
from controlplane.gateway.surface import Surface, Translated
from controlplane.tenants.end_customers import MAX_ID
from workers.contract import End, FinishReason

_SSE_HEADERS: Headers = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache, no-transform"),
    (b"x-accel-buffering", b"no"),  # or nginx would hold tokens back
)
_TRANSLATE: Final = {
    Translated.MESSAGES: parse_messages,
    Translated.COUNT: parse_count,
    Translated.RESPONSES: parse_responses,
}
_MAX_NAMED = 20  # models named in a 404
# Where uvicorn's own protocol runs the app a watch costs a task. Most plain answers are complete before; a client that
# leaves sooner is noticed now.
_WATCH_AFTER_S = 0.05


@dataclass(slots=True)
class Outcome:
    """What became of a request, for its log line and the counters. Filled in as it goes."""

    status: int = 0  # 0: no response was begun
    code: str = ""
    key: KeyContext | None = None
    stream: Stream | None = None


class Generator:
    """Serves generation requests with the parts of one process."""

    def __init__(
        self,
        opener: Opener,
        dispatcher: Dispatcher,
        resumer: Resumer,
        ends: Ends,
        board: StageBoard,
        shadows: Shadows,
    ) -> None:
        self._opener = opener
        self._dispatcher = dispatcher
        self._resumer = resumer
        self._ends = ends
        self._board = board
        self._shadows = shadows

    async def serve(
        self,
        endpoint: Surface,
        key: KeyContext,
        request_id: str,
        body: bytes,
        receive: Receive,
        send: Send,
        headers: Headers,
        outcome: Outcome,
        asked: Asked | None = None,
        slo_class: bytes | None = None,
        end_customer: bytes | None = None,
    ) -> None:
        """Answer one request. `asked`: its headers name an earlier one, or a key for those to come. `slo_class`,
        `end_customer`: they name a service class, or the tenant's own customer.

        Raises ApiError before the first byte (the caller renders it; a later failure is told in the stream),
        and ClientGone when nobody is left to answer.
        """
        if isinstance(endpoint, Translated):
            request, body = _TRANSLATE[endpoint](body)
            if endpoint is Translated.COUNT:
                asked = None  # there is nothing to come back for
        else:
            request = schemas.parse(endpoint, body)
        deployment = find_deployment(key, request.model)
        if slo_class is not None:
            request.slo_class = slo_class[:64].decode("latin-1").strip()
        if end_customer is not None:
            request.end_customer = end_customer[:MAX_ID].decode("utf-8", "replace").strip()
        if asked is None:
            stream = self._opener.open(request_id, key, deployment, request)
        else:
            stream = await self._resumer.open(asked, request_id, key, deployment, request, body)
        await self._run(stream, request, body, request.include_usage, receive, send, headers, outcome)

    async def follow(
        self,
        key: KeyContext,
        request: str,
        asked: Asked | None,
        receive: Receive,
        send: Send,
        headers: Headers,
        outcome: Outcome,
    ) -> None:
        """Answer GET /v1/requests/<id>/events; `request` is bare hex. Raises as `serve` does."""
        stream, include_usage = await self._resumer.follow(request, asked.event if asked else None, key)
        await self._run(stream, None, b"", include_usage, receive, send, headers, outcome)

    async def _run(
        self,
        stream: Stream,
        request: schemas.GenerationRequest | None,
        body: bytes,
        include_usage: bool,
        receive: Receive,
        send: Send,
        headers: Headers,
        outcome: Outcome,
    ) -> None:
        """From an open stream to its close; `request` is None where it was admitted before."""
        outcome.stream = stream
        echo = None if request is None else request.echo
        if stream.origin is not None:
            headers = _resumed_headers(headers, stream.origin)
        watch: asyncio.TimerHandle | None = None
        direct = exchange.of(send)
        try:
            if not stream.admitted:
                assert request is not None
                admission = self._resumer if stream.idempotency else self._dispatcher
                await admission.admit(stream, request, body)
            headers = (*headers, *stream.limits)
            loop = asyncio.get_running_loop()
            if direct is not None:
                if direct.disconnected:
                    raise ClientGone
                direct.on_gone = lambda: stream.fail(ClientGone())
            else:
                watch = loop.call_later(_WATCH_AFTER_S, _watch, receive, stream)
            if stream.queued:
                self._board.wait(stream)
            if stream.streaming:
                await self._stream(stream, include_usage, echo, send, headers, outcome, loop)
            else:
                await self._answer(stream, echo, send, headers, outcome, loop)
        finally:
            if watch is not None:
                watch.cancel()
            if direct is not None:
                direct.on_gone = None
            if stream.queued:
                self._board.leave(stream)
            self._ends.close(stream)
            if stream.deployment.shadows and not stream.is_count:
                self._shadows.offer(stream, request, body)

    @staticmethod
    async def _answer(
        stream: Stream,
        echo: dict[str, Any] | None,
        send: Send,
        headers: Headers,
        outcome: Outcome,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        while not stream.over:
            await stream.wait(loop)
        end = _checked_end(stream)
        outcome.status = 200
        await respond(send, 200, writers.whole(stream, end, echo), (JSON, *headers))

    async def _stream(
        self,
        stream: Stream,
        include_usage: bool,
        echo: dict[str, Any] | None,
        send: Send,
        headers: Headers,
        outcome: Outcome,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        while not (stream.pieces or stream.over or stream.comment_due):
            await stream.wait(loop)
        if stream.over and not stream.pieces:
            _checked_end(stream)  # a failure before the first byte gets a proper status
        outcome.status = 200
        await send({"type": "http.response.start", "status": 200, "headers": [*_SSE_HEADERS, *headers]})
        writer = writers.writer_of(stream, include_usage=include_usage, echo=echo)
        direct = exchange.of(send)
        while True:
            out = writer.pieces(stream.take()) if stream.pieces else b""
            if stream.over:
                break
            if stream.comment_due:
                stream.comment_due = False
                out = out or writer.comment(comment_of(stream, time.time_ns() // 1_000_000))
            if out:
                stream.wrote_at = time.monotonic()
                if direct is not None:
                    await direct.more(out)
                else:
                    await send({"type": "http.response.body", "body": out, "more_body": True})
            if stream.paused and not stream.pieces:
                self._ends.inbox.catch_up(stream)  # it has drained
            if not (stream.pieces or stream.over or stream.comment_due):
                await stream.wait(loop)
        try:
            out += writer.end(_checked_end(stream))
        except ApiError as error:
            outcome.code = error.code
            out += writer.error(error)
        await send({"type": "http.response.body", "body": out})


def _resumed_headers(headers: Headers, origin: Origin) -> Headers:
    """The request id is that of the first call, and how it goes on is told."""
    others = (header for header in headers if header[0] != b"x-request-id")
    return (
        (b"x-request-id", b"req_" + origin.request.encode()),
        (b"x-corral-resumed", origin.how.value.encode()),
        *others,
    )


def find_deployment(key: KeyContext, model: str) -> Deployment:
    """The deployment a `model` names; a 404 that lists what the key may use (another tenant's looks the
    same)."""
    deployment = key.deployments.get(model)
    if deployment is not None:
        return deployment
    if key.stale:  # it may be younger than what is known of the key
        raise unavailable(
            "model_unavailable",
            "whether this model exists cannot be checked at the moment: try again shortly",
            2.0,
        )
    names = sorted(key.deployments)
    shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
    if names:
        remedy = f"this API key may use: {shown}"
    elif key.models_bound:
        remedy = "this API key's scopes.models names no deployment of its project: have one added to it"
    else:
        remedy = "this API key's project has no deployments yet"
    raise ApiError(
        404, "model_not_found", f"the model {model[:100]!r} does not exist; {remedy}", param="model"
    )


def _checked_end(stream: Stream) -> End:
    """Its end, if it is one that a client gets an answer for; raises what it failed with otherwise."""
    if stream.failure is not None:
        raise stream.failure
    end = stream.end
    assert end is not None
    if end.error is not None:
        raise from_wire(end.error)
    if end.reason in (FinishReason.ABORT, FinishReason.ERROR):
        raise unavailable("generation_aborted", "the answer was interrupted: send the request again")
    return end


def _watch(receive: Receive, stream: Stream) -> None:
    """Fail the stream when its client leaves. The task ends with the response, if not before."""
    task = asyncio.get_running_loop().create_task(_disconnect(receive))
    task.add_done_callback(lambda _: stream.fail(ClientGone()))


async def _disconnect(receive: Receive) -> None:
    """Returns when the connection has gone, or the response is complete."""
    with contextlib.suppress(Exception):
        while (await receive())["type"] != "http.disconnect":
            pass
