"""The page of a simulation: whole, escaped, without anything from outside; charts and samples in bounded memory."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from autoscaler.sim import report, scenario, svg
from autoscaler.sim.job import Job
from autoscaler.sim.market import Zone
from autoscaler.sim.policies import policy
from autoscaler.sim.replicas import engine_spec
from autoscaler.sim.scenario import Result, Setting
from autoscaler.sim.series import MAX_SAMPLES


@pytest.fixture(scope="module")
def results() -> dict[str, list[Result]]:
    zones = (Zone("a", 600.0, (4, 4, 0, 4), 1.0), Zone("b", 600.0, (0, 4, 4, 4), 1.2))
    setting = Setting(engine_spec("llama-3.1-8b", "l4"), 4, 1, 2.0, zones, until_s=2400, warm_s=300)

    def jobs() -> list[Job]:
        flows = [(name, name, name) for name in ("<b>acme</b>", "other")]
        return [Job(i, i * 2.0, 300, 40, flows[i % 5 == 0]) for i in range(1100)]

    return {name: [scenario.run(setting, policy(name), iter(jobs()))] for name in ("corral", "on-demand")}


def test_the_page_is_one_file_that_needs_nothing_else(
    results: dict[str, list[Result]], tmp_path: Path
) -> None:
    page = report.write(tmp_path / "new" / "report", results, {"load": "a & b"}, 2.0, ["noted"])
    text = page.read_text()
    assert not re.search(r"<script|https?://|src=|@import|url\(", text)
    for piece in (
        "a &amp; b",
        "noted",
        "Replicas against demand",
        "Cost so far",
        "Service by tenant",
        "corral",
    ):
        assert piece in text
    assert "&lt;b&gt;acme&lt;/b&gt;" in text and "<b>acme" not in text
    assert text.count("<svg") == 2 + 2 * 4
    charts = sorted(page.parent.glob("*.svg"))
    assert len(charts) == 10
    for chart in charts:
        ElementTree.fromstring(chart.read_text())


def test_samples_add_up_and_warm_up_is_not_counted(results: dict[str, list[Result]]) -> None:
    result = results["corral"][0]
    last = result.samples[-1]
    assert last.n_ended > result.n_requests  # those of the first five minutes ended, and do not count
    assert sum(t.n_requests for t in result.tenants) == result.n_requests
    assert last.n_in_slo / result.n_requests == pytest.approx(result.slo_attainment, abs=0.01)
    assert result.usd < last.usd
    assert [s.at_s for s in result.samples] == sorted(s.at_s for s in result.samples)
    assert len(result.samples) <= MAX_SAMPLES
    assert "samples" not in result.figures()


def test_ticks_are_round_and_within() -> None:
    assert svg.ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert svg.ticks(0.83, 1.0) == [0.85, 0.9, 0.95, 1.0]
    assert svg.ticks(3, 3) == [3]


def test_a_chart_of_nothing_says_so() -> None:
    assert "nothing to draw" in svg.chart([], unit="USD")
