"""One call of an endpoint: what it says, event by event, within the time limits; or why it failed.

Called by engine.py, which decides whether to try again. A failure says whether another try may help and whether it is
the endpoint's. Never logs or quotes what came, but for the sentence with which it refuses a request as wrong.
"""

from __future__ import annotations

import asyncio
import email.utils
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from workers.addresses import CallFailedError, RefusedAddressError, allowed_networks, target
from workers.contract import UpstreamSecret, UpstreamSpec
from workers.engine.upstream.answer import DONE, NotAnAnswerError, Piece, piece_of, refusal_of
from workers.engine.upstream.breaker import MAX_PAUSE_S
from workers.engine.upstream.http import Connection, Connections, HttpError, host_header
from workers.engine.upstream.sse import EventParser, SseError

_MAX_BODY_BYTES: Final = 8 << 20  # of an answer that is no stream
_MAX_ERROR_BYTES: Final = 16 << 10
_MAX_ERROR_S: Final = 2.0
_LAST_WORDS_S: Final = 0.5  # for the usage and the rest, once the end was told
_WHO: Final = "the endpoint that serves this model"
_BUSY: Final = (408, 425, 429)
_REFUSALS: Final = (400, 413, 422)


class CallFailed(Exception):  # noqa: N818 - an outcome
    """One call. `again`: another may fare better; `counts`: it speaks against the endpoint."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        again: bool = True,
        counts: bool = True,
        retry_after_s: float | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.again, self.counts, self.retry_after_s = again, counts, retry_after_s


class Calls:
    """Calls of one endpoint. Belongs to one event loop."""

    def __init__(self, spec: UpstreamSpec, secret: UpstreamSecret, now_s: Callable[[], float]) -> None:
        """Raises RefusedAddressError for what is no URL that may be called."""
        self._spec = spec
        self._now_s = now_s
        to = target(spec.base_url)
        self._base = to.path.rstrip("/")
        self._connections = Connections(to, allowed_networks(spec.allow))
        self._headers = {
            "Host": host_header(to),
            "User-Agent": "corral",
            "Accept": "text/event-stream, application/json",
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            **secret.headers,
            **({"Authorization": f"Bearer {secret.api_key}"} if secret.api_key else {}),
        }

    def close(self) -> None:
        self._connections.close()

    async def pieces(self, path: str, body: bytes) -> AsyncGenerator[Piece, None]:
        """What is said, up to and with the end of the answer. Raises CallFailed, also where the end is missing."""
        spec, now_s = self._spec, self._now_s
        due_s = now_s() + spec.first_token_s
        connection = await self._open(path, body, due_s)
        try:
            if connection.status != 200:
                raise await _refused(connection)
            began = ended = False
            async with aclosing(_events(connection)) as events:
                while True:
                    try:
                        async with asyncio.timeout(max(due_s - now_s(), 0.001)):
                            data = await anext(events, None)
                    except TimeoutError:
                        if ended:
                            return
                        raise _late(spec, began) from None
                    if data is None or data == DONE:
                        if not ended and data is None:
                            raise CallFailed(502, "upstream_interrupted", f"{_WHO} broke off: send it again")
                        break
                    piece = piece_of(data)
                    if piece.error:
                        raise CallFailed(502, "upstream_failed", f"{_WHO} failed in between: send it again")
                    if piece.text:  # what carries nothing, however often it comes, is no progress
                        began, due_s = True, now_s() + spec.between_tokens_s
                    if piece.finish is not None:
                        ended = True
                    if ended:
                        due_s = min(due_s, now_s() + _LAST_WORDS_S)
                    held_at_s = now_s()
                    yield piece
                    due_s += now_s() - held_at_s  # while we are slow ourselves, the endpoint is not late
            await self._read_out(connection, due_s)
        except (NotAnAnswerError, SseError) as error:
            raise CallFailed(
                502, "upstream_garbage", f"{_WHO} answers what cannot be read: {error}"
            ) from None
        except HttpError as error:
            raise CallFailed(502, "upstream_interrupted", f"{_WHO} broke off: {error}") from None
        finally:
            self._connections.give_back(connection, now_s())  # closed, unless it was read to its end

    async def _open(self, path: str, body: bytes, due_s: float) -> Connection:
        """A connection on which the head of the answer has come."""
        spec, now_s = self._spec, self._now_s
        for is_second in (False, True):
            connection: Connection | None = None
            try:
                async with asyncio.timeout(spec.connect_s):
                    connection = (
                        await self._connections.fresh()
                        if is_second
                        else await self._connections.take(now_s())
                    )
                async with asyncio.timeout(max(due_s - now_s(), 0.001)):
                    await connection.send("POST", self._base + path, self._headers, body)
                return connection
            except TimeoutError:
                if connection is None:
                    raise CallFailed(
                        504, "upstream_unreachable", f"{_WHO} does not take connections: try again"
                    ) from None
                connection.close()
                raise _late(spec, began=False) from None
            except HttpError as error:
                assert connection is not None
                connection.close()
                if error.fresh or is_second:  # else the server had closed what was kept
                    raise CallFailed(502, "upstream_failed", f"{_WHO} does not answer: {error}") from None
            except (RefusedAddressError, CallFailedError, OSError) as error:
                again = not isinstance(error, RefusedAddressError)
                raise CallFailed(
                    502, "upstream_unreachable", f"{_WHO} cannot be reached: try again", again=again
                ) from None
            except BaseException:
                if connection is not None:
                    connection.close()
                raise
        raise AssertionError("unreachable")

    async def _read_out(self, connection: Connection, due_s: float) -> None:
        """The bytes after the end, so that the connection can be used again; what comes late is not waited for."""
        try:
            async with asyncio.timeout(max(min(due_s - self._now_s(), _LAST_WORDS_S), 0.001)):
                async for _ in connection.body():
                    pass
        except (TimeoutError, HttpError):
            connection.close()


async def _events(connection: Connection) -> AsyncGenerator[bytes, None]:
    """Data of the events of a stream; a body that is none, as one."""
    if connection.headers.get("content-encoding", "identity").lower() != "identity":
        raise SseError("it is compressed, which nobody asked for")
    async with aclosing(connection.body()) as body:
        if "text/event-stream" not in connection.headers.get("content-type", ""):
            whole = bytearray()
            async for part in body:
                whole += part
                if len(whole) > _MAX_BODY_BYTES:
                    raise SseError("it is too long")
            yield bytes(whole)
            return
        parser = EventParser()
        async for part in body:
            for data in parser.feed(part):
                yield data
        last = parser.flush()
        if last is not None:
            yield last


async def _refused(connection: Connection) -> CallFailed:
    """What an answer other than 200 means."""
    status = connection.status
    said, param = "", None
    if status in _REFUSALS:
        body = bytearray()
        try:
            async with asyncio.timeout(_MAX_ERROR_S), aclosing(connection.body()) as parts:
                async for part in parts:
                    body += part
                    if len(body) > _MAX_ERROR_BYTES:
                        break
        except (TimeoutError, HttpError):
            pass
        said, param = refusal_of(bytes(body))
        message = f"{_WHO} refuses this request" + (f": {said}" if said else "")
        return CallFailed(400, "upstream_refused", message, again=False, counts=False, param=param)
    wait_s = retry_after_s(connection.headers.get("retry-after"), time.time())
    if status in _BUSY:
        return CallFailed(
            503, "upstream_busy", f"{_WHO} takes no more at present: try again shortly",
            counts=wait_s is not None or status == 429, retry_after_s=wait_s,
        )  # fmt: skip
    if status >= 500:
        return CallFailed(
            502, "upstream_failed", f"{_WHO} failed ({status}): try again", retry_after_s=wait_s
        )
    code = "upstream_refuses_us" if status in (401, 402, 403) else "upstream_misconfigured"
    return CallFailed(502, code, f"{_WHO} is not set up right ({status}): tell its owner", again=False)


def retry_after_s(header: str | None, now_s: float) -> float | None:
    """Seconds, or an HTTP date against the clock of now (since the epoch); None for neither."""
    if header is None:
        return None
    try:
        found = float(header)
    except ValueError:
        try:
            found = email.utils.parsedate_to_datetime(header).timestamp() - now_s
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(found, 0.0), MAX_PAUSE_S) if found == found else None  # not NaN


def _late(spec: UpstreamSpec, began: bool) -> CallFailed:
    what, limit_s = ("next", spec.between_tokens_s) if began else ("first", spec.first_token_s)
    return CallFailed(
        504, "upstream_timeout", f"{_WHO} did not send its {what} token within {limit_s:g} s: try again"
    )
