"""LightStrategy: our own messages go straight to the pool and show as stock requests do; others go stock's way."""

import asyncio
import gc
import json
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.worker import state as worker_state
from kombu.transport import virtual

from tests.workers.fronts import Front, Machine
from tests.workers.waiting import wait_until
from workers import runtime
from workers.app import ConsumerConfig, make_app
from workers.contract import SERVE_TASK, celery_message
from workers.pool import LoopPool
from workers.strategy import LightRequest, RawMessage, read_arguments, read_raw
from workers.transport import Poller

NODE = ["r1@corral"]

_Message: Any = virtual.Message  # kombu is untyped


class Channel:
    """What a message needs of its channel, noting the acks."""

    no_ack_consumers = None

    def __init__(self) -> None:
        self.acked: list[str] = []
        self.ack_threads: set[int] = set()

    def decode_body(self, body: str, encoding: str | None = None) -> str:
        return body

    def basic_ack(self, delivery_tag: str, multiple: bool = False) -> None:
        self.acked.append(delivery_tag)
        self.ack_threads.add(threading.get_ident())


def message(edit: Callable[[dict[str, Any]], object] = lambda _: None, request_id: str = "q1") -> Any:
    """Our message as kombu delivers it, after `edit` of the decoded JSON."""
    payload = json.loads(celery_message(request_id, 1, "r1"))
    edit(payload)
    return _Message(payload, channel=Channel())


def with_body(*body: object) -> Callable[[dict[str, Any]], object]:
    return lambda payload: payload.update(body=json.dumps(body))


NO_EMBED = dict.fromkeys(("callbacks", "errbacks", "chain", "chord"))


def test_the_message_of_the_contract_is_ours() -> None:
    assert read_arguments(message()) == ("q1", 1)


@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p["headers"].update(eta="2030-01-01T00:00:00Z"),
        lambda p: p["headers"].update(expires="2030-01-01T00:00:00Z"),
        lambda p: p["headers"].update(timelimit=[1, 2]),
        lambda p: p["headers"].update(retries=1),
        lambda p: p["headers"].update(stamped_headers=["s"], stamps={"s": "1"}),
        lambda p: p["headers"].update(redelivered=True),
        lambda p: p["headers"].pop("origin"),
        lambda p: p["headers"].pop("id"),
        lambda p: p["headers"].update(id=None),
        lambda p: p["headers"].update(id=7),
        lambda p: p.update({"content-type": "application/x-yaml"}),
        lambda p: p.update({"content-encoding": "binary"}),
        lambda p: p.pop("body"),
        lambda p: p.update(body=""),
        lambda p: p.update(body="[["),
        lambda p: p.update(body=b'[["\xff", 1], {}, {}]'),
        lambda p: p.update(body="[" * 100_000),
        with_body(["q1"], {}, NO_EMBED),
        with_body(["q1", 1, 2], {}, NO_EMBED),
        with_body(["q1", "1"], {}, NO_EMBED),
        with_body(["q1", True], {}, NO_EMBED),
        with_body(["q1", 1.0], {}, NO_EMBED),
        with_body([1, 1], {}, NO_EMBED),
        with_body(["q1", 1], {"x": 1}, NO_EMBED),
        with_body(["q1", 1], {}, {**NO_EMBED, "callbacks": []}),
        with_body(["q1", 1], {}, {**NO_EMBED, "more": None}),
        with_body(["q1", 1], {}, {}),
        with_body(["q1", 1], {}),
    ],
)
def test_any_other_message_is_left_to_stock(edit: Callable[[dict[str, Any]], object]) -> None:
    assert read_arguments(message(edit)) is None


# -- messages that nobody decodes


def test_the_bytes_of_the_contract_are_ours() -> None:
    assert read_raw(celery_message("q1", 1, "r1")) == ("q1", 1)
    assert read_raw(celery_message("0192-f_a.b", 7_000_000, "")) == ("0192-f_a.b", 7_000_000)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"x",
        celery_message("q1", 1, "r1") + b" ",
        celery_message("q1", 1, "r1")[:-1],
        celery_message("q1", 1, "r1").replace(b'"retries": 0', b'"retries": 1'),
        celery_message("q1", 1, "r1").replace(b'"q1.1"', b'"q1.2"', 1),
        celery_message("q1", 1, "r1").replace(b'"q1.1"}}', b'"q2.1"}}'),
        celery_message("q1", 1, "r1").replace(b', 1], {}', b', 01], {}'),
        celery_message("q1", 1, "r1").replace(b'"body": "[[', b'"body":  "[['),
        celery_message('q"1', 1, "r1"),
        celery_message("q\\1", 1, "r1"),
        celery_message("q1", 1, 'r1", "x": "'),
        celery_message("q1", 10**9, "r1"),
        celery_message("", 1, "r1"),
        json.dumps(json.loads(celery_message("q1", 1, "r1")), separators=(",", ":")).encode(),
    ],
)  # fmt: skip
def test_bytes_that_differ_anywhere_are_decoded(raw: bytes) -> None:
    assert read_raw(raw) is None


def test_a_request_served_from_bytes_shows_what_one_served_from_a_message_shows(harness: "Harness") -> None:
    harness.deliver(message(request_id="q1"))
    raw = celery_message("q2", 1, "r1")
    harness.light.start(Channel(), raw, "q2.1", read_raw(raw))
    decoded, undecoded = (worker_state.requests[f"{name}.1"] for name in ("q1", "q2"))
    assert isinstance(undecoded.message, RawMessage)
    for safe in (False, True):
        expected = decoded.info(safe) | {"id": "q2.1", "time_start": undecoded.time_start}
        assert undecoded.info(safe) == (expected if safe else expected | {"args": ["q2", 1]})
    harness.end_jobs()
    harness.hub.run_pass()
    assert undecoded.message._channel.acked == ["q2.1"]
    assert in_state() == [0, 0, 0]


def test_a_revoked_message_is_not_served_from_bytes(harness: "Harness") -> None:
    raw = celery_message("q1", 1, "r1")
    assert harness.light.read(raw) == ("q1", 1)
    worker_state.revoked.add("q1.1")
    assert harness.light.read(raw) is None


# -- as an object, with a real pool and a hub whose passes the test makes


class Hub:
    """Callbacks wait until the test runs the pass."""

    def __init__(self) -> None:
        self.ready: list[Callable[[], object]] = []

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.ready.append(callback)

    def run_pass(self) -> None:
        ready, self.ready = self.ready, []
        for callback in ready:
            callback()


class Harness:
    """A consumer's connections to come, over a pool whose jobs end when `release` is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.release = asyncio.Event()
        self.n_running = 0
        self.reasons: list[str] = []
        runtime.install(runtime.Runtime(loop, self._job, stop_grace_s=0.0))
        self.loop = loop
        self.pool = LoopPool(limit=10)
        self.pool.start()
        self.hub = Hub()
        self.stock_requests: list[Any] = []
        self.app = make_app(ConsumerConfig("redis://127.0.0.1:1/0", "t:", "r1"))
        self.app.finalize()
        self.task = self.app.tasks[SERVE_TASK]
        self.connect()

    async def _job(self, request_id: str, epoch: int) -> None:
        self.n_running += 1
        try:
            await self.release.wait()
        except asyncio.CancelledError as exc:
            self.reasons.append(exc.args[0])
            raise

    def connect(self, pool: Any = None) -> None:
        self.consumer = SimpleNamespace(
            hostname=NODE[0],
            connection_errors=(ConnectionError,),
            event_dispatcher=None,
            timer=SimpleNamespace(call_at=None),
            apply_eta_task=None,
            disable_rate_limits=True,
            task_buckets={},
            on_task_request=self.stock_requests.append,
            _limit_task=None,
            _limit_post_eta=None,
            pool=pool or self.pool,
            hub=self.hub,
            controller=SimpleNamespace(state=worker_state),
            on_task_message=set(),
            connection=SimpleNamespace(transport=SimpleNamespace(cycle=Poller())),
        )
        self._handler = self.task.start_strategy(self.app, self.consumer)

    @property
    def light(self) -> Any:
        """What the strategy told the transport of this connection."""
        return self.consumer.connection.transport.cycle.light

    def deliver(self, msg: Any, *callbacks: Callable[[Any], object]) -> Any:
        self._handler(msg, None, lambda *_: msg.ack(), lambda *_: msg.reject(), callbacks)
        return msg

    def end_jobs(self) -> None:
        self.loop.call_soon_threadsafe(self.release.set)
        wait_until(lambda: self.pool.info["in_flight"] == 0, "the jobs to end")
        wait_until(lambda: self.hub.ready, "the hub to be woken")


@pytest.fixture
def harness() -> Iterator[Harness]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    worker_state.reset_state()
    made = Harness(loop)
    yield made
    made.pool.stop()
    runtime.install(None)
    worker_state.reset_state()
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


def in_state() -> list[int]:
    sets = (worker_state.requests, worker_state.reserved_requests, worker_state.active_requests)
    return [len(each) for each in sets]


def test_it_shows_exactly_what_a_stock_request_shows(harness: Harness) -> None:
    harness.deliver(message())
    harness.deliver(message(lambda p: p["headers"].update(redelivered=True), request_id="q2"))
    (light,) = worker_state.active_requests
    (stock,) = harness.stock_requests
    assert isinstance(light, LightRequest)
    stock.on_accepted(light.info()["worker_pid"], 0.0)
    for safe in (False, True):
        expected = stock.info(safe=safe) | {"id": "q1.1", "time_start": light.time_start}
        if not safe:
            expected["args"] = ["q1", 1]
        assert json.dumps(light.info(safe=safe)) == json.dumps(expected)
    assert worker_state.total_count == {SERVE_TASK: 2}


def test_jobs_that_end_together_are_acknowledged_in_one_hub_pass(harness: Harness) -> None:
    messages = [harness.deliver(message(request_id=f"q{n}")) for n in range(5)]
    assert in_state() == [5, 5, 5]
    harness.end_jobs()
    assert not any(m.acknowledged for m in messages)
    assert len(harness.hub.ready) == 1
    harness.hub.run_pass()
    assert all(m.channel.acked == [m.delivery_tag] for m in messages)
    assert {n for m in messages for n in m.channel.ack_threads} == {threading.get_ident()}
    assert in_state() == [0, 0, 0]


def test_who_listens_for_task_messages_is_told(harness: Harness) -> None:
    told: list[Any] = []
    harness.deliver(message(), told.append)
    assert [request.id for request in told] == ["q1.1"]


def test_the_next_job_to_end_wakes_the_hub_again(harness: Harness) -> None:
    harness.deliver(message(request_id="q1"))
    harness.end_jobs()
    harness.hub.run_pass()
    second = harness.deliver(message(request_id="q2"))
    harness.end_jobs()
    harness.hub.run_pass()
    assert second.acknowledged


def test_an_end_whose_hub_pass_was_lost_with_the_connection_is_settled_by_the_next(harness: Harness) -> None:
    first = harness.deliver(message(request_id="q1"))
    harness.end_jobs()
    harness.hub.ready.clear()  # as an error of another callback of that pass does
    harness.connect()
    assert first.acknowledged
    assert in_state() == [0, 0, 0]
    second = harness.deliver(message(request_id="q2"))
    harness.end_jobs()
    harness.hub.run_pass()
    assert second.acknowledged


def test_an_ack_that_fails_does_not_hold_up_the_others(
    harness: Harness, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (harness.deliver(message(request_id=f"q{n}")) for n in (1, 2))
    first.ack()  # a second one is an error
    harness.end_jobs()
    harness.hub.run_pass()
    assert second.acknowledged
    assert in_state() == [0, 0, 0]
    assert "acknowledging a finished job failed" in caplog.text


def test_a_revoked_message_is_left_to_stock_which_discards_it(harness: Harness) -> None:
    worker_state.revoked.add("q1.1")
    assert harness.deliver(message()).acknowledged
    assert harness.pool.n_started == 0


def test_terminate_acknowledges_once_and_cancels_as_revoked(harness: Harness) -> None:
    revoked = harness.deliver(message())
    (request,) = worker_state.active_requests
    wait_until(lambda: harness.n_running == 1, "the job")
    worker_state.revoked.add("q1.1")
    request.terminate(harness.pool, signal=15)
    assert in_state() == [0, 0, 0]
    wait_until(lambda: harness.reasons == ["revoked"], "the cancellation")
    assert harness.pool.n_cancelled == 1
    request.terminate(harness.pool)  # over by now
    harness.hub.run_pass()
    assert revoked.channel.acked == ["q1.1"]


def test_terminate_that_crosses_the_end_of_the_job_acknowledges_once(harness: Harness) -> None:
    ended = harness.deliver(message())
    (request,) = worker_state.active_requests
    harness.end_jobs()
    request.terminate(harness.pool)
    harness.hub.run_pass()
    assert ended.channel.acked == ["q1.1"]


def test_cancel_leaves_the_message_to_be_put_back(harness: Harness) -> None:
    stopped = harness.deliver(message())
    (request,) = worker_state.active_requests
    assert request.task.acks_late
    assert not request.acknowledged
    wait_until(lambda: harness.n_running == 1, "the job")
    request.cancel(harness.pool, emit_retry=False)
    assert in_state() == [0, 0, 0]
    wait_until(lambda: harness.reasons == ["stopping"], "the cancellation")
    harness.hub.run_pass()
    assert not stopped.acknowledged


def test_a_redelivered_message_joins_and_neither_request_outlives_the_job(harness: Harness) -> None:
    first, again = harness.deliver(message()), harness.deliver(message())
    assert harness.pool.n_started == harness.pool.n_joined == 1
    harness.end_jobs()
    harness.hub.run_pass()
    assert first.acknowledged
    assert again.acknowledged
    assert in_state() == [0, 0, 0]


def test_a_joined_request_is_not_kept_by_a_cycle_when_its_job_is_revoked(harness: Harness) -> None:
    gc.disable()
    try:
        harness.deliver(message())
        harness.deliver(message())
        worker_state.requests["q1.1"].terminate(harness.pool)
        wait_until(lambda: in_state() == [0, 0, 0], "the first to go with its job")
        assert harness.pool.n_joined == 1
    finally:
        gc.enable()


def test_celery_may_hand_a_reconnected_request_its_event_dispatcher(harness: Harness) -> None:
    harness.deliver(message())
    dispatcher = object()
    for request in worker_state.reserved_requests:
        request.eventer = dispatcher
    assert [r.eventer for r in worker_state.reserved_requests] == [dispatcher]


def test_another_pool_gets_the_stock_strategy(harness: Harness) -> None:
    harness.connect(pool=SimpleNamespace(apply_async=None))
    harness.deliver(message())
    assert len(harness.stock_requests) == 1
    assert harness.pool.n_started == 0


# -- as a worker process


def push(machine: Machine, edit: Callable[[dict[str, Any]], object], request_id: str) -> None:
    payload = json.loads(celery_message(request_id, 1, "r1"))
    edit(payload)
    machine.r.lpush(machine.keys.prefix + "replica.r1", json.dumps(payload))


def test_inspect_knows_a_job_while_it_runs_and_not_after(machine: Machine) -> None:
    with Front(machine):
        machine.send("hold1", "quick1", "quick2")
        wait_until(lambda: machine.unacked() == {"hold1.1"}, "two of three to end")
        inspect = machine.operator().control.inspect(destination=NODE, timeout=5.0, limit=1)
        ((state, job),) = inspect.query_task("hold1.1", "quick1.1")[NODE[0]].values()
        assert (state, job["args"], job["hostname"]) == ("active", ["hold1", 1], NODE[0])
        assert job["delivery_info"]["routing_key"] == "replica.r1"
        assert inspect.reserved()[NODE[0]] == []
        assert inspect.stats()[NODE[0]]["total"] == {SERVE_TASK: 3}
        machine.operator().control.revoke("hold1.1", terminate=True, destination=NODE)
        wait_until(lambda: not machine.unacked(), "the revoke")
        assert inspect.active()[NODE[0]] == []


def test_messages_that_are_not_ours_end_as_stock_ends_them(machine: Machine) -> None:
    with Front(machine) as front:
        push(machine, lambda p: p["headers"].update(task="nobody.knows"), "quick1")
        push(machine, lambda p: p.update(body="[["), "quick2")
        push(machine, lambda p: p.update({"content-type": "application/x-python-serialize"}), "quick3")
        push(machine, lambda p: p["headers"].update(expires="2001-01-01T00:00:00+00:00"), "quick4")
        push(machine, lambda p: p["headers"].update(eta="2001-01-01T00:00:00+00:00"), "quick5")
        wait_until(lambda: machine.events()["end"] == 1 and not machine.unacked(), "all to leave")
        assert machine.log() == ["start quick5.1", "end quick5.1"]
        assert front.stop() == 0
        assert machine.queued() == []
        assert "nobody.knows" in front.output


def test_a_restored_message_joins_the_job_and_is_acknowledged_with_it(machine: Machine) -> None:
    with Front(machine) as front:
        machine.send("slow1")
        wait_until(lambda: machine.events()["start"] == 1, "the job")
        push(machine, lambda p: p["headers"].update(redelivered=True), "slow1")
        wait_until(lambda: machine.events()["end"] == 1 and not machine.unacked(), "its end")
        assert machine.log() == ["start slow1.1", "end slow1.1"]
        assert front.stop() == 0
        assert machine.queued() == []
