"""Price lists of every kind are read by their columns; what is none, or lacks the machine, is named."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from autoscaler.sim.prices import PriceError, Prices, read_prices

BY_ZONE = """instance_type,gpu,gpu_count,region,az_id,on_demand_usd_per_hour,spot_usd_per_hour
p4d,A100,8,use,use1-az1,20,8
p4d,A100,8,use,use1-az2,20,10
p5,H100,8,use,use1-az1,,30
"""
CHANGES = "date,instance_type,usd_per_hour\n2022-06-22,p4d,32.77\n2025-06-01,p4d,21.96\n2025-06-01,p5,\n"
HISTORY = "timestamp,az,instance_type,usd_per_hour\nt1,us-east-1a,p3,0.9\nt2,us-east-1a,p3,1.1\nt1,us-east-1f,p3,0.5\n"
MARKET = "timestamp,gpu,min,median,max\n2025-10-19,H100,1,2,3\n2025-10-20,H100,1,2.5,3\n"


@pytest.mark.parametrize(
    ("text", "name", "found"),
    [
        (BY_ZONE, "p4d", Prices(20.0, 9.0, {"use1-az1": 8.0, "use1-az2": 10.0})),
        (BY_ZONE, "p5", Prices(None, 30.0, {"use1-az1": 30.0})),
        (CHANGES, "p4d", Prices(21.96, None)),
        (HISTORY, "p3", Prices(None, 0.75, {"us-east-1a": 1.0, "us-east-1f": 0.5})),
        (MARKET, "H100", Prices(5.0, None)),
    ],
)
def test_lists_are_told_by_their_columns(tmp_path: Path, text: str, name: str, found: Prices) -> None:
    path = tmp_path / "prices.csv.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert read_prices(path, name, 2 if name == "H100" else 1) == found


def test_a_zone_takes_the_price_of_its_name_or_the_middle_one() -> None:
    prices = Prices(3.0, 0.75, {"us-east-1a": 1.0, "us-east-1f": 0.5})
    assert prices.spot_in("us-east-1f_v100_1") == 0.5
    assert prices.spot_in("us-west-2b_v100_1") == 0.75


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "needs a column instance_type or gpu"),
        (CHANGES, "no price of 'g5'; it lists p4d, p5"),
        ("instance_type,usd_per_hour\ng5,cheap\n", "line 2: usd_per_hour = 'cheap'"),
        ("instance_type,usd_per_hour\ng5,-1\n", "line 2"),
    ],
)
def test_what_is_no_price_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "prices.csv"
    path.write_text(text)
    with pytest.raises(PriceError, match=said):
        read_prices(path, "g5")


def test_of_a_gpu_the_machine_with_as_many_is_meant(tmp_path: Path) -> None:
    path = tmp_path / "gpus.csv"
    path.write_text(
        "instance_type,gpu,gpu_count,region,on_demand_usd_per_hour,spot_usd_per_hour\n"
        "1B,B200,1,fin,5,2\n8B,B200,8,fin,40,16\n"
    )
    assert (read_prices(path, "B200", 8).on_demand, read_prices(path, "B200").spot) == (40.0, 2.0)
    assert read_prices(path, "8B").on_demand == 40.0, "by its name, whatever it has"
    with pytest.raises(PriceError, match=r"no machine with 4 B200; --tp may be 1, 8"):
        read_prices(path, "B200", 4)
