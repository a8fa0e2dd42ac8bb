"""The study of orders on a small world of its kind: halves stay apart, the load is the load, the table is whole."""

from __future__ import annotations

import csv
import json
import random
import statistics
from contextlib import suppress
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from autoscaler.sim.studies import ablation_serving, ordering


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    chance = random.Random(1)
    (tmp_path / "requests").mkdir()
    (tmp_path / "lengths").mkdir()
    with (tmp_path / "lengths" / "lengths.csv").open("w") as file:
        table = csv.writer(file)
        table.writerow(["row", "output_tokens", "pred_class5"])
        for row in range(800):
            c = chance.randrange(2)
            # Even rows end in 0, odd ones in 5: whoever looks at the wrong half is seen.
            table.writerow([row, (400 if c else 30) + 10 * chance.randrange(9) + 5 * (row % 2), c])
    azure = ["arrival_s,context_tokens,generated_tokens", *(f"{n * 0.2},100,50" for n in range(400))]
    (tmp_path / "requests" / "azure_llm_2023_conv.csv").write_text("\n".join(azure) + "\n")
    tenants = [
        "arrival_s,tenant,prompt_tokens,output_tokens",
        *(f"{n},{'ab'[n % 3 > 1]},{90 + n},9" for n in range(30)),
    ]
    (tmp_path / "requests" / "lmsys_arena_27tenants.csv").write_text("\n".join(tenants) + "\n")
    return tmp_path


def options(traces: Path) -> dict[str, Path | None]:
    return {"traces": traces, "lengths": traces / "lengths" / "lengths.csv", "requests": None}


def test_what_is_tuned_on_is_not_what_is_measured_and_the_load_is_exact(traces: Path) -> None:
    data = ordering._read(options(traces))
    fit = ordering._jobs(data, 1.1, 3, fit=True)
    test = ordering._jobs(data, 1.1, 3)
    assert {job.n_output % 10 for job in fit} == {0}
    assert {job.n_output % 10 for job in test} == {5}
    assert len({job.arrived_s for job in fit}) == len(fit) == len(test) == 200
    assert data.medians == {c: statistics.median(n for n, k in data.fit if k == c) for c in (0, 1)}
    assert {job.n_predicted for job in test} == {round(m) for m in data.medians.values()}
    assert {job.n_predicted for job in ordering._jobs(data, 1.1, 3, exact=True)} == {j.n_output for j in test}
    for jobs in (fit, test):
        rate = len(jobs) / jobs[-1].arrived_s
        work = rate * statistics.fmean(j.n_output for j in jobs)
        capacity = data.requests_per_s * statistics.fmean(n for n, _ in data.fit)
        assert work / capacity == pytest.approx(1.1, rel=0.01)


def test_the_study_prints_every_order_and_both_goals(traces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "_LOADS", (1.1,))
    monkeypatch.setattr(ordering, "_GAMMAS", (0.02,))
    monkeypatch.setattr(ordering, "_SHARES", (0.95,))
    monkeypatch.setattr(ordering, "_MIN_REQUESTS", 10)
    out = StringIO()
    argv = ["study", "ordering", "--traces", str(traces), "--lengths", str(options(traces)["lengths"])]
    with suppress(SystemExit):  # so small a world need not reach the goals
        call_command(*argv, "--seeds", "1", "--json", stdout=out, stderr=StringIO())
    study = json.loads(out.getvalue())
    by_load, orders, other, tuning = (table["rows"] for table in study["tables"])
    assert [row[0] for row in by_load] == ["1.1"]
    means = {row[0]: row[2]["mean"] for row in orders}
    assert means["first come, first served"] == 0.0
    assert means["shortest predicted, one line"] < means["ours, queue age 30 s (the default)"] <= 0.05
    assert len(other) == 2
    assert [row[:2] for row in tuning] == [["0.02", "0.95"]]
    assert len(study["goals"]) == 2


def test_a_file_without_classes_is_refused_by_column(traces: Path) -> None:
    with pytest.raises(CommandError, match="pred_class5"):
        call_command(
            "study", "ordering", "--traces", str(traces), "--lengths",
            str(traces / "requests" / "azure_llm_2023_conv.csv"), stderr=StringIO(),
        )  # fmt: skip


def test_without_an_ingredient_of_the_queue_the_same_requests_are_served_otherwise(
    traces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ordering, "_MIN_REQUESTS", 10)
    said: list[str] = []
    table = ablation_serving._queue({**options(traces), "seeds": 1}, said.append)
    rows = {str(row[0]).split(" (")[0]: row for row in table.rows}
    assert len(rows) == len(said) == 7
    assert rows["nothing"][2] is None
    assert rows["order"][2].mean > 0 and rows["prediction"][2].mean > 0, (
        "first come, first served takes longer"
    )
    assert rows["promotion of who waits long"][3].mean > 0
