"""LoopPool behaves as a Celery pool: inspect, revoke, warm and cold stop; jobs are coroutines."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.workers.fronts import Front, Machine
from tests.workers.waiting import wait_until
from workers import runtime
from workers.contract import SERVE_TASK, celery_message
from workers.pool import LoopPool

NODE = ["r1@corral"]


# -- as a worker process


def test_inspect_shows_running_jobs_and_what_the_pool_did(machine: Machine) -> None:
    with Front(machine):
        machine.send("hold1", "quick1", "raise1")
        wait_until(lambda: machine.unacked() == {"hold1.1"}, "two of three to end")
        inspect = machine.operator().control.inspect(destination=NODE, timeout=5.0, limit=1)
        (job,) = inspect.active()[NODE[0]]
        assert (job["id"], job["name"], job["args"]) == ("hold1.1", SERVE_TASK, ["hold1", 1])
        assert not job["acknowledged"]
        pool = inspect.stats()[NODE[0]]["pool"]
        assert pool["implementation"] == "workers.pool:LoopPool"
        assert {name: pool[name] for name in ("in_flight", "started", "done", "failed")} == {
            "in_flight": 1,
            "started": 3,
            "done": 1,
            "failed": 1,
        }


def test_a_revoked_message_that_waits_is_dropped_unserved(machine: Machine) -> None:
    with Front(machine, max_in_flight=1):
        machine.send("hold1", "quick1")
        wait_until(lambda: machine.events()["start"] == 1, "the first")
        control = machine.operator().control
        control.revoke("quick1.1", destination=NODE)
        control.revoke("hold1.1", terminate=True, destination=NODE)
        wait_until(lambda: not machine.unacked() and not machine.queued(), "both to leave")
        assert machine.log() == ["start hold1.1", "cancelled:revoked hold1.1"]


def test_a_revoked_running_job_is_cancelled_and_acknowledged(machine: Machine) -> None:
    with Front(machine) as front:
        machine.send("hold1", "hold2", "tidy3")
        wait_until(lambda: machine.events()["start"] == 3, "all to run")
        control = machine.operator().control
        control.revoke(["hold1.1", "tidy3.1"], terminate=True, destination=NODE)
        wait_until(lambda: machine.unacked() == {"hold2.1"}, "the acks")
        wait_until(lambda: machine.events()["cancelled:revoked"] == 2, "both cancellations")
        assert front.stop() == 0
        assert machine.queued() == ["hold2.1"]


def test_sigterm_lets_short_jobs_finish_and_puts_the_rest_back(machine: Machine) -> None:
    with Front(machine, stop_grace_s=0.5) as front:
        machine.send(*(f"hold{n}" for n in range(10)), *(f"wait{n}" for n in range(5)), "tidy")
        wait_until(lambda: machine.events()["start"] == 16, "all to run")
        assert front.stop() == 0
        assert machine.events()["end"] == 5
        assert machine.events()["cancelled:stopping"] == 11
        assert sorted(machine.queued()) == [f"hold{n}.1" for n in range(10)]
        assert machine.unacked() == set()


def test_a_stopping_worker_takes_no_new_message(machine: Machine) -> None:
    with Front(machine, stop_grace_s=60.0) as front:
        machine.send("hold1")
        wait_until(lambda: machine.events()["start"] == 1, "the first")
        front.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping with 1 jobs" in front.output, "the end of consuming")
        machine.send("quick1")
        front.stop(signal.SIGQUIT)
        assert set(machine.queued()) == {"hold1.1", "quick1.1"}
        assert machine.events()["start"] == 1


def test_a_cold_shutdown_cuts_the_grace_short(machine: Machine) -> None:
    with Front(machine, stop_grace_s=600.0) as front:
        machine.send("hold1", "hold2")
        wait_until(lambda: machine.events()["start"] == 2, "both to run")
        front.process.send_signal(signal.SIGTERM)
        wait_until(lambda: "stopping with 2 jobs" in front.output, "the warm stop")
        front.stop(signal.SIGQUIT)
        assert set(machine.queued()) | machine.unacked() == {"hold1.1", "hold2.1"}


def test_a_failing_job_is_acknowledged_and_its_text_is_not_logged(machine: Machine) -> None:
    with Front(machine) as front:
        machine.send("raise1", "raise2", "quick1")
        wait_until(lambda: machine.events()["end"] == 1 and not machine.unacked(), "all three to end")
        front.stop()
        assert "ValueError" in front.output
        assert "text of a prompt" not in front.output
        assert front.output.count("ValueError") == 1
        assert machine.queued() == []


def test_no_more_jobs_run_than_the_bound(machine: Machine) -> None:
    with Front(machine, max_in_flight=4):
        machine.send(*(f"hold{n}" for n in range(4)), *(f"quick{n}" for n in range(6)))
        wait_until(lambda: machine.events()["start"] == 4, "four to run")
        assert len(machine.unacked()) == 4
        assert len(machine.queued()) == 6
        machine.operator().control.revoke("hold0.1", terminate=True, destination=NODE)
        wait_until(lambda: machine.events()["end"] == 6, "the others to pass through the freed place")
        wait_until(lambda: len(machine.unacked()) == 3, "the last ack")


def test_a_message_redelivered_while_its_job_runs_joins_it(machine: Machine) -> None:
    with Front(machine):
        machine.send("tidy1")
        wait_until(lambda: machine.events()["start"] == 1, "the job")
        machine.send("tidy1", "quick1")
        wait_until(lambda: machine.events()["end"] == 1, "a later message")
        machine.send("tidy1", epoch=2)
        wait_until(lambda: machine.events()["start"] == 3, "the next attempt, which is another job")
        assert machine.log().count("start tidy1.1") == 1


def test_a_message_with_other_arguments_is_refused_and_acknowledged(machine: Machine) -> None:
    with Front(machine) as front:
        bad = celery_message("hold1", 1, "r1").replace(b'\\"hold1\\", 1', b'\\"hold1\\", \\"one\\"')
        machine.r.lpush(machine.keys.prefix + "replica.r1", bad)
        machine.send("quick1")
        wait_until(lambda: machine.events()["end"] == 1 and not machine.unacked(), "both to leave")
        assert machine.log() == ["start quick1.1", "end quick1.1"]
        front.stop()
        assert "refused" in front.output


# -- as an object


class Acks:
    """Counts the callbacks of jobs."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, result: tuple[bool, Any, float]) -> None:
        self.n += 1


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(autouse=True)
def no_runtime_left_behind() -> Iterator[None]:
    yield
    runtime.install(None)


def started_pool(loop: asyncio.AbstractEventLoop, handler: runtime.Handler, **graces: float) -> LoopPool:
    runtime.install(runtime.Runtime(loop, handler, **graces))
    pool = LoopPool(limit=10)
    pool.start()
    return pool


def apply(pool: LoopPool, request_id: str, on_done: Acks) -> Any:
    request = {"args": [request_id, 1]}
    return pool.apply_async(
        None, args=(SERVE_TASK, request_id, request), accept_callback=lambda pid, at: None, callback=on_done
    )


def test_a_pool_without_a_runtime_says_what_is_missing() -> None:
    with pytest.raises(RuntimeError, match=r"workers\.runtime\.install"):
        LoopPool(limit=1).start()


def test_a_pool_whose_loop_does_not_run_says_so() -> None:
    loop = asyncio.new_event_loop()
    try:
        with pytest.raises(RuntimeError, match="not running"):
            started_pool(loop, _nothing)
    finally:
        loop.close()


async def _nothing(request_id: str, epoch: int) -> None: ...


def test_no_job_is_forgotten_between_the_threads(loop: asyncio.AbstractEventLoop) -> None:
    acks = Acks()
    pool = started_pool(loop, _nothing)
    for n in range(20_000):
        apply(pool, f"q{n}", acks)
    wait_until(lambda: acks.n == 20_000, "every job")
    assert pool.info["in_flight"] == 0


def test_a_job_terminated_before_it_starts_never_runs(loop: asyncio.AbstractEventLoop) -> None:
    ran: list[str] = []

    async def record(request_id: str, epoch: int) -> None:
        ran.append(request_id)

    blocked = threading.Event()
    pool = started_pool(loop, record)
    loop.call_soon_threadsafe(blocked.wait, 10)
    acks = Acks()
    apply(pool, "first", acks).terminate()
    apply(pool, "second", acks)
    blocked.set()
    wait_until(lambda: acks.n == 1, "the second")
    assert ran == ["second"]
    assert pool.n_cancelled == 1


def test_stop_returns_in_time_though_a_job_ignores_its_cancellation(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    release = asyncio.Event()

    async def stubborn(request_id: str, epoch: int) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    acks = Acks()
    pool = started_pool(loop, stubborn, stop_grace_s=0.05, cancel_grace_s=0.05)
    apply(pool, "s", acks)
    pool.stop()
    assert "1 jobs did not end" in caplog.text
    assert acks.n == 0
    loop.call_soon_threadsafe(release.set)
    wait_until(lambda: acks.n == 1, "its end")


def test_a_callback_that_fails_does_not_keep_a_job_alive(
    loop: asyncio.AbstractEventLoop, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(result: object) -> None:
        raise ConnectionError

    pool = started_pool(loop, _nothing)
    apply(pool, "a", fail)  # type: ignore[arg-type]
    acks = Acks()
    apply(pool, "b", acks)
    wait_until(lambda: acks.n == 1 and pool.info["in_flight"] == 0, "both to end")
    assert "acknowledging a finished job failed" in caplog.text


def test_redelivery_at_the_very_end_of_a_job_is_settled_too(loop: asyncio.AbstractEventLoop) -> None:
    """The running job ends between being found and being joined: the message must not stay unacknowledged."""
    may_end = threading.Event()

    async def handler(request_id: str, epoch: int) -> None:
        while not may_end.is_set():
            await asyncio.sleep(0.005)

    pool = started_pool(loop, handler)
    first = Acks()
    job = apply(pool, "q1", first)

    class EndsWhenJoined(list[Any]):
        def append(self, on_done: Any) -> None:
            """The loop is through with its callbacks and has forgotten the job."""
            may_end.set()
            wait_until(lambda: pool.job(("q1", 1)) is None, "the job to end")

    job.on_done = EndsWhenJoined(job.on_done)
    second = Acks()
    apply(pool, "q1", second)
    wait_until(lambda: second.n and first.n, "both deliveries to be acknowledged")
    wait_until(lambda: pool.job(("q1", 1)) is None, "nothing in flight")
    assert second.n == 1
