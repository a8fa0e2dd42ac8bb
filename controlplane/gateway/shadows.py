"""Copies of answered requests to shadows: chosen, sent off the path, compared with the answer and told.

Called by the generation handler once an answer is out, and only where the deployment has a shadow: nobody waits for
it, and what goes wrong here is nobody's failure but the copy's. Bounded in every direction: copies that wait and run in
this process, their bytes, and, over all gateways, those under way, per minute and the day's money (copyterms.py). What
does not fit is dropped and counted. Texts are compared in memory; what is told has counts and times only.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from typing import Final, NamedTuple

import uuid_utils

from billing.money import request_cost
from controlplane.gateway import copyterms
from controlplane.gateway.bodies import ChatBody
from controlplane.gateway.directory import ShadowRow
from controlplane.gateway.dispatch import Dispatcher
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError
from controlplane.gateway.opening import Opener
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.sse import finish_reason
from controlplane.gateway.stream import Stream
from controlplane.policy.likeness import is_chosen, similarity_ppm
from controlplane.upstreams.wire import FIELD, Batch, Result, Skipped, Skips, encode
from workers.contract import End, FinishReason, decode_journal_entry
from workers.keys import SHADOWS_STREAM_MAX, CellKeys
from workers.redis_client import Client, RedisError

log = logging.getLogger(__name__)

MAX_WAITING: Final = 64
MAX_WAITING_BYTES: Final = 8 << 20
MAX_RUNNING: Final = 16
EVERY_S: Final = 1.0  # a batch of results
MAX_TOLD: Final = 500  # in one
MAX_SERIES: Final = 1_000
FIRST_NUMBER: Final = 1 << 40  # of streams, beyond those of clients
_LOOKS: Final = 50  # for replicas that nobody asked for lately
_LOOK_EVERY_S: Final = 0.02
_MAX_ENTRIES: Final = 65_536  # of a journal
_ANSWERED: Final = (FinishReason.STOP, FinishReason.LENGTH)
_BY_LIMIT: Final = {
    b"requests_per_minute": Skipped.RATE,
    b"concurrency": Skipped.BUSY,
    b"budget": Skipped.BUDGET,
}
_BY_CODE: Final = {"queue_full": Skipped.BUSY, "insufficient_quota": Skipped.BUDGET}


class _Own(NamedTuple):
    """The request that is copied, and what is known of its answer."""

    stream: Stream  # over; its texts are gone
    end: End
    request: GenerationRequest
    body: bytes


class _Copy(NamedTuple):
    shadow: ShadowRow
    own: _Own


class Shadows:
    """Of one gateway process. Belongs to one event loop. `dispatcher`: one whose queue takes nobody."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        routes: RouteTable,
        ends: Ends,
        opener: Opener,
        dispatcher: Dispatcher,
    ) -> None:
        self.n_copied = self.n_skipped = 0
        self._redis = redis
        self._keys = keys
        self._routes = routes
        self._ends = ends
        self._opener = opener
        self._dispatcher = dispatcher
        self._waiting: deque[_Copy] = deque()
        self._n_waiting_bytes = 0
        self._running: set[asyncio.Task[None]] = set()
        self._results: list[Result] = []
        self._skips: Counter[tuple[str, str, str]] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    def offer(self, stream: Stream, request: GenerationRequest | None, body: bytes) -> None:
        """A request of a deployment with shadows is over and its client has what there is. If it was answered, those
        that it is chosen for get a copy. Never raises, never waits."""
        end = stream.end
        if request is None or end is None or end.error is not None or end.reason not in _ANSWERED:
            return
        if stream.origin is not None or stream.key.zero_retention:
            return
        own: _Own | None = None
        for shadow in stream.deployment.shadows:
            if not is_chosen(stream.request, shadow.share_ppm):
                continue
            own = own or _Own(stream, end, request, body)
            if len(self._running) < MAX_RUNNING:
                self._start(_Copy(shadow, own))
            elif self.n_waiting < MAX_WAITING and self._n_waiting_bytes + len(body) <= MAX_WAITING_BYTES:
                self._waiting.append(_Copy(shadow, own))
                self._n_waiting_bytes += len(body)
            else:
                self._skip(shadow, Skipped.CROWDED)

    async def close(self) -> None:
        """Give up what runs, tell what is known."""
        self._waiting.clear()
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._timer is not None:
            self._timer.cancel()
        self._tell()

    def _start(self, copy: _Copy) -> None:
        task = asyncio.get_running_loop().create_task(self._run(copy))
        self._running.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        if task.cancelled():
            return
        if self._waiting:
            copy = self._waiting.popleft()
            self._n_waiting_bytes -= len(copy.own.body)
            self._start(copy)

    async def _run(self, copy: _Copy) -> None:
        try:
            await self._send(copy)
        except ApiError as error:
            self._skip(copy.shadow, _why(error))
        except RedisError:
            self._skip(copy.shadow, Skipped.LOST)
        except Exception:
            log.exception("a copy of req_%s failed", copy.own.stream.request)
            self._skip(copy.shadow, Skipped.LOST)

    async def _send(self, copy: _Copy) -> None:
        """One copy from its admission to its end. ApiError where it is not admitted, or was lost."""
        shadow, own = copy
        key = copyterms.context_of(shadow, own.stream.key)
        deployment = copyterms.deployment_of(shadow, own.stream.key)
        if deployment is None:
            return
        own_text = await self._text_of(own.stream)
        await self._look(deployment.id)
        request = own.request
        request.end_customer = request.slo_class = request.tier = request.body.user = None
        if isinstance(request.body, ChatBody):
            request.body.safety_identifier = None
        stream = self._opener.open(uuid_utils.uuid7().hex, key, deployment, request)
        try:
            await self._dispatcher.admit(stream, request, own.body)
            text = await self._read(stream)
        finally:
            self._ends.close(stream)
        end = stream.end
        if end is None and (not isinstance(stream.failure, ApiError) or stream.failure.status != 504):
            raise stream.failure if isinstance(stream.failure, ApiError) else RedisError("it was lost")
        self.n_copied += 1
        self._results.append(_result(shadow, own, stream, text, own_text))
        if len(self._results) >= MAX_TOLD:
            self._tell()
        self._arm()

    async def _read(self, stream: Stream) -> str:
        """The text of the answer, or of as much as came."""
        loop, texts = asyncio.get_running_loop(), []
        while True:
            texts += [piece.text for piece in stream.take()]
            if stream.over:
                return "".join(texts)
            if stream.paused:
                self._ends.inbox.catch_up(stream)
            await stream.wait(loop)

    async def _text_of(self, stream: Stream) -> str | None:
        """What the request's own client was given, as its journal has it; None where that is gone."""
        machine = stream.machine
        if machine is None:  # it ended before anybody asked where it ran
            record = self._keys.request(stream.request)
            mid, was_mid = await self._redis.call("HMGET", record, "mid", "was_mid")
            machine = (mid or was_mid or b"").decode()
        journal = self._keys.machine(machine).journal(stream.request)
        entries = await self._redis.call("LRANGE", journal, 0, _MAX_ENTRIES - 1)
        if not entries:
            return None
        return "".join(decode_journal_entry(entry).text for entry in entries)

    async def _look(self, deployment: str) -> None:
        """Nobody may have asked for these replicas yet: without knowing one, nothing is sent there."""
        for _ in range(_LOOKS):
            if self._routes.candidates(deployment):
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    # -- telling

    def _skip(self, shadow: ShadowRow, why: Skipped) -> None:
        self.n_skipped += 1
        whose = (shadow.organization, shadow.id, why.value)
        if whose in self._skips or len(self._skips) < MAX_SERIES:
            self._skips[whose] += 1
        self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._tell)

    def _tell(self) -> None:
        self._timer = None
        results, self._results = self._results, []
        skips, self._skips = self._skips, Counter()
        if results or skips:
            batch = Batch(_now_ms(), results, [Skips(*whose, n) for whose, n in skips.items()])
            self._redis.fire(
                "XADD", self._keys.shadows, "MAXLEN", "~", SHADOWS_STREAM_MAX, "*", FIELD, encode(batch)
            )


def _why(error: ApiError) -> Skipped:
    limit = next((value for name, value in error.headers if name == b"x-corral-limit"), b"")
    return _BY_LIMIT.get(limit) or _BY_CODE.get(error.code) or Skipped.LOST


def _result(shadow: ShadowRow, own: _Own, stream: Stream, text: str, own_text: str | None) -> Result:
    """What is told of a copy that has ended, or was given up after its time."""
    end, failure = stream.end, stream.failure
    error = end.error if end is not None else None
    status, code = 200, ""
    if error is not None:
        status, code = error.status, error.code
    elif isinstance(failure, ApiError):
        status, code = failure.status, failure.code
    n_prompt, n_completion, cost_nano, finish = 0, stream.n_new, 0, ""
    if end is not None:
        n_prompt, n_completion = end.n_prompt, end.n_completion
        finish = finish_reason(end) if error is None else ""
        cost_nano = request_cost(
            stream.deployment.rates, n_prompt=n_prompt, n_cached=end.n_cached, n_completion=n_completion
        )
    is_answer = status == 200 and own_text is not None
    first_ms, itl_us = _pace(stream, n_completion)
    own_first_ms, own_itl_us = _pace(own.stream, own.end.n_completion)
    return Result(
        organization=shadow.organization,
        upstream=shadow.id,
        request=own.stream.request,
        at_ms=_now_ms(),
        status=status,
        code=code[:40],
        finish=finish,
        duration_ms=_ms(stream.last_at - stream.admitted_at),
        first_token_ms=first_ms,
        itl_us=itl_us,
        n_prompt=n_prompt,
        n_completion=n_completion,
        cost_nano=cost_nano,
        own_finish=finish_reason(own.end),
        own_first_token_ms=own_first_ms,
        own_itl_us=own_itl_us,
        own_duration_ms=_ms(own.stream.last_at - own.stream.admitted_at),
        own_n_completion=own.end.n_completion,
        is_same=text == own_text if is_answer and own.stream.is_greedy else None,
        similarity_ppm=similarity_ppm(text, own_text or "") if is_answer else None,
    )


def _pace(stream: Stream, n: int) -> tuple[int | None, int | None]:
    """(ms to the first token, mean gap in microseconds) as a client that streams sees them; tokens of a plain answer
    come in bundles, of which neither can be told."""
    if not stream.streaming or stream.first_at is None:
        return None, None
    gap_us = round((stream.last_at - stream.first_at) / (n - 1) * 1e6) if n > 1 else None
    return _ms(stream.first_at - stream.admitted_at), gap_us


def _ms(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
