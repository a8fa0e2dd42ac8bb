"""kombu's Redis transport made atomic: same keys, same bytes, but a killed consumer loses nothing.

Stock kombu pops a message (BRPOP) and records it as unacknowledged afterwards: a SIGKILL in between loses it,
and every message costs three round trips. Here one script pops a batch and records it in the same step, idle
waiting is a blocking peek that takes nothing, and the acks of a hub pass leave together. Celery finds this
module through `broker_transport`; what is not named here (priorities, fanout, restore, inspect) is inherited.
Used on the hub's thread only, as all of kombu's transport.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from queue import Empty
from time import monotonic, time
from typing import Any, Final, Protocol

import msgspec
from kombu.transport import redis as stock
from kombu.transport import virtual
from kombu.utils.json import loads as kombu_loads
from redis.credentials import CredentialProvider
from redis.exceptions import NoPermissionError, NoScriptError

from workers.acks import AckPipe
from workers.redis_address import read_password
from workers.redis_connection import pack
from workers.scripts import POP

log = logging.getLogger(__name__)

MAX_BATCH: Final = 64  # messages per pop: some 45 KB of reply, a few hundred µs of Redis
SCRIPT_RETRY_S: Final = 0.2  # at most this often, while the pop script is neither loaded nor ours to load

# What the consumer's Redis user must be allowed on its own keys and channels; in keys.MACHINE_COMMANDS.
CONSUMER_COMMANDS: Final = frozenset(
    (  # connection, transactions, script; queue and records; control messages
        *("auth", "hello", "ping", "select", "client|setname", "client|setinfo"),
        *("multi", "exec", "watch", "unwatch", "evalsha"),
        *("llen", "rpop", "lpush", "rpush", "blmove", "hget", "hset", "hdel", "zadd", "zrem", "del"),
        *("sadd", "srem", "smembers", "publish", "subscribe", "unsubscribe"),
    )
)

_envelope_decoder = msgspec.json.Decoder(dict[str, Any])


# kombu is untyped: its class attributes would be inferred as the constants they start with.
_StockQoS: Any = stock.QoS
_StockChannel: Any = stock.Channel
_StockPoller: Any = stock.MultiChannelPoller
_StockTransport: Any = stock.Transport


class LightConsumer(Protocol):
    """Serves messages as they came from Redis, on the hub's thread."""

    def read(self, raw: bytes) -> tuple[str, int] | None:
        """Task arguments of a message that `start` can serve; None: decode it and deliver it as any other."""

    def start(self, channel: Any, raw: bytes, delivery_tag: str, arguments: tuple[str, int]) -> None:
        """Serve it; `channel.basic_ack(delivery_tag)` when it is over."""


class QoS(_StockQoS):
    """Acks wait for the end of the hub pass; messages from the pop script are already on record."""

    def append(self, message: Any, delivery_tag: str) -> None:
        if delivery_tag in self._delivered and self.channel.is_recorded:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def expect(self, delivery_tag: str) -> None:
        """A popped message on its way to its consumer: should that fail, it is restored with the rest."""
        if self._dirty:
            self._flush()
        self._delivered[delivery_tag] = None

    def ack(self, delivery_tag: str) -> None:
        self.channel.acks.add(delivery_tag)
        virtual.QoS.ack(self, delivery_tag)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        if self.channel.redeliver_overdue:
            super().restore_visible(*args, **kwargs)


class Channel(_StockChannel):
    """Two more transport options.

    redeliver_overdue (default True, as stock): False where a queue has one consumer for its whole life and recovery is
    somebody else's: nothing is then redelivered after the visibility timeout, and the consumer's user needs no lock.
    password_file: where the password is read at every connect.
    """

    QoS = QoS
    from_transport_options = (*_StockChannel.from_transport_options, "redeliver_overdue", "password_file")
    redeliver_overdue = True
    password_file = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.is_recorded = False  # the message being delivered came from the pop script
        self._no_ack_queues: set[str] = set()
        self._backlog = True  # there may be more messages than we took
        self._asked: tuple[str, list[str]] = ("BRPOP", [])  # command in flight on the consuming connection
        self._room = 0  # messages that the pop script was asked for
        self._script_wanted_at = 0.0
        super().__init__(*args, **kwargs)
        self.acks = AckPipe(
            lambda: self.pool.connection_class(**self.pool.connection_kwargs),
            self._prefixed(self.unacked_key),
            self._prefixed(self.unacked_index_key),
        )

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        found: dict[str, Any] = super()._connparams(asynchronous)
        if self.password_file:
            user, given = found.pop("username", None), found.pop("password", None)
            found["credential_provider"] = _FromFile(user, given, self.password_file)
        return found

    # -- consuming

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        (self._no_ack_queues.add if no_ack else self._no_ack_queues.discard)(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for messages: pop a batch while there is a backlog, else wait without taking anything."""
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues or monotonic() < self._script_wanted_at:
            return
        sources = [queue for _ in self.priority_steps for queue in queues]
        keys = [
            f"{self.global_keyprefix}{self._q_for_pri(queue, priority)}"
            for priority in self.priority_steps
            for queue in queues
        ]
        if not self._no_ack_queues.isdisjoint(queues):  # popping must not leave a record that nobody will ack
            self._ask_stock(sources, timeout)
        elif self._backlog:
            credit = self.qos.can_consume_max_estimate()
            self._room = room = MAX_BATCH if credit is None else min(MAX_BATCH, credit)
            records = self._prefixed(self.unacked_key), self._prefixed(self.unacked_index_key)
            command = ("EVALSHA", POP.sha, 2 + len(keys), *records, *keys, room, time())
            self._ask("POP", sources, command)
        elif len(keys) == 1:
            # Taking the last element and putting it back where it was: a peek that blocks.
            wait_s = self.brpop_timeout if timeout is None else timeout
            self._ask("PEEK", sources, ("BLMOVE", keys[0], keys[0], "RIGHT", "RIGHT", wait_s or 0))
        else:  # nothing blocks on several lists without popping: the stock way, with its small loss window
            self._ask_stock(sources, timeout)

    def _ask(self, kind: str, sources: list[str], command: tuple[Any, ...]) -> None:
        self._asked = (kind, sources)
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        self._in_poll.send_packed_command([pack(command)])

    def _ask_stock(self, sources: list[str], timeout: float | None) -> None:
        self._asked = ("BRPOP", sources)
        super()._brpop_start(timeout)

    def _brpop_read(self, **options: Any) -> bool:
        kind, sources = self._asked
        if kind == "BRPOP":
            self._backlog = super()._brpop_read(**options)
            return True
        connection = self.client.connection
        try:
            reply = connection.read_response()
        except NoScriptError:
            self._load_script()
            raise Empty from None
        except self.connection_errors:
            connection.disconnect()  # the next pass connects again
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if kind == "PEEK":
            self._backlog = reply is not None
            if reply is None:
                raise Empty
            if self.qos.can_consume():
                self._brpop_start()
            return True
        return self._deliver_popped(sources, reply)

    def _deliver_popped(self, sources: list[str], reply: list[Any]) -> bool:
        self._script_wanted_at = 0.0
        n_dropped, n_messages = reply[0], len(reply) // 2
        if n_dropped:
            log.error("dropped %d messages that are not Celery messages", n_dropped)
        self._backlog = n_messages >= self._room
        if not n_messages:
            raise Empty
        # First all are expected, then all are delivered: whatever fails in between, none is forgotten.
        light, callbacks = self.connection.cycle.light, self.connection._callbacks
        ours: list[tuple[bytes, str, tuple[str, int]]] = []
        others: list[tuple[str, dict[str, Any]]] = []
        for i in range(1, len(reply), 2):
            queue, raw = sources[reply[i] - 1], reply[i + 1]
            arguments = light.read(raw) if light is not None and queue in callbacks else None
            if arguments is not None:
                tag = f"{arguments[0]}.{arguments[1]}"
                self.qos.expect(tag)
                ours.append((raw, tag, arguments))
            else:
                message = _decode(raw)
                self.qos.expect(message["properties"]["delivery_tag"])
                others.append((queue, message))
        for raw, tag, arguments in ours:
            light.start(self, raw, tag, arguments)
        if others:
            self._deliver_decoded(others)
        return True

    def _deliver_decoded(self, messages: list[tuple[str, dict[str, Any]]]) -> None:
        self.is_recorded = True
        try:
            for queue, message in messages:
                self.connection._deliver(message, queue)
        finally:
            self.is_recorded = False
        for queue in dict.fromkeys(queue for queue, _ in messages):
            self._queue_cycle.rotate(queue)

    def _load_script(self) -> None:
        """Redis lost its scripts in a restart. Where we may not load them, the trusted side is about to."""
        try:
            self._create_client().script_load(POP.source)
        except NoPermissionError:
            if not self._script_wanted_at:
                log.warning("the pop script is not loaded in Redis and not ours to load; waiting for it")
            self._script_wanted_at = monotonic() + SCRIPT_RETRY_S

    # -- control messages

    def _subscribe(self) -> None:
        """SUBSCRIBE to plain topics: an ACL allows PSUBSCRIBE only of the very pattern that it lists."""
        topics = [t for queue in self.active_fanout_queues for t in self._get_subscribe_topics(queue)]
        if not topics:
            return
        client = self.subclient
        if client.connection._sock is None:
            client.connection.connect()
        self._in_listen = client.connection
        for subscribe, names in (
            (client.subscribe, [t for t in topics if not _is_pattern(t)]),
            (client.psubscribe, [t for t in topics if _is_pattern(t)]),
        ):
            if names:
                subscribe(*names)

    def _unsubscribe_from(self, queue: str) -> None:
        client = self.subclient
        if client.connection and client.connection._sock:
            for topic in self._get_subscribe_topics(queue):
                (client.punsubscribe if _is_pattern(topic) else client.unsubscribe)(topic)

    # -- life

    def close(self) -> None:
        if self._in_poll and self._asked[0] == "PEEK":
            self._in_poll = None  # a peek has taken nothing: no need to wait for its answer
        self.acks.close()
        super().close()

    def _prefixed(self, key: str) -> str:
        return f"{self.global_keyprefix}{key}"


class Poller(_StockPoller):
    """Flushes acks at the start of every hub pass, after the callbacks of finished jobs have run."""

    light: LightConsumer | None = None  # set by who can do without a decoded message (workers/strategy.py)
    before_acks: Callable[[], None] | None = None  # on the hub, before acks are sent: take note of more
    hub_readers: Any = ()

    def on_poll_start(self) -> None:
        if self.before_acks is not None:
            self.before_acks()
        for channel in self._channels:
            channel.acks.flush()
        super().on_poll_start()

    @property
    def fds(self) -> dict[int, Any]:
        """Stock registers every socket anew in every pass, at two system calls each; those that the hub reads
        already are left out."""
        return {fd: ident for fd, ident in super().fds.items() if fd not in self.hub_readers}


class Transport(_StockTransport):
    """`broker_transport = "workers.transport:Transport"`; takes the stock transport's URL and options."""

    Channel = Channel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        self.cycle.hub_readers = loop.readers
        super().register_with_event_loop(connection, loop)


class _FromFile(CredentialProvider):  # type: ignore[misc, unused-ignore]
    """A user whose password may be replaced by what a file comes to hold (redis_address.py)."""

    def __init__(self, user: str | None, given: str | None, path: str) -> None:
        self._user, self._given, self._path = user or "default", given or "", path

    def get_credentials(self) -> tuple[str, str]:
        return self._user, read_password(self._path) or self._given


def _is_pattern(topic: str) -> bool:
    return any(character in topic for character in "*?[\\")


def _decode(message: bytes) -> dict[str, Any]:
    """As kombu's own decoder, an order of magnitude cheaper where none of its typed values occur."""
    if b'"__type__"' in message:
        return kombu_loads(message.decode())
    return _envelope_decoder.decode(message)
