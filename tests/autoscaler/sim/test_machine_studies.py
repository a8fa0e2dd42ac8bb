"""Studies of machines on small made-up traces: they end, compare like with like, and say what they were asked."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.management import call_command

from autoscaler.sim.ablations import ABLATIONS
from autoscaler.sim.rates import _QUANTILES
from autoscaler.sim.studies import _given as given
from autoscaler.sim.studies._spot import Paid, equal
from autoscaler.sim.studies.scaling import choose

V100 = "spot/skypilot_spot_traces/availability/1-node/aws-02-15-2023"
COUNTED = "spot/skypilot_spot_traces/preemption/4-node/aws-08-03-2023"


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("traces")
    folder = root / "requests" / "servegen"
    folder.mkdir(parents=True)
    with (folder / "m-mid_rates.csv.gz.plain").open("w") as plain:
        writer = csv.writer(plain)
        writer.writerow(["client", "t_start_s", "rate_rps", "iat_cv"])
        for window in range(9 * 144):
            for client in ("1", "2"):
                writer.writerow([client, window * 600, 300 + 100 * (window // 36 % 2), 1.0])
    _gzip(folder / "m-mid_rates.csv.gz.plain")
    names = [name for name, _ in _QUANTILES]
    with (folder / "m-mid_lengths.csv.gz.plain").open("w") as plain:
        writer = csv.writer(plain)
        writer.writerow(["client", "t_start_s", "field", *names])
        writer.writerow(["1", 0, "input_tokens", *range(100, 100 + len(names))])
        writer.writerow(["1", 0, "output_tokens", *range(90, 90 + len(names))])
    _gzip(folder / "m-mid_lengths.csv.gz.plain")
    rows = "\n".join(f"{i * 4},200,100" for i in range(800))
    (root / "requests" / "azure_llm_2023_conv.csv").write_text(
        f"arrival_s,context_tokens,generated_tokens\n{rows}\n"
    )
    for place, zone, data in (
        (V100, "us-x-1a_v100_1", [1] * 40 + [0] * 20),
        (V100, "us-x-1b_v100_1", [0] * 10 + [1] * 50),
        (COUNTED, "us-x-2c_v100_1", [4, 3, 4, 1] * 15),
    ):
        (root / place).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"metadata": {"gap_seconds": 195}, "data": data})
        (root / place / f"{zone}.json").write_text(text)
    return root


def _gzip(plain: Path) -> None:
    plain.with_suffix("").write_bytes(gzip.compress(plain.read_bytes()))


def study(name: str, traces: Path, *args: str) -> dict[str, Any]:
    out = StringIO()
    with contextlib.suppress(SystemExit):  # a goal was missed: so short a run promises nothing
        call_command("study", name, "--traces", str(traces), "--json", *args, stdout=out, stderr=StringIO())
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def test_markets_are_grouped_and_only_probes_of_one_are_scaled(traces: Path) -> None:
    found = {market.name: market for market in given.markets(traces, 16)}
    assert {name: len(market.zones) for name, market in found.items()} == {
        "availability 1-node aws-02-15-2023, v100_1": 2,
        "preemption 4-node aws-08-03-2023, v100_1": 1,
    }
    assert max(found["availability 1-node aws-02-15-2023, v100_1"].zones[0].capacity) == 16
    assert max(found["preemption 4-node aws-08-03-2023, v100_1"].zones[0].capacity) == 4
    one = found["availability 1-node aws-02-15-2023, v100_1"].window(3, 1950)
    assert one == found["availability 1-node aws-02-15-2023, v100_1"].window(3, 1950)


def test_equal_availability_takes_the_cheapest_that_reaches_and_says_when_none_does() -> None:
    def paid(ratio: float, availability: float) -> list[Paid]:
        return [Paid(ratio, availability)] * 2

    found = {
        "corral": paid(1.0, 1.0),
        "any-zone:n_extra=0": paid(0.9, 0.99),
        "any-zone:n_extra=1": paid(1.3, 0.9995),
        "any-zone:n_extra=2": paid(1.2, 0.9992),
        "spothedge:n_extra=1": paid(1.4, 0.98),
        "spothedge:n_extra=2": paid(1.5, 0.99),
    }
    assert equal(found, "any-zone") == ("any-zone:n_extra=2", True)
    assert equal(found, "spothedge") == ("spothedge:n_extra=2", False)
    found["corral"] = paid(1.0, 0.985)  # ours falls short itself: then as much as ours is asked
    assert equal(found, "any-zone") == ("any-zone:n_extra=0", True)


def test_study_spot_compares_all_on_the_same_demand(traces: Path) -> None:
    found = study("spot", traces, "--seeds", "1", "--days", "0.1", "--machines", "2", "--hours", "0.7")
    everywhere, assumed, alone, served = found["tables"]
    assert len(everywhere["rows"]) == 2 and len(assumed["rows"]) == 3
    assert [row[0] for row in alone["rows"]] == [row[0] for row in everywhere["rows"]]
    assert all(
        row[1]["mean"] <= on_demand[-1]
        for row, on_demand in zip(alone["rows"], everywhere["rows"], strict=True)
    )
    policies = {row[0].split(": ")[1] for row in served["rows"]}
    assert {"on-demand", "corral", "any-zone:n_extra=0", "spothedge:n_extra=1"} <= policies
    on_demand = next(row for row in served["rows"] if row[0].endswith(": on-demand"))
    assert on_demand[1]["mean"] > 2  # spot costs less than a third
    assert any("SpotHedge".lower() in goal["claim"] for goal in found["goals"])


def test_study_of_cover_tunes_on_other_windows_than_it_judges_and_shows_the_bounds(traces: Path) -> None:
    found = study(
        "spot-cover", traces, "--seeds", "1", "--days", "0.1", "--machines", "2", "--fit-windows", "1"
    )
    judged, elsewhere, fitted = found["tables"]
    assert (len(judged["rows"]), len(fitted["rows"]), len(elsewhere["rows"])) == (4, 3, 1)
    assert all(row[-3]["mean"] >= 1 for row in judged["rows"]), "cover is never cheaper than none"
    by_worth = [cell["mean"] for cell in fitted["rows"][0][1::2]]
    assert by_worth == sorted(by_worth), "what is worth more is covered better"
    assert sum("times the oracle" in goal["claim"] for goal in found["goals"]) == 4


def test_study_of_the_reserve_compares_with_the_same_buyer_without_it(traces: Path) -> None:
    args = ("--seeds", "1", "--days", "0.1", "--machines", "2", "--hours", "0.6")
    alone, served = study("spot-reserve", traces, *args)["tables"]
    assert len(alone["rows"]) == 5  # four assumptions of the six zones, and the other market
    for row in (alone["rows"][i] for i in (0, 2, 4)):  # where what is woken serves within the notice
        assert row[1]["mean"] >= 1 and row[2]["mean"] == 1.0
    assert [row[0].rpartition(": ")[2] for row in served["rows"]] == [
        "on-demand", "without a reserve", "with a reserve"
    ] * 2  # fmt: skip


def test_study_scaling_tunes_on_one_span_and_judges_on_another(
    traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "autoscaler.sim.studies.scaling._KNOBS",
        {
            "corral": ("corral:n_deviations=1.0",),
            "hpa": ("hpa:target_ratio=0.3", "hpa:target_ratio=0.5"),
            "kpa": ("kpa:target_ratio=0.5",),
            "static": ("static:n=2", "static:n=1"),
        },
    )
    monkeypatch.setattr("autoscaler.sim.studies.scaling._DEFAULTS", ())
    monkeypatch.setattr("autoscaler.sim.studies.scaling._OTHER", ("m-mid", 0.001, 40.0))
    args = ("--seeds", "2", "--fit-windows", "1", "--hours", "1.1", "--keep", "0.0001")
    found = study("scaling", traces, *args)
    judged, elsewhere, fitted = found["tables"]
    assert len(judged["rows"]) == 5 and len(fitted["rows"]) == 6  # the tuned and the ceiling
    assert len(elsewhere["rows"]) == 4
    assert [row[0] for row in judged["rows"]][3] == "static:n=1 (tuned)", "the cheapest that is enough"
    assert judged["rows"][0][1]["n"] == 2
    assert len(found["goals"]) == 4


def test_windows_are_told_one_by_one_and_judged_where_the_target_can_be_had(traces: Path) -> None:
    args = ("--model", "m-mid", "--seeds", "2", "--hours", "0.7", "--keep", "0.0001")
    found = study("scaling-windows", traces, *args)
    rows = found["tables"][0]["rows"]
    assert len(rows) == 2 and rows[0][0] != rows[1][0]
    assert all(row[1] > 0 and row[3] == 0.0 and row[5] > 0 for row in rows)
    assert len(found["goals"]) == 2


def test_ours_is_tuned_to_attain_most_for_less_than_the_rivals_and_the_rivals_to_cost_least() -> None:
    def runs(attained: float, usd: float) -> Any:
        return [SimpleNamespace(slo_attainment=attained, usd=usd)]

    fitted = {"a": runs(0.991, 10.0), "b": runs(0.995, 12.0), "c": runs(0.98, 9.0)}
    assert choose(fitted) == "a"
    assert choose(fitted, most_usd=12.5) == "b"
    assert choose(fitted, most_usd=9.5) == "c"
    assert choose(fitted, most_usd=1.0) == "a", "none is affordable: the rule of the others"
    assert choose({"c": fitted["c"]}) == "c", "none reaches the target"


def test_study_ablation_has_a_row_for_each_ingredient(traces: Path) -> None:
    found = study("ablation", traces, "--seeds", "1", "--hours", "0.7", "--keep", "0.0003")
    rows = found["tables"][0]["rows"]
    assert [row[0] for row in rows] == list(ABLATIONS)
    assert rows[0][2] is None and rows[-1][2]["mean"] > 0  # on-demand costs more
