"""Orders with a memory of their own before the simulator's slots: VTC, DLPM and skip-join MLFQ as published.

Thin faces over controlplane/policy/{vtc,dlpm,mlfq}.py. They see what an engine's own scheduler would (tokens produced
so far, what is cached), so that the papers' rules apply unchanged.
"""

from __future__ import annotations

from autoscaler.sim.job import Job
from autoscaler.sim.queues import Slots
from controlplane.policy.dlpm import Dlpm
from controlplane.policy.mlfq import SkipJoinMlfq
from controlplane.policy.ordering import predicted_ms
from controlplane.policy.vtc import Vtc


class _Metered(Slots):
    """Charges each tenant for the output of its running requests up to the instant of every decision."""

    def __init__(self, policy: Vtc | Dlpm) -> None:
        super().__init__()
        self._policy = policy
        self._jobs: dict[int, Job] = {}  # that wait
        self._charged: dict[int, int] = {}  # output tokens, of those that run

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job, now_s: float, *, resumed: bool) -> None:
        if resumed:
            self._catch_up(job, job.n_done)
            del self._charged[job.id]
            self._policy.add_first(job.flow[0], job.id)
        else:
            self.meter()
            self._policy.add(job.flow[0], job.id)
        self._jobs[job.id] = job

    def on_bound(self, job: Job, replica: int, now_s: float) -> None:
        self._charged[job.id] = job.n_done

    def on_end(self, job: Job, now_s: float) -> None:
        self._catch_up(job, job.n_output)
        del self._charged[job.id]

    def meter(self) -> None:
        """Charge what has been produced by now."""
        for running in self.running.values():
            for job in running.values():
                self._catch_up(job, self.sight.n_produced(job))

    def _catch_up(self, job: Job, n_done: int) -> None:
        n_new = n_done - self._charged[job.id]
        if n_new > 0:
            self._policy.charge(job.flow[0], n_output=n_new)
            self._charged[job.id] = n_done


class VtcOrder(_Metered):
    """The client with the least service is next (arXiv:2401.00588)."""

    def __init__(self) -> None:
        self.policy = Vtc()
        super().__init__(self.policy)

    def take(self, replica: int, now_s: float) -> Job:
        self.meter()
        return self._jobs.pop(self.policy.take()[1])

    def on_bound(self, job: Job, replica: int, now_s: float) -> None:
        super().on_bound(job, replica, now_s)
        self.policy.charge(job.flow[0], n_prompt=job.n_prompt)


class DlpmOrder(_Metered):
    """The longest cached prefix of those with credit is next (arXiv:2501.14312)."""

    def __init__(self, quantum: float = 4096.0) -> None:
        self.policy = Dlpm(quantum)
        super().__init__(self.policy)

    def take(self, replica: int, now_s: float) -> Job:
        self.meter()
        _, request = self.policy.take(lambda r: self.sight.n_cached(self._jobs[r], replica))
        return self._jobs.pop(request)

    def on_bound(self, job: Job, replica: int, now_s: float) -> None:
        super().on_bound(job, replica, now_s)
        n_cached = min(self.sight.n_cached(job, replica), job.n_prompt)
        self.policy.charge(job.flow[0], n_prompt=job.n_prompt - n_cached)


class MlfqOrder(Slots):
    """Skip-join MLFQ (arXiv:2305.05920) at the queue: a request is put aside when its quantum is used and another goes
    before it, and computes its prompt and answer so far again when its turn comes. FastServe swaps the KV out instead
    and may preempt between any two tokens; a control plane in front of stock engines can do neither.

    Work is counted in decode steps of one sequence, a prompt token as a 64th (policy/ordering.py).
    """

    def __init__(self, quantum: float = 64.0, starve_s: float = 60.0, n_levels: int = 5) -> None:
        super().__init__()
        self.policy = SkipJoinMlfq(quantum=quantum, starve_s=starve_s, n_levels=n_levels)
        self._jobs: dict[int, Job] = {}
        self._joined: set[int] = set()
        self._resumed: list[Job] = []

    def __len__(self) -> int:
        return len(self._jobs) + len(self._resumed)

    def put(self, job: Job, now_s: float, *, resumed: bool) -> None:
        if resumed:
            self._resumed.append(job)
            return
        self._jobs[job.id] = job
        if job.id in self._joined:
            self.policy.wait(job.id, now_s)
        else:
            self._join(job, now_s)

    def take(self, replica: int, now_s: float) -> Job:
        if self._resumed:
            return self._resumed.pop(0)
        return self._jobs.pop(self.policy.take(now_s))

    def on_bound(self, job: Job, replica: int, now_s: float) -> None:
        if job.id not in self._joined:  # it found a free slot
            self._join(job, now_s)
            self.policy.take(now_s)
        self._allow(job)

    def renew(self, job: Job) -> None:
        self.policy.demote(job.id)
        if not self.policy.must_yield(job.id):
            self._allow(job)

    def on_end(self, job: Job, now_s: float) -> None:
        self.policy.end(job.id)
        self._joined.discard(job.id)

    def _join(self, job: Job, now_s: float) -> None:
        self.policy.join(job.id, predicted_ms(job.n_prompt, 1, 1.0), now_s)
        self._joined.add(job.id)

    def _allow(self, job: Job) -> None:
        quantum = self.policy.quantum(job.id)
        if quantum is None:
            job.n_stop = job.n_output
            return
        if job.n_done == 0:  # the prompt is part of its first quantum
            quantum -= predicted_ms(job.n_prompt, 0, 1.0)
        job.n_stop = min(job.n_output, job.n_done + max(round(quantum), 1))
