"""Beat sends what is due, and sleeps between."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from celery import Celery

from controlplane.beat import PunctualScheduler
from controlplane.celery import app as control

EVERY_S = 0.2
N_SENT = 10


def test_it_sleeps_until_a_task_is_due_and_does_not_ask_in_a_loop(tmp_path: Path) -> None:
    app = Celery("beat-test", broker="memory://")
    app.conf.beat_schedule = {name: {"task": name, "schedule": EVERY_S} for name in ("one", "two")}
    sent: list[tuple[str, float]] = []

    class Recording(PunctualScheduler):
        def apply_async(self, entry: Any, *_: Any, **__: Any) -> Any:
            sent.append((entry.task, time.monotonic()))
            return type("Sent", (), {"id": "x"})

    scheduler = Recording(app, schedule_filename=str(tmp_path / "schedule"), lazy=True)
    scheduler.setup_schedule()
    n_asked = 0
    end_s = time.monotonic() + 60
    while len(sent) < N_SENT and time.monotonic() < end_s:
        wait_s = scheduler.tick()
        n_asked += 1
        if wait_s > 0:
            time.sleep(wait_s)
    scheduler.close()
    assert {task for task, _ in sent} == {"one", "two"}
    times = [at_s for task, at_s in sent if task == "one"]
    assert all(later - earlier >= 0.9 * EVERY_S for earlier, later in pairwise(times))
    assert n_asked <= 4 * N_SENT, "each is asked for before, at and after its time, and not a hundred times"


def test_the_control_side_uses_it() -> None:
    assert control.conf.beat_scheduler == "controlplane.beat:PunctualScheduler"
