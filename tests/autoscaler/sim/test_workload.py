"""Request files as jobs: the formats, what is refused and how it is said, thinning."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from autoscaler.sim.workload import Arrival, WorkloadError, jobs, read_requests, thin

ROW = '{"timestamp": 1, "input_length": 5, "output_length": 3}'
CSV = "arrival_s,context_tokens,generated_tokens\n46.5,374,44\n47.0,396,0\n50.25,12,9\n"


def test_a_csv_starts_at_zero_and_counts_an_empty_answer_as_one_token(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text(CSV)
    assert list(read_requests(path)) == [Arrival(0.0, 374, 44), Arrival(0.5, 396, 1), Arrival(3.75, 12, 9)]
    assert [a.at_s for a in read_requests(path, start_s=0.4, until_s=3.0)] == [0.5]


def test_tenants_and_other_column_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "tenants.csv.gz"
    path.write_bytes(gzip.compress(b"arrival_s,tenant,prompt_tokens,output_tokens\n1,7,10,20\n"))
    assert list(read_requests(path)) == [Arrival(0.0, 10, 20, "7")]


def test_json_lines_bring_prefix_blocks(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_requests(path)) == [Arrival(0.0, 6955, 52, prefix=(46, 47))]


@pytest.mark.parametrize(
    "text",
    [
        CSV.replace("\n", "\r\n"),
        "\ufeff" + CSV,
        CSV.replace("47.0,396,0\n", "").replace("50.25,12,9\n", "50.25,12,9\n\n47.0,396,0\n\n"),
        gzip.compress(CSV.encode(), mtime=0),  # a name that lies
    ],
)
def test_other_ends_of_lines_marks_order_and_packing_change_nothing(
    tmp_path: Path, text: str | bytes
) -> None:
    (tmp_path / "requests.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = list(read_requests(tmp_path / "requests.csv"))
    assert found == [Arrival(0.0, 374, 44), Arrival(0.5, 396, 1), Arrival(3.75, 12, 9)]


def test_empty_lines_equal_instants_and_huge_gaps_are_taken_and_order_has_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [ROW, "", ROW.replace("5", "6"), ROW.replace(": 1,", ": 900000000,"), "  "]
    path.write_text("\n".join(rows) + "\r\n")
    assert [(a.at_s, a.n_prompt) for a in read_requests(path)] == [(0.0, 5), (0.0, 6), (899_999.999, 5)]
    monkeypatch.setattr("autoscaler.sim.workload._OUT_OF_ORDER", 2)
    path.write_text("\n".join(ROW.replace(": 1,", f": {t},") for t in (5, 6, 7, 8, 1)))
    with pytest.raises(
        WorkloadError, match=r"trace\.jsonl, request 5: came 0\.005 s before .* sort the file"
    ):
        list(read_requests(path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "time,tokens\n1,2\n", "needs columns arrival_s"),
        ("b.csv", CSV + "51,x,1\n", r"b\.csv, line 5: context_tokens = 'x': give a finite number"),
        ("c.csv", CSV + "nan,1,1\n", r"line 5: arrival_s = 'nan'"),
        ("c2.csv", CSV + "51,1\n", r"line 5: generated_tokens = None"),
        ("c3.csv", CSV + "51,1,-4\n", r"line 5: generated_tokens = '-4'"),
        ("c4.csv", "arrival_s,context_tokens,generated_tokens\n", r"c4\.csv: has no request"),
        ("d.jsonl", '{"timestamp": 1}\n', r"d\.jsonl, line 1: lacks input_length, output_length"),
        ("e.jsonl", "{\n", r"e\.jsonl, line 1: is no JSON"),
        ("f.jsonl", "[1]\n", r"f\.jsonl, line 1: needs an object"),
        ("g.jsonl", ROW.replace("5", "-5") + "\n", "input_length = -5"),
        ("h.jsonl", ROW.replace("}", ', "hash_ids": 7}') + "\n", "hash_ids: give a list"),
        ("i.csv.gz", "no gzip", r"i\.csv\.gz: is cut off or not gzipped"),
        ("j.csv.gz", gzip.compress(CSV.encode(), mtime=0)[:-12], r"j\.csv\.gz: is cut off or not gzipped"),
        ("k.csv", b"\xff\xfe\x00", r"k\.csv: is no text in UTF-8"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, text: str | bytes, said: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(WorkloadError, match=said):
        list(read_requests(tmp_path / name))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="No such file"):
        list(read_requests(tmp_path / "none.csv"))


def test_thinning_keeps_the_share_and_whole_conversations() -> None:
    """All begin with one system prompt; conversations differ from the second block on."""
    arrivals = [Arrival(float(n), 1, 1, prefix=(-1, n % 500, n)) for n in range(20_000)]
    kept = list(thin(iter(arrivals), 0.25, seed=3))
    assert 0.2 < len(kept) / len(arrivals) < 0.3
    roots = {a.prefix[1] for a in kept}
    assert len(kept) == sum(1 for a in arrivals if a.prefix[1] in roots)
    assert kept == list(thin(iter(arrivals), 0.25, seed=3))
    assert kept != list(thin(iter(arrivals), 0.25, seed=4))


def test_jobs_arrive_in_order_and_faster_when_asked() -> None:
    made = list(jobs(iter([Arrival(2.0, 1, 1), Arrival(1.0, 1, 1)]), speed=2.0))
    assert [job.arrived_s for job in made] == [1.0, 1.0]


def test_predictions_and_priorities_of_a_file_reach_its_jobs(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens,predicted_tokens,priority\n0,5,7,30,2\n1,5,7,,\n")
    first, second = jobs(read_requests(path))
    assert (first.n_predicted, first.band) == (30, 2)
    assert (second.n_predicted, second.band) == (7, 0)
    with path.open("a") as file:
        file.write("2,5,7,-1,0\n")
    with pytest.raises(WorkloadError, match="line 4"):
        list(read_requests(path))
