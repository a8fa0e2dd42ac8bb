"""What a client that waits for a replica is told: the stage of its deployment, and the failure that ends its
wait.

Fed by the stage channel and, when a wait begins, by the stage hash. Only requests that no replica has yet are
ended by a failed stage.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from typing import Final

import msgspec

from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError
from controlplane.gateway.stream import Stream
from workers.contract import Stage
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError

log = logging.getLogger(__name__)

_DEFAULT_RETRY_S: Final = 5
_SILENT_S: Final = 1.0
_decode_stage = msgspec.json.Decoder(Stage).decode


class StageBoard:
    """Waiting streams by deployment. Belongs to one event loop."""

    def __init__(self, redis: Client, keys: CellKeys, ends: Ends, *, comment_after_s: float) -> None:
        self._redis = redis
        self._keys = keys
        self._ends = ends
        self._comment_after_s = comment_after_s
        self._waiting: dict[str, dict[int, Stream]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def wait(self, stream: Stream) -> None:
        """A queued stream begins to wait; without any replica it is told why from the start."""
        self._waiting.setdefault(stream.deployment.id, {})[stream.number] = stream
        if stream.waited_for_replica:
            if stream.streaming:
                asyncio.get_running_loop().call_later(self._comment_after_s, self._begin_comments, stream)
            self._spawn(self._read_stage(stream))

    def leave(self, stream: Stream) -> None:
        """It waits no more."""
        waiting = self._waiting.get(stream.deployment.id)
        if waiting is not None:
            waiting.pop(stream.number, None)
            if not waiting:
                del self._waiting[stream.deployment.id]

    def on_stage(self, payload: bytes) -> None:
        """A stage was announced. Never raises."""
        try:
            stage = _decode_stage(payload)
        except ValueError:
            log.warning("undecodable stage message")
            return
        for stream in list(self._waiting.get(stage.deployment, {}).values()):
            self._tell(stream, stage)
        if stage.stage == "failed":
            self._end_requeued(stage)

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _tell(self, stream: Stream, stage: Stage) -> None:
        stream.stage = stage
        if stage.stage == "failed":
            self._spawn(self._end(stream, stage))
        elif stream.comment_due or stream.wrote_at > stream.admitted_at:  # comments have begun
            stream.nudge()

    def _end_requeued(self, stage: Stage) -> None:
        """Requests whose replica died went back to the queue without waiting here: the silent ones are asked
        for."""
        silent_since = time.monotonic() - _SILENT_S
        waiting = self._waiting.get(stage.deployment, {})
        for stream in self._ends.inbox.streams.values():
            if (
                stream.deployment.id == stage.deployment
                and stream.number not in waiting
                and stream.admitted
                and not (stream.abandoned or stream.over)
                and (stream.machine is None or stream.heard_at <= silent_since)
            ):
                self._spawn(self._end(stream, stage))

    @staticmethod
    def _begin_comments(stream: Stream) -> None:
        if stream.first_at is None:
            stream.nudge()

    async def _read_stage(self, stream: Stream) -> None:
        """The stage as it stands now. A failure counts only until a retry may help: then somebody must
        try."""
        try:
            flat = await self._redis.call("HGETALL", self._keys.stage(stream.deployment.id))
        except RedisError:
            return
        row = {k.decode(): v.decode("utf-8", "replace") for k, v in zip(flat[::2], flat[1::2], strict=False)}
        if not row.get("stage") or stream.stage is not None:
            return
        stage = Stage(
            deployment=stream.deployment.id,
            stage=row["stage"],
            eta_ms=_whole(row.get("eta_ms")),
            code=row.get("code", ""),
            message=row.get("message", ""),
            retry_after_s=_whole(row.get("retry_after_s")),
            at_ms=_whole(row.get("at_ms")) or 0,
        )
        if stage.stage == "failed":
            retry_at_ms = stage.at_ms + 1000 * (stage.retry_after_s or _DEFAULT_RETRY_S)
            if retry_at_ms <= stream.admitted_at_ms:
                return
        self._tell(stream, stage)

    async def _end(self, stream: Stream, stage: Stage) -> None:
        try:
            waits = await self._ends.cancel_queued(stream)
        except RedisError:
            return  # the deadline ends it
        if waits:
            message = stage.message or "the model could not be started"
            retry_after_s = stage.retry_after_s or _DEFAULT_RETRY_S
            stream.fail(
                ApiError(503, stage.code or "model_unavailable", message, retry_after_s=retry_after_s)
            )

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def comment_of(stream: Stream, now_ms: int) -> str:
    """What a waiting client is told in an SSE comment, without the colon: printable ASCII, no line breaks."""
    if stream.first_at is not None or stream.machine is not None:
        return "corral stage=running"
    stage = stream.stage
    if stage is None:
        return "corral stage=waiting" if stream.waited_for_replica else "corral stage=queued"
    name = "".join(c for c in stage.stage if c.isalnum() or c == "_")[:40]
    if stage.eta_ms is None:
        return f"corral stage={name}"
    elapsed_ms = max(0, now_ms - stage.at_ms) if stage.at_ms else 0
    return f"corral stage={name} eta_ms={max(0, stage.eta_ms - elapsed_ms)}"


def _whole(text: str | None) -> int | None:
    try:
        return int(text) if text else None
    except ValueError:
        return None
