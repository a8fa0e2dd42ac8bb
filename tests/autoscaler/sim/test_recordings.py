"""Recordings of spot markets of all kinds: what each becomes, odd ones of a kind, and how a wrong one is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from autoscaler.sim.market import MarketError
from autoscaler.sim.recordings import Reading, read_market, recordings, unlike

READING = Reading(lambda zone: 0.9, 16)
EVENTS = "t_ms,event,node\n0,add,a\n0,add,b\n150000,remove,a\n400000,add,c\n"
HISTORY = (
    "timestamp,az,instance_type,usd_per_hour\n"
    "2021-03-02T02:00:00Z,us-1b,p3,9.0\n2021-03-02T00:00:00Z,us-1a,p3,1.0\n2021-03-02T00:00:00Z,us-1b,p3,2.0\n"
    "2021-03-02T03:00:00Z,us-1a,p3,3.0\n2021-03-02T00:00:00Z,us-1a,p2,0.1\n"
)
BANDS = "region,instance_type,spot_savings_pct,interruption_band\nus-1,p3,70,4\nus-2,p3,50,0\nus-1,p2,60,1\n"


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_nodes_that_come_and_go_are_counted_and_a_dip_within_a_tick_is_seen(tmp_path: Path) -> None:
    (zone,) = read_market(write(tmp_path / "p3_events.csv", EVENTS), READING)
    assert (zone.name, zone.gap_s, zone.capacity) == ("p3_events", 60.0, (2, 2, 1, 1, 1, 1, 1))
    (counted,) = read_market(
        write(tmp_path / "c.csv", "t,instances\n0,8\n70,8\n70,2\n80,2\n80,8\n240,8\n"), READING
    )
    assert counted.capacity == (8, 2, 8, 8)


@pytest.mark.parametrize(
    ("text", "capacity"),
    [
        ("t,instances\n0.0,0\n0.05,9\n0.1,9\n", (0, 0, 0, 9, 9, 9)),  # hours
        ("t,instances\r\n120,4\r\n0,7\r\n240,4\r\n", (7, 7, 4, 4)),  # CRLF, not in order
        ("\ufefft,instances\n0,7\n", (7,)),  # a byte order mark, one row
        (
            "timestamp,instances\n2021-12-10T13:07:00,80\n2021-12-10T13:09:00,70\n2021-12-10T13:08:00,80\n",
            (80, 80),
        ),
    ],
)
def test_counts_of_odd_kinds(tmp_path: Path, text: str, capacity: tuple[int, ...]) -> None:
    (zone,) = read_market(write(tmp_path / "counts.csv", text), READING)
    assert zone.capacity == capacity
    packed = write(tmp_path / "packed.csv.gz", gzip.compress(text.encode()))
    assert read_market(packed, READING)[0].capacity == capacity
    misnamed = write(tmp_path / "misnamed.csv", gzip.compress(text.encode()))
    assert read_market(misnamed, READING)[0].capacity == capacity


def test_a_price_history_gives_machines_while_they_are_cheaper_than_on_demand(tmp_path: Path) -> None:
    path = write(tmp_path / "history.csv", HISTORY)
    a, b = read_market(path, Reading(lambda zone: 0.9, 4, on_demand_usd_per_h=5.0, instance="p3"))
    assert [z.name for z in (a, b)] == ["us-1a_p3", "us-1b_p3"]
    assert set(a.capacity) == {4} and a.usd_per_h == pytest.approx(1.0)
    assert b.capacity == (4,) * 12 + (0,) * 6 and b.usd_per_h == pytest.approx(2.0)
    with pytest.raises(MarketError, match=r"holds several types, name one with --instance; it has p2, p3"):
        read_market(path, READING)


def test_an_interruption_list_is_played_at_its_rates_by_the_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "advisor.csv", BANDS)
    at = Reading(lambda zone: 0.9, 2, 10.0, "p3")
    often, seldom = read_market(path, at)
    assert (often.usd_per_h, seldom.usd_per_h) == (pytest.approx(3.0), pytest.approx(5.0))
    assert often.end_s == 30 * 86400
    assert read_market(path, at)[0] == often
    n_often, n_seldom = (
        sum(
            len(read_market(path, Reading(lambda zone: 0.9, 2, 10.0, "p3", seed))[i].drops())
            for seed in range(60)
        )
        for i in (0, 1)
    )
    assert 8 <= n_often <= 28 and n_seldom <= 6, "0.29 and 0.025 losses a month, sixty times"


def test_a_folder_gives_what_tells_capacity_and_says_what_it_left(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        text = json.dumps({"metadata": {"gap_seconds": 60}, "data": [1, 0]})
        write(tmp_path / folder / "us-1a_v100_1.json.gz", gzip.compress(text.encode()))
    write(tmp_path / "p3_events.csv", EVENTS)
    write(tmp_path / "history.csv", HISTORY)
    write(tmp_path / "README.md", "#")
    files, left = recordings([tmp_path])
    assert [f.name for f in left] == ["history.csv"]
    zones = unlike([(f, zone) for f in files for zone in read_market(f, READING)])
    assert sorted(z.name for z in zones) == ["p3_events", "us-1a_v100_1 (one)", "us-1a_v100_1 (two)"]
    with pytest.raises(MarketError, match="recorded twice"):
        unlike([(files[0], zones[0]), (files[0], zones[0])])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.csv",
            "region,usd_per_hour\nx,1\n",
            r"a\.csv: is no recording.*goes to --prices; this has region",
        ),
        ("b.csv", "t,instances\n0,x\n", r"b\.csv, line 2: instances = 'x'"),
        ("c.csv", "t,instances\n-5,1\n", r"c\.csv, line 2: t = '-5'"),
        ("d.csv", "t,instances\n", r"d\.csv: has no rows"),
        ("e.csv", "", r"e\.csv: is no recording.*this has none"),
        ("f.csv", "t,instances\n0,1\n1e12,1\n", r"f\.csv: spans .* days, more than"),
        ("g.csv", EVENTS + "500000,remove,z\n", r"g\.csv, line 6: z goes but never came"),
        ("h.csv", EVENTS + "500000,add,b\n", r"h\.csv, line 6: b comes but is there already"),
        ("i.csv", EVENTS + "500000,dies,b\n", r"i\.csv, line 6: event = 'dies'"),
        ("j.csv", "timestamp,instances\nyesterday,4\n", r"j\.csv, line 2: timestamp = 'yesterday'"),
        ("k.csv", BANDS.replace(",4\n", ",9\n"), r"k\.csv, line 2: interruption_band = 9: give 0 to 4"),
        (
            "l.csv",
            BANDS.replace("p3", "g5"),
            r"l\.csv: holds several types, 'p3' is not in it; it has g5, p2",
        ),
        ("m.csv", b"\xff\xfe\x00\x01", r"m\.csv: is no text"),
        ("n.json", "{}", r"n\.json: needs metadata\.gap_seconds"),
        ("o.json.gz", "no gzip", r"o\.json\.gz: is cut off or not gzipped"),
    ],
)
def test_what_is_no_recording_is_named(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    with pytest.raises(MarketError, match=said):
        read_market(write(tmp_path / name, text), Reading(lambda zone: 0.9, 2, 10.0, "p3"))
