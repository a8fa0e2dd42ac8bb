"""Which requests are bound to a live replica that knows nothing of them: pure, the time is an argument.

A message can be lost between Redis and a consumer that lives on: the answer to the pop went down with a connection,
or Redis came back without the last second of its log. The request would hold its slot and its money for ever and
its client would wait. Called by watcher.py with what Redis says; what is confirmed here is bound again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from workers.contract import ServingReport

AFTER_S = 3.0
MIN_REPORTS = 2  # a message may be on its way when one report is written, not while another one is


@dataclass(slots=True)
class _Suspect:
    since_s: float
    seq: int
    n_reports: int = 1


class Orphans:
    """Suspects of any number of replicas."""

    def __init__(self) -> None:
        self._suspects: dict[str, dict[str, _Suspect]] = {}

    def look(
        self, replica: str, bound: Collection[str], report: ServingReport | None, now_s: float
    ) -> list[str]:
        """Requests of `bound` missing from `MIN_REPORTS` reports and for `AFTER_S`, sorted.

        Without a report (an older replica, or one that is silent) nothing can be told.
        """
        before = self._suspects.pop(replica, {})
        if report is None:
            return []
        served = set(report.requests)
        suspects = {
            request: before.get(request) or _Suspect(now_s, report.seq)
            for request in bound
            if request not in served
        }
        if suspects:
            self._suspects[replica] = suspects
        for suspect in suspects.values():
            if suspect.seq != report.seq:
                suspect.seq, suspect.n_reports = report.seq, suspect.n_reports + 1
        return sorted(
            request
            for request, suspect in suspects.items()
            if suspect.n_reports >= MIN_REPORTS and now_s - suspect.since_s >= AFTER_S
        )

    def forget_all_but(self, replicas: Collection[str]) -> None:
        for replica in self._suspects.keys() - set(replicas):
            del self._suspects[replica]
