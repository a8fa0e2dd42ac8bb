"""Idle policies by name, on stated rungs, and the table that `manage.py simulate --idle` prints of them.

A request file's tenants stand for deployments there: who has files of his own names the deployment in that column.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Final

from autoscaler.policy.ladder import Rung, Stakes, Step
from autoscaler.sim.idle import Call, Fixed, HybridHistogram, Idle, Ladder, replay
from autoscaler.sim.job import Job

# Prices relative to a serving GPU of 1 USD/h; times of the order of vLLM's start on a warm machine, ServerlessLLM's
# loads and a cloud machine's boot. Assumptions, told with every table.
RUNGS: Final = (
    Rung("serving", 1.0, 0.0),
    Rung("asleep", 0.12, 3.2),
    Rung("process ready", 0.03, 6.0),
    Rung("on disk", 0.01, 25.0),
    Rung("nothing", 0.0, 180.0),
)


def policies(stakes: Stakes, tuned_s: float) -> dict[str, Callable[[], Idle]]:
    """Makers by name, each for one deployment."""
    serving, nothing = RUNGS[0], RUNGS[-1]
    return {
        "ladder": lambda: Ladder(RUNGS, stakes),
        "ladder, no history": lambda: Ladder(RUNGS, stakes, learns=False),
        "ladder, two rungs": lambda: Ladder((serving, nothing), stakes),
        "always on": lambda: Fixed(Step(0.0, serving)),
        "zero at once": lambda: Fixed(Step(0.0, nothing)),
        "keep-alive, tuned": kept_alive(tuned_s),
        "keep-alive 600 s": kept_alive(600.0),
        "asleep at once": lambda: Fixed(Step(0.0, RUNGS[1])),
        "hybrid histogram": lambda: HybridHistogram(serving, nothing),
    }


def kept_alive(seconds: float) -> Callable[[], Idle]:
    """Serving for so long, then nothing."""
    return lambda: Fixed(Step(0.0, RUNGS[0]), Step(seconds, RUNGS[-1]))


def compare(
    jobs: Iterable[Job], stakes: Stakes, *, s_per_token: float, keep_alive_s: float
) -> dict[str, dict[str, float]]:
    """By policy: requests, share that was late, USD of idling, and with the late requests. All of the file counts; a
    request runs `s_per_token` for each token of its answer."""
    by_deployment: dict[str, list[Call]] = defaultdict(list)
    end_s = 0.0
    for job in jobs:
        call = Call(job.arrived_s, job.n_output * s_per_token)
        by_deployment[job.flow[0]].append(call)
        end_s = max(end_s, call.at_s + call.runs_s)
    calls = [by_deployment[name] for name in sorted(by_deployment)]
    found = {}
    for name, make in policies(stakes, keep_alive_s).items():
        books = replay(calls, make, stakes, count_from_s=0.0, until_s=end_s + 1e-6)
        late = books.n_late / max(books.n_requests, 1)
        found[name] = {
            "n_requests": float(books.n_requests),
            "late": late,
            "idle_usd": books.idle_usd,
            "total_usd": books.total_usd,
        }
    return found
