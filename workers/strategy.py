"""The short way of a `corral.serve` message from the consumer to LoopPool: no Request, signal, event, ETA or rate.

Celery asks `LightStrategy` for a message handler at every connection (`Task.Strategy`). A message exactly as
contract.py writes it, not revoked, goes straight to the pool; any other takes Celery's own strategy, which knows
how to reject, discard or serve it. Byte for byte ours, it is not even decoded: the transport offers it as it came
from Redis. What `inspect`, `revoke` and the stops need of a request is in `LightRequest`.
Everything here runs on the hub's thread except `on_end`. It must never log a message's arguments or run a job.
"""

from __future__ import annotations

import logging
import os
import re
from collections import deque
from functools import cached_property, partial
from time import time
from typing import Any, Final

import msgspec
from celery.worker import state as worker_state
from celery.worker.strategy import default as stock_strategy

from workers.contract import SERVE_TASK, celery_message
from workers.pool import LoopPool
from workers.transport import Poller

log = logging.getLogger(__name__)


class _NoKwargs(msgspec.Struct, forbid_unknown_fields=True):
    pass


class _Embed(msgspec.Struct, forbid_unknown_fields=True):
    callbacks: None
    errbacks: None
    chain: None
    chord: None


_body_decoder = msgspec.json.Decoder(tuple[tuple[str, int], _NoKwargs, _Embed])

# What every message of ours has in common; the ids differ. An unknown header (redelivered, eta, stamps, …)
# or another value is stock's to interpret.
_SAMPLE: Final[dict[str, Any]] = msgspec.json.decode(celery_message("", 0, ""))
_ANY_ID: Final = {"id": None, "root_id": None}
_HEADERS: Final[dict[str, Any]] = _SAMPLE["headers"] | _ANY_ID
_CONTENT: Final = (_SAMPLE["content-type"], _SAMPLE["content-encoding"])

# Where the ids stand in the bytes of a message of ours; that the rest is ours, too, is then a comparison.
_IDS: Final = re.compile(rb'\{"body": "\[\[\\"([0-9A-Za-z_.-]{1,128})\\", (\d{1,9})\], ')
_REPLICA_FIELD: Final = b'"routing_key": "replica.'
# An ended job wakes the hub so much later: mostly its ack has left by then, in the pass of a message (at 200 requests a
# second in 7 of 8 cases). An ack that is late costs nothing: a job that has ended is refused when it comes again.
ACK_DELAY_S: Final = 0.01


class RawMessage:
    """A message of ours that nobody has decoded: what a request needs of kombu's Message."""

    def __init__(self, raw: bytes, channel: Any, delivery_tag: str) -> None:
        self.delivery_tag = delivery_tag
        self._raw = raw
        self._channel = channel

    @cached_property
    def _decoded(self) -> dict[str, Any]:
        decoded: dict[str, Any] = msgspec.json.decode(self._raw)
        return decoded

    @property
    def headers(self) -> dict[str, Any]:
        headers: dict[str, Any] = self._decoded["headers"]
        return headers

    @property
    def properties(self) -> dict[str, Any]:
        properties: dict[str, Any] = self._decoded["properties"]
        return properties

    @property
    def delivery_info(self) -> dict[str, Any]:
        info: dict[str, Any] = self.properties["delivery_info"]
        return info

    def ack_log_error(self, logger: logging.Logger, errors: Any) -> None:
        """As kombu's; our channel's ack only takes a note, so there is no error to log."""
        self._channel.basic_ack(self.delivery_tag)


class LightRequest:
    """A message being served, as celery.worker.state and the control commands see it. Always active: LoopPool
    starts a job at once, so none is ever reserved only."""

    __slots__ = (
        "__weakref__",
        "_connection_errors",
        "acknowledged",
        "arguments",
        "eventer",  # set by Celery on reconnecting; never used
        "hostname",
        "id",
        "message",
        "task",
        "time_start",
    )
    name = SERVE_TASK

    def __init__(
        self, task_id: str, message: Any, arguments: tuple[str, int], task: Any, consumer: Any
    ) -> None:
        self.id = task_id
        self.message = message
        self.arguments = arguments
        self.task = task
        self.hostname = consumer.hostname
        self._connection_errors = consumer.connection_errors
        self.time_start = time()
        self.acknowledged = False

    def info(self, safe: bool = False) -> dict[str, Any]:
        """What `inspect active` and `query_task` show: stock's fields and values. `safe`: without arguments."""
        delivery_info = self.message.delivery_info
        return {
            "id": self.id,
            "name": self.name,
            "args": self.message.headers["argsrepr"] if safe else list(self.arguments),
            "kwargs": self.message.headers["kwargsrepr"] if safe else {},
            "type": self.name,
            "hostname": self.hostname,
            "time_start": self.time_start,
            "acknowledged": self.acknowledged,
            "delivery_info": {
                "exchange": delivery_info.get("exchange"),
                "routing_key": delivery_info.get("routing_key"),
                "priority": self.message.properties.get("priority"),
                "redelivered": delivery_info.get("redelivered", False),
            },
            "worker_pid": os.getpid(),
        }

    def terminate(self, pool: LoopPool, signal: Any = None) -> None:
        """Revoked while running: acknowledged, then cancelled."""
        worker_state.task_ready(self)
        self.acknowledge()
        self._cancel_job(pool)

    def cancel(self, pool: LoopPool, signal: Any = None, emit_retry: bool = True) -> None:
        """Cold shutdown: cancelled and not acknowledged, so that closing the channel puts the message back."""
        worker_state.task_ready(self)
        self._cancel_job(pool)

    def acknowledge(self) -> None:
        if not self.acknowledged:
            self.message.ack_log_error(log, self._connection_errors)
            self.acknowledged = True

    def _cancel_job(self, pool: LoopPool) -> None:
        # Looked up, not held: the job holds this request, and a cycle would keep both in `inspect active`.
        job = pool.job(self.arguments)
        if job is not None:
            job.terminate()

    def __repr__(self) -> str:
        return f"<LightRequest: {self.name}[{self.id}]>"


class LightStrategy:
    """`Task.Strategy` of an application's `corral.serve`. One for the application's life: it carries ended jobs
    from the pool's loop to the hub, across connections."""

    def __init__(self) -> None:
        self._ended: deque[LightRequest] = deque()
        self._hub: Any = None
        self._pool: LoopPool | None = None

    def __call__(self, task: Any, app: Any, consumer: Any) -> Any:
        """The handler of the connection that `consumer` has just made."""
        stock = stock_strategy(task, app, consumer)
        pool, self._hub = consumer.pool, consumer.hub
        if not isinstance(pool, LoopPool) or self._hub is None:
            return stock
        self._pool = pool
        pool.settle_ended = self.settle_ended
        self.settle_ended()  # the pass that lost the connection may have left some

        light = _Light(self, task, consumer, pool)

        def on_message(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> None:
            arguments = read_arguments(message)
            if arguments is None or message.headers["id"] in worker_state.revoked:
                stock(message, body, ack, reject, callbacks)
            else:
                light.serve(message.headers["id"], message, arguments, callbacks)

        poller = getattr(getattr(getattr(consumer, "connection", None), "transport", None), "cycle", None)
        if isinstance(poller, Poller):
            poller.light, poller.before_acks = light, self.settle_ended
        return on_message

    def on_end(self, request: LightRequest, result: object) -> None:
        """A job has ended; on the pool's loop. Its request is settled on the hub, which owns acks and state: in its
        next pass, which is caused a little later if nothing else causes one."""
        self._ended.append(request)
        if len(self._ended) == 1:  # otherwise the hub is already on its way
            assert self._pool is not None
            self._pool.call_later(ACK_DELAY_S, self._wake_hub)

    def _wake_hub(self) -> None:
        if self._ended:
            self._hub.call_soon(self.settle_ended)

    def settle_ended(self) -> None:
        """Acknowledge the jobs that have ended; on the hub."""
        while True:
            try:
                request = self._ended.popleft()
            except IndexError:
                return
            worker_state.task_ready(request)
            try:
                request.acknowledge()
            except Exception:
                log.exception("acknowledging a finished job failed")


class _Light:
    """What one connection's consumer does with messages of ours."""

    def __init__(self, strategy: LightStrategy, task: Any, consumer: Any, pool: LoopPool) -> None:
        self._strategy = strategy
        self._task = task
        self._consumer = consumer
        self._pool = pool

    def read(self, raw: bytes) -> tuple[str, int] | None:
        arguments = read_raw(raw)
        if arguments is None or f"{arguments[0]}.{arguments[1]}" in worker_state.revoked:
            return None
        return arguments

    def start(self, channel: Any, raw: bytes, delivery_tag: str, arguments: tuple[str, int]) -> None:
        message = RawMessage(raw, channel, delivery_tag)
        self.serve(delivery_tag, message, arguments, self._consumer.on_task_message)

    def serve(self, task_id: str, message: Any, arguments: tuple[str, int], callbacks: Any) -> None:
        request = LightRequest(task_id, message, arguments, self._task, self._consumer)
        worker_state.task_reserved(request)
        worker_state.task_accepted(request)
        for callback in callbacks:
            callback(request)
        self._pool.submit(task_id, arguments, partial(self._strategy.on_end, request))


def read_arguments(message: Any) -> tuple[str, int] | None:
    """(request id, epoch) of a message exactly as contract.celery_message writes it; None for any other."""
    headers = message.headers
    if (
        type(headers.get("id")) is not str
        or headers | _ANY_ID != _HEADERS
        or (message.content_type, message.content_encoding) != _CONTENT
    ):
        return None
    try:
        return _body_decoder.decode(message.body)[0]
    except (msgspec.MsgspecError, TypeError, ValueError):
        return None


def read_raw(raw: bytes) -> tuple[str, int] | None:
    """(request id, epoch) of a message that is byte for byte what contract.celery_message writes; None for any
    other."""
    found = _IDS.match(raw)
    if found is None:
        return None
    request_id, epoch = found[1].decode(), int(found[2])
    replica_at = raw.rfind(_REPLICA_FIELD)
    replica = raw[replica_at + len(_REPLICA_FIELD) : raw.find(b'"', replica_at + len(_REPLICA_FIELD))]
    if replica_at < 0 or raw != celery_message(request_id, epoch, replica.decode("ascii", "replace")):
        return None
    return request_id, epoch
