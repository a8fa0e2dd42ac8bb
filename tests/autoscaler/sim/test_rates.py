"""Rates as arrivals: moments, thinning, lengths, what is refused."""

from __future__ import annotations

import itertools
import random
import statistics
from pathlib import Path

import pytest

from autoscaler.sim.rates import Lengths, Rate, arrivals, read_lengths, read_rates
from autoscaler.sim.workload import Arrival, WorkloadError

QUANTILES = "p0,p1,p5,p10,p20,p25,p30,p40,p50,p60,p70,p75,p80,p90,p95,p99,p99.9,p100"
STAIRS = tuple(float(10 * i + 10) for i in range(18))
FLAT = Lengths({("0", field): [(0.0, STAIRS)] for field in ("input_tokens", "output_tokens")})


def rate(rps: float, cv: float, hours: int = 40) -> list[Rate]:
    return [Rate("0", 600.0 * n, rps, cv) for n in range(6 * hours)]


def made(rps: float, cv: float, keep: float, seed: int = 1) -> list[Arrival]:
    return list(arrivals(rate(rps, cv), FLAT, keep=keep, seed=seed))


@pytest.mark.parametrize(("cv", "keep"), [(0.5, 1.0), (1.0, 1.0), (2.0, 1.0), (3.0, 0.1), (3.0, 0.01)])
def test_rate_and_burstiness_are_those_of_the_thinned_recording(cv: float, keep: float) -> None:
    times = [a.at_s for a in made(2.0 / keep / 10, cv, keep)]
    assert len(times) / (40 * 3600) == pytest.approx(0.2, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    scv = statistics.pvariance(gaps) / statistics.mean(gaps) ** 2
    assert scv == pytest.approx(keep * cv**2 + 1 - keep, rel=0.15)


def test_arrivals_are_ordered_repeatable_and_within_their_span() -> None:
    one = list(arrivals(rate(1, 2), FLAT, keep=0.5, seed=7, start_s=1000, until_s=5000))
    assert one == list(arrivals(rate(1, 2), FLAT, keep=0.5, seed=7, start_s=1000, until_s=5000))
    assert one != list(arrivals(rate(1, 2), FLAT, keep=0.5, seed=8, start_s=1000, until_s=5000))
    assert [a.at_s for a in one] == sorted(a.at_s for a in one)
    assert one[0].at_s >= 0 and one[-1].at_s < 4000


def test_lengths_follow_the_recorded_quantiles_and_strangers_borrow() -> None:
    chance = random.Random(3)
    drawn = sorted(FLAT.draw("0", 0.0, chance)[0] for _ in range(20_000))
    assert (drawn[0] >= 10, drawn[-1] <= 180) == (True, True)
    assert drawn[len(drawn) // 2] == pytest.approx(90, abs=4)  # p50
    assert drawn[len(drawn) * 9 // 10] == pytest.approx(140, abs=4)  # p90
    assert FLAT.draw("unknown", 0.0, random.Random(1)) == FLAT.draw("0", 0.0, random.Random(1))


def test_prompts_of_a_multimodal_service_are_text_and_images_together(tmp_path: Path) -> None:
    path, flat = tmp_path / "mm_lengths.csv", ",".join(["10"] * 18)
    rows = [
        f"0,0,{field},10,{flat}" for field in ("text_tokens", "image_tokens", "image_count", "output_tokens")
    ]
    rows.append(f"1,0,text_tokens,10,{flat}")  # no answers: it borrows
    path.write_text("\n".join([f"client,t_start_s,field,mean,{QUANTILES}", *rows]) + "\n")
    lengths = read_lengths(path)
    for client in ("0", "1"):
        assert lengths.draw(client, 0.0, random.Random(1)) == (20, 10)


def test_files_are_read_and_what_cannot_be_is_named(tmp_path: Path) -> None:
    rates = tmp_path / "rates.csv"
    rates.write_text(
        "client,t_start_s,rate_rps,iat_cv,iat_dist,param1,param2\n3,600,0.5,2.2,Gamma,1,1\n3,0,1.5,1,Gamma,1,1\n"
    )
    assert read_rates(rates) == [Rate("3", 0.0, 1.5, 1.0), Rate("3", 600.0, 0.5, 2.2)]
    rates.write_text("client,t_start_s,rate_rps,iat_cv\n3,0,-1,1\n")
    with pytest.raises(WorkloadError, match="line 2"):
        read_rates(rates)
    lengths = tmp_path / "lengths.csv"
    lengths.write_text(f"client,t_start_s,field,mean,{QUANTILES}\n")
    with pytest.raises(WorkloadError, match="needs rows with field output_tokens"):
        read_lengths(lengths).draw("3", 0.0, random.Random(1))
    lengths.write_text("client,field\n")
    with pytest.raises(WorkloadError, match="lacks the columns t_start_s"):
        read_lengths(lengths)
