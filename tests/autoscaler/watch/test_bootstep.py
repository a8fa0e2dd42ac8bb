"""The watcher starts and stops with the control worker, and with no other."""

from types import SimpleNamespace
from typing import Any

import pytest

from autoscaler.watch import bootstep
from autoscaler.watch.bootstep import WatcherStep


def _worker(*queues: str) -> Any:
    consumed = dict.fromkeys(queues)
    return SimpleNamespace(
        app=SimpleNamespace(amqp=SimpleNamespace(queues=SimpleNamespace(consume_from=consumed)))
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads' lives, in order."""
    from autoscaler import house
    from autoscaler.watch import recorder, watcher

    said: list[str] = []

    class Thread:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def start(self) -> None:
            said.append("start")

        def stop(self) -> None:
            said.append("stop")

    monkeypatch.setattr(recorder, "Recorder", Thread)
    monkeypatch.setattr(watcher, "Watcher", Thread)
    monkeypatch.setattr(
        house,
        "build_house",
        lambda: SimpleNamespace(cell=None, config=SimpleNamespace(heartbeat_stale_s=2.0)),
    )
    return said


def test_it_runs_with_a_worker_of_the_control_queue(started: list[str]) -> None:
    worker = _worker("control")
    step = WatcherStep(worker)
    step.start(worker)
    step.stop(worker)
    step.stop(worker)
    assert started == ["start", "start", "stop", "stop"]


def test_it_does_not_run_with_other_workers(started: list[str]) -> None:
    worker = _worker("something")
    step = WatcherStep(worker)
    step.start(worker)
    step.stop(worker)
    assert started == []


def test_it_is_part_of_the_control_application() -> None:
    from controlplane.celery import app

    assert bootstep.WatcherStep in app.steps["worker"]
