"""Celery's way back to a broker that was away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kombu.exceptions
import kombu.utils.functional
import pytest
import redis
from kombu import Exchange, Queue

from infra.local.ports import free_port
from infra.local.redis import EmbeddedRedis
from workers.app import ConsumerConfig, make_app
from workers.broker_connection import MAX_S


def test_a_broker_that_is_away_is_asked_again_within_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kombu.utils.functional, "sleep", lambda _s: None)
    app = make_app(ConsumerConfig(f"redis://127.0.0.1:{free_port()}/0", "t0:m:m1:", "r1"))
    waits: list[float] = []

    def note(_error: Exception, wait_s: float) -> None:
        waits.append(wait_s)

    connection: Any = app.connection_for_read()
    with pytest.raises(kombu.exceptions.OperationalError):
        connection.ensure_connection(note, 15)
    assert waits[0] < 0.2
    assert sum(waits[:3]) < 1.5
    assert max(waits) <= MAX_S


def test_losing_the_broker_with_messages_in_hand_does_not_end_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way Celery's consumer goes when a read fails: collect, then close. kombu tries to close the channel three
    times, and each attempt fails at another thing: the pop in flight, the control queue, the messages in hand."""
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    try:
        app = make_app(ConsumerConfig(server.url(), "t0:m:m1:", "r1"))
        connection: Any = app.connection_for_read()
        channel = connection.default_channel
        control = Queue("r1.pidbox", Exchange("pidbox", type="fanout"), auto_delete=True)
        control(channel).declare()
        assert channel.client.ping()
        channel.qos.expect("a tag")
    finally:
        server.stop()

    def refuse(**_: Any) -> None:
        channel._in_poll = None
        raise redis.ConnectionError("connection closed by server")

    channel._in_poll, channel._asked = object(), ("POP", [])
    monkeypatch.setattr(channel, "_brpop_read", refuse)
    connection.collect(socket_timeout=1)
    connection.close()
    channel.basic_ack("a tag")  # of a task that ends only now
