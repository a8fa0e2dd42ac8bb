"""Requests that a live replica knows nothing of: suspected, and confirmed by later reports only."""

from __future__ import annotations

from autoscaler.watch.orphans import AFTER_S, Orphans
from workers.contract import ServingReport


def report(seq: int, *requests: str) -> ServingReport:
    return ServingReport(seq=seq, requests=list(requests))


def test_a_request_missing_from_two_reports_for_a_while_is_lost() -> None:
    orphans = Orphans()
    assert orphans.look("r", {"a", "b"}, report(4, "a"), 0.0) == []
    assert orphans.look("r", {"a", "b"}, report(8, "a"), AFTER_S - 0.1) == []
    assert orphans.look("r", {"a", "b"}, report(8, "a"), AFTER_S) == ["b"]


def test_one_report_read_many_times_proves_nothing() -> None:
    orphans = Orphans()
    for second in range(60):
        assert orphans.look("r", {"a"}, report(4), float(second)) == []


def test_a_request_that_arrives_late_is_no_suspect_any_more() -> None:
    orphans = Orphans()
    orphans.look("r", {"a"}, report(4), 0.0)
    assert orphans.look("r", {"a"}, report(8, "a"), 2.0) == []
    assert orphans.look("r", {"a"}, report(12), 4.0) == [], "suspicion begins anew"


def test_without_a_report_nothing_can_be_told_and_nothing_is_remembered() -> None:
    orphans = Orphans()
    orphans.look("r", {"a"}, report(4), 0.0)
    assert orphans.look("r", {"a"}, None, 9.0) == []
    assert orphans.look("r", {"a"}, report(8), 10.0) == []
    orphans.forget_all_but(set())
    assert orphans.look("r", {"a"}, report(12), 99.0) == []
