"""Idle policies on arrivals: the books by hand, the baseline's rules, the study on a small file."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import random
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import CommandError, call_command

from autoscaler.policy.ladder import Gaps, Rung, Stakes, Step, gap_usd, rest
from autoscaler.sim.idle import Books, Call, Fixed, HybridHistogram, Idle, Ladder, replay

HOT, COLD = Rung("hot", 36.0, 0.0), Rung("cold", 0.0, 100.0)  # a cent a second
STAKES = Stakes(ttft_target_s=10.0, late_usd=1.0, late_usd_per_s=0.1, waking_usd_per_h=72.0)


def _replay(policy: Idle, *at_s: float, until_s: float = 1000.0, count_from_s: float = 0.0) -> Books:
    calls = [Call(s, 10.0) for s in at_s]
    return replay([calls], lambda: policy, STAKES, count_from_s=count_from_s, until_s=until_s)


def test_always_on_pays_for_the_gaps_only() -> None:
    books = _replay(Fixed(Step(0.0, HOT)), 0.0, 110.0, until_s=200.0)
    assert books.usd_by_rung["hot"] == pytest.approx(1.8)  # 10 to 110 s and 120 to 200 s
    assert (books.n_requests, books.n_late) == (2, 0)


def test_requests_that_come_while_it_wakes_wait_for_the_rest() -> None:
    books = _replay(Fixed(Step(0.0, COLD)), 0.0, 60.0, 95.0, 500.0)
    assert books.waits_s == [100.0, 40.0, 5.0, 100.0]
    assert books.n_late == 3
    assert books.late_usd == pytest.approx(3 * 1.0 + (90 + 30 + 90) * 0.1)
    assert books.idle_usd == pytest.approx(2 * 2.0), "100 s of a waking machine, twice"


def test_kept_alive_then_cold() -> None:
    policy = Fixed(Step(0.0, HOT), Step(50.0, COLD))
    books = _replay(policy, 100.0, 240.0, 400.0, until_s=400.0)
    assert books.waits_s == [100.0, 0.0]
    assert books.usd_by_rung["hot"] == pytest.approx(0.3 + 0.5)  # 210 to 240, then 250 to 300


def test_a_climb_is_ready_at_its_step_and_waited_for_before() -> None:
    policy = Fixed(Step(0.0, COLD), Step(300.0, HOT))
    assert _replay(policy, 0.0, 110.0 + 300.0).waits_s[1] == 0.0
    assert _replay(policy, 0.0, 110.0 + 240.0).waits_s[1] == pytest.approx(60.0), "40 of 100 s are done"
    assert _replay(policy, 0.0, 110.0 + 150.0).waits_s[1] == 100.0
    books = _replay(policy, 0.0, 110.0 + 310.0, until_s=421.0)
    assert books.usd_by_rung["hot"] == pytest.approx(0.1)
    assert books.usd_by_rung["waking"] == pytest.approx(2.0 + 2.0), "the first start and the climb"


def test_only_what_comes_after_the_warm_up_counts() -> None:
    books = _replay(Fixed(Step(0.0, HOT)), 0.0, 310.0, until_s=400.0, count_from_s=210.0)
    assert books.n_requests == 1
    assert books.usd_by_rung["hot"] == pytest.approx(1.0 + 0.8)


def test_the_books_agree_with_the_policy_s_own_reckoning() -> None:
    rungs, rng = (HOT, Rung("warm", 3.0, 20.0), COLD), random.Random(1)
    for _ in range(20):
        policy = Ladder(rungs, STAKES)
        for _ in range(20):
            policy.seen(rng.choice([30.0, 3000.0]) * rng.uniform(0.8, 1.2))
        steps, gap_s = policy.steps(), rng.uniform(0, 5000)
        if any(a.rung.wake_s > b.rung.wake_s for a, b in itertools.pairwise(steps)):
            continue  # a climb under way is booked in part
        wait_s = steps[-1].rung.wake_s
        books = _replay(Fixed(*steps), 0.0, wait_s + 10.0 + gap_s, until_s=wait_s + 10.0 + gap_s + 1e-6)
        first_usd = STAKES.wake_usd(steps[-1].rung)
        tail_usd = steps[0].rung.usd_per_h * 1e-6 / 3600
        assert books.total_usd - first_usd == pytest.approx(
            gap_usd(steps, STAKES, gap_s) + tail_usd, abs=1e-5
        )


def test_the_ladder_remembers_and_its_envelope_does_not() -> None:
    learning, standing = Ladder((HOT, COLD), STAKES), Ladder((HOT, COLD), STAKES, learns=False)
    gaps = Gaps()
    for _ in range(20):
        gaps = gaps.seen(600.0)
        learning.seen(600.0)
        standing.seen(600.0)
    assert learning.steps() == rest((HOT, COLD), STAKES, gaps).steps
    assert standing.steps() == rest((HOT, COLD), STAKES, Gaps()).steps != learning.steps()


def test_hybrid_histogram_as_in_its_paper() -> None:
    policy = HybridHistogram(HOT, COLD)
    assert [s.from_s for s in policy.steps()] == [0.0, 4 * 3600.0], "unknown: kept alive for the whole range"
    for _ in range(20):
        policy.seen(60.0 * 60 + 5)
    found = policy.steps()
    assert [s.rung.name for s in found] == ["cold", "hot", "cold"]
    assert [s.from_s for s in found] == pytest.approx([0.0, 60 * 60 * 0.9, 61 * 60 * 1.1])
    for _ in range(21):
        policy.seen(5 * 3600.0)
    assert len(policy.steps()) == 2, "most gaps are out of range"
    soon = HybridHistogram(HOT, COLD)
    for _ in range(20):
        soon.seen(30.0)
    assert [(s.from_s, s.rung.name) for s in soon.steps()] == [(0.0, "hot"), (pytest.approx(66.0), "cold")]
    flat = HybridHistogram(HOT, COLD)
    for minute in range(240):
        flat.seen(minute * 60.0)
    assert len(flat.steps()) == 2, "a flat histogram says nothing"


def _trace(folder: Path, rows: list[dict[str, str]]) -> None:
    folder.mkdir()
    with gzip.open(folder / "alibaba_genai_lora_requests.csv.gz", "wt", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_study_runs_on_a_file_and_names_what_is_wrong_with_one(tmp_path: Path) -> None:
    rng = random.Random(0)
    rows = [
        {
            "gmt_create": f"2024-11-{15 + int(day):02d} {int(day % 1 * 24):02d}:{rng.randrange(60):02d}:00",
            "checkpoint_model_version_id": f"M{i % 3}",
            "groupId": f"G{i % 7}",
            "exec_time_seconds": "20.0" if i % 5 else "",
        }
        for i in range(120)
        for day in [rng.uniform(0, 14)]
    ]
    _trace(tmp_path / "serverless", rows)
    out = StringIO()
    argv = ["study", "ladder", "--traces", str(tmp_path), "--seeds", "2", "--json"]
    try:
        call_command(*argv, stdout=out, stderr=StringIO())
    except SystemExit as ended:  # goals are set for the real trace
        assert ended.code == 1
    study = json.loads(out.getvalue())
    by_name = {row[0]: row for row in study["tables"][0]["rows"]}
    assert (
        by_name["always on"][1]["mean"] <= by_name["ladder"][1]["mean"] <= by_name["zero at once"][1]["mean"]
    )
    assert by_name["ladder"][4]["mean"] <= by_name["always on"][4]["mean"]
    bad = tmp_path / "bad"
    bad.mkdir()
    _trace(bad / "serverless", [{"gmt_create": "2024-11-15 00:00:00"}])
    with pytest.raises(CommandError, match="needs gmt_create, checkpoint_model_version_id"):
        call_command("study", "ladder", "--traces", str(bad), stderr=StringIO())


def test_simulate_compares_idle_policies_on_a_file_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    rows = [f"{i * 1800},10,100,{'ab'[i % 2]}" for i in range(60)]
    path.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens,tenant", *rows]) + "\n")
    out = StringIO()
    call_command("simulate", "--requests", str(path), "--idle", "--keep-alive-s", "60", "--json", stdout=out)
    found = json.loads(out.getvalue())["policies"]
    assert found["zero at once"]["late"] == found["keep-alive, tuned"]["late"] == 1.0
    assert found["always on"]["late"] == pytest.approx(0, abs=0.04)
    assert found["ladder"]["total_usd"] < min(
        found["always on"]["total_usd"], found["zero at once"]["total_usd"]
    )
    out = StringIO()
    call_command("simulate", "--requests", str(path), "--idle", stdout=out)
    assert "hybrid histogram" in out.getvalue()
    with pytest.raises(CommandError, match="absent"):
        call_command("simulate", "--requests", str(tmp_path / "absent.csv"), "--idle")
