"""`manage.py simulate`: equal seeds give equal results, refusals name the option, a market is lived through."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError


@pytest.fixture
def requests_file(tmp_path: Path) -> Path:
    path = tmp_path / "requests.csv"
    rows = [f"{n * 0.5},{100 + n % 7 * 50},{20 + n % 5 * 30}" for n in range(600)]
    path.write_text("arrival_s,context_tokens,generated_tokens\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def zone_files(tmp_path: Path) -> Path:
    folder = tmp_path / "zones"
    folder.mkdir()
    for name, data in (("a_v100_1", [1] * 5 + [0] * 7), ("b_v100_1", [0] * 3 + [1] * 9)):
        (folder / f"{name}.json").write_text(json.dumps({"metadata": {"gap_seconds": 60}, "data": data}))
    return folder


def simulate(*args: Any) -> dict[str, Any]:
    out = io.StringIO()
    call_command("simulate", *map(str, args), "--json", stdout=out, stderr=io.StringIO())
    found: dict[str, Any] = json.loads(out.getvalue())
    return found


def timeless(report: dict[str, Any]) -> list[Any]:
    return [
        {k: v for k, v in run.items() if "cpu" not in k}
        for runs in report["policies"].values()
        for run in runs
    ]


def test_every_policy_serves_every_request_and_repeats_itself(requests_file: Path) -> None:
    args = ("--requests", requests_file, "--policy", "all", "--replicas", 2)
    report = simulate(*args)
    assert {"corral", "fcfs", "round-robin", "shortest-predicted"} <= set(report["policies"])
    assert all(
        run["n_requests"] == 600 and run["n_checks"] > 600
        for runs in report["policies"].values()
        for run in runs
    )
    assert timeless(report) == timeless(simulate(*args))


def test_a_market_is_paid_and_its_losses_are_served_again(requests_file: Path, zone_files: Path) -> None:
    market = ("--spot", zone_files, "--boot-s", 20, "--notice-s", 20, "--hours", 0.2)
    args = ("--requests", requests_file, *market)
    report = simulate(*args, "--policy", "corral,on-demand,any-zone", "--oracle")
    for name, (least,) in report["oracle_usd"].items():
        assert 0 < least <= report["policies"][name][0]["usd"]
    runs = {name: found[0] for name, found in report["policies"].items()}
    assert all(run["n_requests"] == 600 for run in runs.values())
    assert runs["corral"]["usd"] < runs["on-demand"]["usd"]
    assert runs["any-zone"]["n_lost_machines"] >= 1
    assert "2 zones" in report["assumptions"]["market"]


def test_a_reserve_of_stopped_machines_is_told_and_paid(requests_file: Path, zone_files: Path) -> None:
    market = (
        "--requests",
        requests_file,
        "--spot",
        zone_files,
        "--hours",
        0.2,
        "--boot-s",
        60,
        "--notice-s",
        20,
    )
    quick = simulate(*market, "--policy", "corral", "--reserve", 8, "--resume-s", 20)
    assert "8 stopped on-demand machines, 0.011 USD/h each" in quick["assumptions"]["reserve"]
    assert quick["policies"]["corral"][0]["n_requests"] == 600
    # As slow as a start they change nothing but the bill: all of them lie there at times, never more.
    without = simulate(*market, "--policy", "on-demand")
    slow = simulate(*market, "--policy", "on-demand", "--reserve", 8, "--resume-s", 60, "--stopped-usd", 1)
    assert "reserve" not in without["assumptions"]
    plain, kept = (r["policies"]["on-demand"][0]["usd"] for r in (without, slow))
    assert 0 < kept - plain < 8 * 0.2


def test_prices_of_a_list_and_a_page_of_charts(requests_file: Path, zone_files: Path, tmp_path: Path) -> None:
    prices = tmp_path / "prices.csv"
    prices.write_text("instance_type,az,on_demand_usd_per_hour,spot_usd_per_hour\np3,a,7,2\np3,b,7,4\n")
    args = ("--requests", requests_file, "--spot", zone_files, "--hours", 0.2, "--prices", prices)
    report = simulate(*args, "--instance", "p3", "--policy", "on-demand", "--report", tmp_path / "page")
    assert "spot 2 to 4, on-demand 7 USD/h" in report["assumptions"]["market"]
    assert "Replicas against demand" in (tmp_path / "page" / "index.html").read_text()
    with pytest.raises(CommandError, match="--instance"):
        simulate(*args)
    with pytest.raises(CommandError, match="no price of 'p9'; it lists p3"):
        simulate(*args, "--instance", "p9")
    with pytest.raises(CommandError, match="--report"):
        simulate(*args, "--instance", "p3", "--report", prices)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--requests or --rates"),
        (("--requests", "FILE", "--policy", "best"), "'best' is unknown; known: corral"),
        (("--requests", "FILE", "--policy", "hpa"), "--spot"),
        (("--requests", "FILE", "--oracle"), "--oracle: bounds what a market costs"),
        (("--requests", "FILE", "--model", "llama-3.1-70b"), "does not fit"),
        (("--requests", "FILE", "--start-h", "9"), "no request"),
        (("--requests", "nowhere.csv"), "No such file"),
        (("--rates", "FILE"), "--lengths: no requests.csv beside|lacks the columns"),
        (("--requests", "FILE", "--replicas", "0"), "--replicas = 0: must be at least 1"),
        (("--requests", "FILE", "--slots", "-3"), "--slots = -3: must be at least 0"),
        (("--requests", "FILE", "--keep", "nan"), "--keep = nan: must be above 0 and at most 1"),
        (("--requests", "FILE", "--itl-s", "0"), "--itl-s = 0: must be above 0"),
        (("--requests", "FILE", "--boot-s", "-5"), "--boot-s = -5: must be at least 0 and at most 3600"),
    ],
)
def test_refusals_name_the_option(requests_file: Path, args: tuple[str, ...], said: str) -> None:
    with pytest.raises(CommandError, match=said):
        simulate(*(requests_file if arg == "FILE" else arg for arg in args))
