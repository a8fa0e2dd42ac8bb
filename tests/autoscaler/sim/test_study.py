"""The frame of studies: tables, goals, intervals, the command's exit status and errors."""

import json
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from autoscaler.sim.statistics import Interval, interval
from autoscaler.sim.studies.base import Column, Goal, Study, Table, markdown, text

STUDY = Study(
    "Title",
    {"boot": "120 s"},
    [
        Table(
            "Costs",
            [Column("policy"), Column("cost", "{:.1f} USD")],
            [["ours", Interval(1.25, 0.5, 3)], ["none", None]],
        )
    ],
    [Goal("cheaper", "1.2", is_met=False, why="it is not")],
)


def test_interval_is_student_s() -> None:
    assert interval([3.0]) == Interval(3.0, 0.0, 1)
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.30 / 3**0.5)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)


def test_text_and_markdown_show_table_goal_and_reason() -> None:
    shown = text(STUDY)
    assert "1.2 ± 0.5 USD" in shown
    assert "MISSED  cheaper: 1.2" in shown
    assert "it is not" in shown
    page = markdown(STUDY, "manage.py study x")
    assert "| ours | 1.2 ± 0.5 USD |" in page
    assert "| none | – |" in page
    assert "**missed**: it is not" in page


def test_a_row_that_does_not_fit_its_columns_is_refused() -> None:
    with pytest.raises(ValueError, match="3 cells under 1"):
        Table("t", [Column("a")], [[1, 2, 3]])


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    (tmp_path / "requests").mkdir()
    lines = [
        "arrival_s,context_tokens,generated_tokens",
        *(f"{i / 4},{50 + i},{5 + i % 7}" for i in range(80)),
    ]
    (tmp_path / "requests" / "azure_llm_2023_conv.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_command_prints_writes_and_fails_when_a_goal_is_missed(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["manage.py", "study", "speed", "--traces", str(traces), "--write", "x.md"]
    )
    out, page = StringIO(), tmp_path / "x.md"
    monkeypatch.setattr(
        "autoscaler.sim.studies.speed._GOAL_PER_CPU_S", -(10**12)
    )  # two tiny runs: any interval
    argv = ["study", "speed", "--traces", str(traces), "--seeds", "2", "--json"]
    call_command(*argv, "--write", str(page), stdout=out, stderr=StringIO())
    study = json.loads(out.getvalue())
    assert study["tables"][1]["rows"][0][1] == 80
    assert [goal["is_met"] for goal in study["goals"]] == [True, True]
    assert "Written by `manage.py study speed --traces DIR`." in page.read_text()

    monkeypatch.setattr("autoscaler.sim.studies.speed._GOAL_PER_CPU_S", 10**12)
    with pytest.raises(SystemExit) as ended:
        call_command(*argv, stdout=StringIO(), stderr=StringIO())
    assert ended.value.code == 1


def test_errors_name_the_option_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORRAL_TRACES", raising=False)
    with pytest.raises(CommandError, match="--traces: not given"):
        call_command("study", "speed")
    with pytest.raises(CommandError, match=r"azure_llm_2023_conv\.csv"):
        call_command("study", "speed", "--traces", str(tmp_path))
    with pytest.raises(CommandError, match="--seeds"):
        call_command("study", "speed", "--traces", str(tmp_path), "--seeds", "0")
