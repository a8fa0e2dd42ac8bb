"""When silence is a hang, and when it is not."""

import threading

import pytest

from workers.failure import ReplicaFailure
from workers.watchdog import Glance, Watchdog, judge


def glance(**changes: float) -> Glance:
    base: dict[str, float] = {
        "now_s": 100.0,
        "loop_beat_at_s": 99.8,
        "n_engine_work": 1,
        "last_step_at_s": 99.9,
        "expected_step_s": 0.02,
    }
    return Glance(**(base | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "code"),
    [
        (glance(), None),
        (glance(last_step_at_s=95.1), None),
        (glance(last_step_at_s=94.9), "engine_hung"),
        (glance(last_step_at_s=10.0, n_engine_work=0), None),  # idle
        (glance(last_step_at_s=85.0, expected_step_s=4.0), None),  # a long prefill: 16 s allowed
        (glance(last_step_at_s=83.0, expected_step_s=4.0), "engine_hung"),
        (glance(loop_beat_at_s=91.0), None),
        (glance(loop_beat_at_s=89.0), "loop_hung"),
    ],
)
def test_judgement(seen: Glance, code: str | None) -> None:
    failure = judge(seen, hang_s=5.0)
    assert (failure.code if failure else None) == code


def test_watchdog_reports_once_from_its_own_thread() -> None:
    heard: list[tuple[ReplicaFailure, str]] = []
    done = threading.Event()

    def on_hang(failure: ReplicaFailure) -> None:
        heard.append((failure, threading.current_thread().name))
        done.set()

    watchdog = Watchdog(lambda: glance(last_step_at_s=0.0), 5.0, on_hang)
    watchdog.start()
    assert done.wait(10)
    watchdog._thread.join(5)
    assert [(f.code, name) for f, name in heard] == [("engine_hung", "watchdog")]
