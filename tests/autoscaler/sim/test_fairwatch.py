"""The measure of fairness itself: gaps by hand, the bound, and that watching changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command

from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.fairwatch import FairWatch, vtc_bound
from autoscaler.sim.job import Job
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.orders import DlpmOrder, VtcOrder
from autoscaler.sim.queues import Binding, Fair, Plain, Queue, fcfs
from autoscaler.sim.routers import LeastLoad
from autoscaler.sim.world import World
from controlplane.policy.perfmodel import StepModel

STEP = StepModel(base_s=0.001, weights_s=0.009, token_s=0.0, seq_s=0.0, context_s=0.0, pair_s=0.0)
SPEC = EngineSpec(STEP, kv_tokens=5_000, max_seqs=4)


def jobs(n_of_a: int = 10, n_of_b: int = 10) -> list[Job]:
    """All of a, then all of b, of 100 + 50 tokens each: a service of 200."""
    return [
        Job(n, 0.0 if n < n_of_a else 0.001, 100, 50, (t, t, t))
        for n, t in enumerate(["a"] * n_of_a + ["b"] * n_of_b)
    ]


def watch(queue: Queue, given: list[Job], slots: int = 1) -> FairWatch:
    kernel, seen = Kernel(), FairWatch(queue)
    world = World(kernel, seen, LeastLoad(), (seen,))
    world.add_replica(SPEC, slots)
    world.feed(iter(given))
    kernel.run(max_events=100_000)
    assert world.n_ended == len(given)
    return seen


def test_the_gap_of_first_come_first_served_is_what_the_first_tenant_got_while_both_waited() -> None:
    seen = watch(fcfs(), jobs())
    assert seen.service == {"a": 2000.0, "b": 2000.0}
    # From b's arrival (a prompt of a counts) until the last of a is bound: nine answers have ended.
    assert seen.widest.service == 9 * 200 - 100
    assert seen.widest.tenants == ("a", "b")
    assert 0 < seen.widest.from_s < seen.widest.until_s
    assert seen.n_idle == 0
    assert seen.n_checks > 40


@pytest.mark.parametrize("queue", [VtcOrder, Fair])
def test_fair_queues_stay_within_a_request_or_two(queue: Callable[[], Queue]) -> None:
    seen = watch(queue(), jobs(30, 10))
    assert 0 < seen.widest.service <= 2 * 200
    assert seen.service == {"a": 6000.0, "b": 2000.0}


def test_who_does_not_wait_has_no_gap() -> None:
    assert watch(fcfs(), jobs(10, 0)).widest.service == 0
    assert watch(fcfs(), jobs(2, 2), slots=4).widest.service == 0


def test_what_was_given_while_one_of_them_did_not_wait_is_no_gap() -> None:
    """Both wait, then a alone for ten requests, then both again."""
    given = [Job(n, 0.0, 100, 50, (t, t, t)) for n, t in enumerate("abab")]
    given += [Job(4 + n, 1.7, 100, 50, ("a", "a", "a")) for n in range(10)]
    given += [Job(14 + n, 7.4, 100, 50, (t, t, t)) for n, t in enumerate("abab")]
    assert watch(fcfs(), given).widest.service <= 2 * 200


def test_a_queue_that_leaves_a_slot_idle_is_seen() -> None:
    class Lazy(Plain):
        """Fills no slot when one frees."""

        def settle(self, job: Job, now_s: float) -> list[Binding]:
            found = super().settle(job, now_s) if len(self.running[job.replica]) == 1 else []
            self.running[job.replica].pop(job.id, None)
            return found

    given = [Job(n, 0.0, 100, 30 + 10 * n) for n in range(6)]
    assert watch(Lazy(lambda job: job.arrived_s), given, slots=3).n_idle > 0


def test_watching_changes_nothing() -> None:
    alone, watched = jobs(), jobs()
    kernel = Kernel()
    world = World(kernel, DlpmOrder(300), LeastLoad())
    world.add_replica(SPEC, 2)
    world.feed(iter(alone))
    kernel.run(max_events=100_000)
    watch(DlpmOrder(300), watched, slots=2)
    assert [job.ended_s for job in alone] == [job.ended_s for job in watched]


def test_the_bound_is_twice_the_larger_of_prompt_and_batch() -> None:
    assert vtc_bound(longest_prompt=1000, largest_batch=400) == 2000
    assert vtc_bound(longest_prompt=1000, largest_batch=600) == 2400


def test_the_study_runs_on_a_file_of_its_kind(tmp_path: Path) -> None:
    rows = [
        f"{n * 0.2},{'big' if n % 3 else 'small'},{60 + n % 5 * 20},{40 + n % 7 * 30}" for n in range(150)
    ]
    path = tmp_path / "tenants.csv"
    path.write_text("arrival_s,tenant,prompt_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    out = StringIO()
    argv = ["study", "fairness", "--traces", str(tmp_path), "--requests", str(path), "--load", "2.5"]
    with suppress(SystemExit):  # FCFS need not be unfair on such a file
        call_command(*argv, "--seeds", "2", "--json", stdout=out, stderr=StringIO())
    study = json.loads(out.getvalue())
    assert [goal["is_met"] for goal in study["goals"][:3]] == [True, True, True]
    assert [row[0] for row in study["tables"][1]["rows"]] == ["big (100)", "small (50)"]
    assert study["tables"][0]["rows"][0][1]["mean"] > study["tables"][0]["rows"][1][1]["mean"] > 0
