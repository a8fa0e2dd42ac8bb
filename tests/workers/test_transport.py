"""The atomic transport: nothing lost on SIGKILL, the bytes of stock kombu, within a machine's permissions."""

import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker
from kombu import Connection, Consumer, Exchange, Producer, Queue

from infra.local.redis import EmbeddedRedis
from tests.workers.fronts import Front, Machine
from tests.workers.waiting import wait_until
from workers.app import ConsumerConfig, broker_keys, make_app
from workers.contract import SERVE_TASK, celery_message
from workers.keys import MACHINE_COMMANDS
from workers.scripts import POP
from workers.transport import CONSUMER_COMMANDS

QUICK_KILLS, FULL_KILLS = 3, 20


# -- killed consumers


def lost_after_kill(machine: Machine, n_before_kill: int, replica_id: str) -> set[str]:
    """Kill a front once it started `n_before_kill` jobs of a backlog; returns what nobody knows of."""
    ids = [f"quick{n}" for n in range(2000)]
    with Front(machine, replica_id, max_in_flight=32) as front:
        machine.send(*ids, replica_id=replica_id)
        wait_until(lambda: machine.events()["start"] >= n_before_kill, "the jobs before the kill")
        front.kill()
    ended = {line.split()[1] for line in machine.log() if line.startswith("end")}
    known = ended | set(machine.queued(replica_id)) | machine.unacked(replica_id)
    machine.r.delete(f"{machine.keys.prefix}log")
    return {f"{request_id}.1" for request_id in ids} - known


@pytest.mark.parametrize("seed", range(QUICK_KILLS))
def test_a_killed_consumer_has_lost_no_message(machine: Machine, seed: int) -> None:
    assert lost_after_kill(machine, random.Random(seed).randint(1, 1000), f"r{seed}") == set()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(QUICK_KILLS, FULL_KILLS))
def test_many_killed_consumers_have_lost_no_message(machine: Machine, seed: int) -> None:
    assert lost_after_kill(machine, random.Random(seed).randint(1, 1500), f"r{seed}") == set()


def test_a_consumer_killed_while_idle_has_lost_no_message(machine: Machine) -> None:
    for attempt in range(3):
        with Front(machine, f"r{attempt}") as front:
            machine.send("hold", replica_id=f"r{attempt}")
            front.kill()
        assert machine.queued(f"r{attempt}") or machine.unacked(f"r{attempt}")


def test_stock_kombu_restores_what_a_killed_consumer_held(machine: Machine) -> None:
    with Front(machine) as front:
        machine.send("hold1", "hold2", "hold3")
        wait_until(lambda: len(machine.unacked()) == 3, "all to run")
        front.kill()
    app = machine.operator()
    with Connection(machine.trusted_url, transport="redis", transport_options=_options(app)) as stock:
        for tag in ("hold1.1", "hold2.1", "hold3.1"):
            stock.default_channel.qos.restore_by_tag(tag)
    assert sorted(machine.queued()) == ["hold1.1", "hold2.1", "hold3.1"]
    assert machine.unacked() == set()
    redelivered = json.loads(machine.r.lindex(broker_keys(_config(machine))[0], 0))
    assert redelivered["properties"]["delivery_info"]["redelivered"]


def _config(machine: Machine) -> ConsumerConfig:
    return ConsumerConfig(machine.trusted_url, machine.keys.prefix, "r1")


def _options(app: Celery) -> dict[str, Any]:
    return {k: v for k, v in app.conf.broker_transport_options.items() if k != "redeliver_overdue"}


# -- permissions


def test_the_consumer_stays_within_its_machine(machine: Machine) -> None:
    """All fronts of these tests run under this user; here is what it cannot do."""
    foreign = MachineCalls(machine)
    assert foreign.refused("LPUSH", "t0:m:m2:replica.r1", "x")
    assert foreign.refused("HGETALL", "t0:m:m1:unacked.r1")  # not a command of a consumer
    assert foreign.refused("HGET", "t0:m:m11:unacked.r1", "x")
    assert foreign.refused("PUBLISH", "t0:m:m2:/0.celery.pidbox", "x")
    assert foreign.refused("SUBSCRIBE", "t0:m:m2:/0.celery.pidbox")
    assert foreign.refused("EVAL", "return 1", 0)
    assert foreign.refused("SCRIPT", "LOAD", "return 1")
    assert foreign.refused("EVALSHA", POP.sha, 3, "t0:m:m2:unacked", "t0:m:m2:i", "t0:m:m2:q", 1, 1)
    assert not foreign.refused("EVALSHA", POP.sha, 3, "t0:m:m1:unacked", "t0:m:m1:i", "t0:m:m1:q", 1, 1)


class MachineCalls:
    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def refused(self, *command: object) -> bool:
        """Whether Redis refuses this to the machine's user (a script's inner refusal counts)."""
        machine = self._machine
        machine.r.lpush("t0:m:m2:q", "x")
        with redis.Redis.from_url(machine.url, single_connection_client=True) as client:
            try:
                client.execute_command(*command)
            except redis.exceptions.ResponseError as exc:
                return isinstance(exc, redis.exceptions.NoPermissionError) or "ACL" in str(exc)
        return False


def test_a_machine_user_may_run_what_the_consumer_needs() -> None:
    assert {f"+{name}" for name in CONSUMER_COMMANDS} <= set(MACHINE_COMMANDS.split())


def test_every_key_of_a_consumer_is_its_machines_and_a_clean_stop_leaves_only_the_queue(
    machine: Machine,
) -> None:
    with Front(machine) as front:
        machine.send("hold1")
        wait_until(lambda: machine.events()["start"] == 1, "the job")
        machine.operator().control.inspect(timeout=5.0, limit=1).active()
        assert all(key.startswith(machine.keys.prefix.encode()) for key in machine.r.keys("*"))
        front.stop()
    left = {key.decode().removeprefix(machine.keys.prefix) for key in machine.r.keys("*")}
    assert {name for name in left if "reply" not in name and "binding" not in name} == {"replica.r1", "log"}


# -- Celery compatibility


@pytest.fixture
def stock_app(machine: Machine) -> Iterator[Celery]:
    """The same queue on stock transport and pool, with a task that reports what it was given."""
    app = make_app(_config(machine))
    app.conf.update(broker_transport="redis", worker_pool="threads", worker_concurrency=2)
    app.conf.broker_transport_options = _options(app)
    app.finalize()
    app.tasks.unregister(SERVE_TASK)

    @app.task(name=SERVE_TASK, shared=False)
    def serve(request_id: str, epoch: int) -> None:
        machine.r.rpush(f"{machine.keys.prefix}log", f"stock {request_id}.{epoch}")

    yield app
    app.close()


def test_our_message_says_what_apply_async_says(machine: Machine, stock_app: Celery) -> None:
    stock_app.tasks[SERVE_TASK].apply_async(
        args=["abc", 2], task_id="abc.2", root_id="abc", ignore_result=True
    )
    stock = json.loads(machine.r.lindex(machine.keys.prefix + "replica.r1", 0))
    ours = json.loads(celery_message("abc", 2, "r1"))
    with Connection(
        machine.trusted_url, transport="redis", transport_options=_options(stock_app)
    ) as connection:
        channel = connection.default_channel
        stock_message, our_message = (
            channel.Message(stock, channel=channel),
            channel.Message(ours, channel=channel),
        )
        assert our_message.payload == stock_message.payload
    for field in ("content-type", "content-encoding"):
        assert ours[field] == stock[field]
    compared = (
        "lang",
        "task",
        "id",
        "root_id",
        "parent_id",
        "retries",
        "timelimit",
        "eta",
        "expires",
        "group",
    )
    for header in (*compared, "group_index", "shadow", "ignore_result"):
        assert ours["headers"][header] == stock["headers"][header], header
    for name in ("delivery_info", "priority", "delivery_mode"):
        assert ours["properties"][name] == stock["properties"][name], name


def test_a_stock_worker_runs_our_message(machine: Machine, stock_app: Celery) -> None:
    machine.send("abc", epoch=3)
    with start_worker(stock_app, pool="threads", perform_ping_check=False, shutdown_timeout=20):
        wait_until(lambda: machine.log() == ["stock abc.3"], "the stock worker")
    assert machine.unacked() == set()


def test_our_worker_runs_a_stock_message(machine: Machine, stock_app: Celery) -> None:
    stock_app.tasks[SERVE_TASK].apply_async(args=["quick1", 4], task_id="whatever")
    with Front(machine):
        wait_until(lambda: machine.log() == ["start quick1.4", "end quick1.4"], "the job")
        wait_until(lambda: not machine.unacked(), "the ack")
        assert machine.log() == ["start quick1.4", "end quick1.4"]


# -- outages


def test_a_lost_connection_neither_ends_running_jobs_nor_leaves_records_behind(machine: Machine) -> None:
    with Front(machine) as front:
        machine.send("tidy1", *(f"wait{n}" for n in range(10)))
        wait_until(lambda: machine.events()["start"] == 11, "all to run")
        for client in machine.r.client_list():
            if client["user"] == machine.keys.redis_user and client["name"] != "scripted":
                machine.r.client_kill_filter(_id=client["id"])
        machine.send("quick1")
        wait_until(lambda: "end quick1.1" in machine.log(), "the next message, by the next connection")
        wait_until(lambda: machine.unacked() == {"tidy1.1"} and not machine.queued(), "late acks")
        assert machine.log().count("start tidy1.1") == 1
        assert front.stop() == 0
        assert machine.unacked() == set()


def test_jobs_that_end_while_redis_is_away_are_acknowledged_on_its_return(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    try:
        machine = Machine(server.url())
        machine.r.acl_save()
        with Front(machine) as front:
            machine.send("slow1", "slow2", "slow3")
            wait_until(lambda: machine.events()["start"] == 3, "all to run")
            server.stop()
            wait_until(lambda: front.output.count("over slow") == 3, "all to end")
            server.start()
            server.wait_ready()
            machine.load_scripts()
            wait_until(lambda: not machine.unacked(), "the acks")
            assert machine.events()["start"] == 3
    finally:
        server.destroy()


def test_a_consumer_waits_for_scripts_that_redis_forgot(machine: Machine) -> None:
    with Front(machine) as front:
        machine.send("quick1")
        wait_until(lambda: machine.events()["end"] == 1, "the first")
        machine.r.script_flush()
        machine.send("quick2")
        wait_until(lambda: "pop script is not loaded" in front.output, "the consumer to notice")
        assert machine.queued() == ["quick2.1"]
        machine.load_scripts()
        wait_until(lambda: machine.events()["end"] == 2 and not machine.unacked(), "the second")


def test_an_entry_that_is_no_message_is_dropped_and_the_rest_flows(machine: Machine) -> None:
    with Front(machine) as front:
        queue = machine.keys.prefix + "replica.r1"
        machine.r.lpush(queue, "junk", "{}", '{"properties": {"delivery_tag": 7, "delivery_info": {}}}')
        machine.send("quick1")
        wait_until(lambda: machine.events()["end"] == 1 and not machine.unacked(), "the good one")
        assert machine.queued() == []
        front.stop()
        assert "not Celery messages" in front.output
        assert "junk" not in front.output


# -- the pop script


def pop(client: Any, limit: int, *lists: str) -> list[Any]:
    client.script_load(POP.source)
    return client.evalsha(POP.sha, 2 + len(lists), "u", "ui", *lists, limit, 12.5)


@pytest.fixture
def r(redis_url: str) -> Iterator[Any]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_pop_takes_the_oldest_up_to_the_limit_and_records_them(r: Any) -> None:
    r.lpush("q", *(celery_message(f"{n}", 1, "r") for n in range(5)))
    n_dropped, *rest = pop(r, 3, "q")
    assert n_dropped == 0
    assert rest[::2] == [1, 1, 1]
    assert [json.loads(message)["headers"]["id"] for message in rest[1::2]] == ["0.1", "1.1", "2.1"]
    assert r.llen("q") == 2
    assert r.zrange("ui", 0, -1, withscores=True) == [(b"0.1", 12.5), (b"1.1", 12.5), (b"2.1", 12.5)]
    record = json.loads(r.hget("u", "0.1"))
    assert record == [json.loads(celery_message("0", 1, "r")), "", "replica.r"]


def test_pop_prefers_earlier_lists(r: Any) -> None:
    for name in ("low", "high"):
        r.lpush(name, *(celery_message(f"{name}{n}", 1, "r") for n in range(2)))
    _, *rest = pop(r, 3, "high", "absent", "low")
    assert rest[::2] == [1, 1, 3]
    assert r.llen("low") == 1


@pytest.mark.parametrize(
    ("tag", "headers"),
    [
        ('quote"d', {}),
        ("back\\slash", {}),
        ("plain", {"delivery_tag": "decoy", "routing_key": "decoy", "exchange": "decoy"}),
        ("plain", {"delivery_tag": None}),
    ],
)
def test_pop_decodes_where_matching_could_be_fooled(r: Any, tag: str, headers: dict[str, Any]) -> None:
    properties = {"delivery_tag": tag, "delivery_info": {"exchange": "ex", "routing_key": 'k"ey'}}
    message = {"headers": headers, "properties": properties, "body": ""}
    r.lpush("q", json.dumps(message))
    pop(r, 1, "q")
    assert json.loads(r.hget("u", tag)) == [message, "ex", 'k"ey']


OWN_END = celery_message("decoy", 1, "decoy").decode().partition('"properties": ')[2]


@pytest.mark.parametrize(
    "message",
    [
        {"body": f'"properties": {OWN_END}'},
        {"headers": {"properties": json.loads(OWN_END[:-1])}},
        {"x": [json.loads(OWN_END[:-1])]},
    ],
)
def test_pop_is_not_fooled_by_the_end_of_our_message_elsewhere(r: Any, message: dict[str, Any]) -> None:
    """Before the properties, and after them where the JSON allows it."""
    properties = {"delivery_tag": "true", "delivery_info": {"exchange": "ex", "routing_key": "key"}}
    for n, sent in enumerate(
        (
            message | {"properties": properties},
            {"properties": properties | {"delivery_tag": "true2"}} | message,
        )
    ):
        r.lpush("q", json.dumps(sent))
        pop(r, 1, "q")
        assert json.loads(r.hget("u", ("true", "true2")[n])) == [sent, "ex", "key"]


# -- as a plain kombu transport


def test_priorities_several_queues_and_acks_work_as_in_stock(redis_url: str) -> None:
    exchange = Exchange("jobs", type="direct")
    queues = [Queue(name, exchange, routing_key=name, max_priority=9) for name in ("a", "b")]
    got: list[str] = []

    def take(body: str, message: Any) -> None:
        got.append(body)
        message.ack()

    with (
        Connection(redis_url, transport="workers.transport:Transport") as connection,
        redis.Redis.from_url(redis_url) as client,
    ):
        producer = Producer(connection)
        for n in range(3):
            for name in ("a", "b"):
                producer.publish(f"{name}{n}", exchange=exchange, routing_key=name, declare=queues)
        with Consumer(connection, queues, callbacks=[take], prefetch_count=2):
            _drain(connection, lambda: len(got) == 6)
            assert sorted(got) == ["a0", "a1", "a2", "b0", "b1", "b2"]
            assert [body for body in got if body[0] == "a"] == ["a0", "a1", "a2"]
            _drain(connection, lambda: client.hlen("unacked") == 0)
        assert client.zcard("unacked_index") == 0


def test_a_consumer_without_acks_leaves_no_record(redis_url: str) -> None:
    got: list[str] = []
    queue = Queue("n", Exchange("n"), routing_key="n", no_ack=True)
    with (
        Connection(redis_url, transport="workers.transport:Transport") as connection,
        redis.Redis.from_url(redis_url) as client,
    ):
        producer = Producer(connection)
        for n in range(3):
            producer.publish(f"n{n}", exchange=queue.exchange, routing_key="n", declare=[queue])
        with Consumer(connection, [queue], callbacks=[lambda body, message: got.append(body)], no_ack=True):
            _drain(connection, lambda: len(got) == 3)
        assert not client.exists("unacked", "unacked_index")


def test_a_failing_callback_puts_the_rest_of_its_batch_back(redis_url: str) -> None:
    queue = Queue("f", Exchange(""), routing_key="f")

    def fail(body: str, message: Any) -> None:
        raise RuntimeError("callback")

    with redis.Redis.from_url(redis_url) as client:
        with Connection(redis_url, transport="workers.transport:Transport") as connection:
            producer = Producer(connection)
            for n in range(5):
                producer.publish(f"f{n}", routing_key="f")
            consumer = Consumer(connection, [queue], callbacks=[fail])
            consumer.consume()
            with pytest.raises(RuntimeError, match="callback"):
                _drain(connection, lambda: False)
        assert client.llen("f") == 5
        assert not client.exists("unacked", "unacked_index")


def _drain(connection: Connection, done: Any) -> None:
    end_at = time.monotonic() + 15
    while not done():
        assert time.monotonic() < end_at
        try:
            connection.drain_events(timeout=0.05)
        except (socket.timeout, TimeoutError):  # noqa: UP041 - kombu names the old one
            continue
