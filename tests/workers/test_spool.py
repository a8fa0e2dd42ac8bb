"""The disk spool: what survives, what is forgotten, what it costs in space."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.spool import Record, Spool, SpoolBusy

EVENT = b"E" * 300


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "r1.spool"


def ids(spool: Spool) -> list[str]:
    return [record.request_id for record in spool.pending()]


def test_records_survive_and_keep_their_state(path: Path) -> None:
    spool = Spool(path, max_bytes=10_000)
    for name in ("a", "b", "c"):
        spool.begin(name, 7, EVENT)
    spool.confirm("b")
    assert spool.forget(["c", "unknown"]) == 1
    spool.close()
    again = Spool(path, max_bytes=10_000)
    assert [(r.request_id, r.epoch, r.confirmed, r.event) for r in again.pending()] == [
        ("a", 7, False, EVENT),
        ("b", 7, True, EVENT),
    ]


def test_process_killed_right_after_writing_out_loses_nothing(path: Path) -> None:
    code = (
        "import sys, pathlib, os, signal; from workers.spool import Spool\n"
        f"s = Spool(pathlib.Path({str(path)!r}), max_bytes=10_000)\n"
        "s.begin('a', 1, b'E'); s.write_out(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = subprocess.run([sys.executable, "-c", code], check=False)
    assert process.returncode == -signal.SIGKILL
    assert ids(Spool(path, max_bytes=10_000)) == ["a"]


@pytest.mark.parametrize("n_lost", [1, 5, 200])
def test_torn_tail_is_cut_and_writing_goes_on(path: Path, n_lost: int) -> None:
    spool = Spool(path, max_bytes=10_000)
    spool.begin("a", 1, EVENT)
    spool.begin("b", 1, EVENT)
    spool.close()
    os.truncate(path, path.stat().st_size - n_lost)
    again = Spool(path, max_bytes=10_000)
    assert ids(again) == ["a"]
    again.begin("c", 1, EVENT)
    again.close()
    assert ids(Spool(path, max_bytes=10_000)) == ["a", "c"]


def test_flipped_bit_is_noticed(path: Path) -> None:
    spool = Spool(path, max_bytes=10_000)
    spool.begin("a", 1, EVENT)
    spool.begin("b", 1, EVENT)
    spool.close()
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert ids(Spool(path, max_bytes=10_000)) == ["a"]


def test_file_has_one_owner(path: Path) -> None:
    spool = Spool(path, max_bytes=10_000)
    with pytest.raises(SpoolBusy):
        Spool(path, max_bytes=10_000)
    spool.close()
    Spool(path, max_bytes=10_000).close()


def test_forgotten_records_give_their_space_back(path: Path) -> None:
    spool = Spool(path, max_bytes=1 << 20)
    spool.begin("kept", 1, EVENT)
    spool.confirm("kept")
    for i in range(20_000):
        spool.begin(str(i), 1, EVENT)
        spool.confirm(str(i))
        spool.forget([str(i)])
    assert path.stat().st_size < 2 << 20
    with pytest.raises(SpoolBusy):  # still ours after having been rewritten
        Spool(path, max_bytes=1 << 20)
    spool.close()
    [record] = Spool(path, max_bytes=1 << 20).pending()
    assert (record.request_id, record.confirmed) == ("kept", True)


def test_what_gathers_is_written_at_once_and_does_not_gather_without_bound(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(path, max_bytes=1 << 20)
    writes: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(len(data)) or write(fd, data))
    for name in ("a", "b", "c"):
        spool.begin(name, 1, EVENT)
    spool.confirm("a")
    spool.forget(["b"])
    assert writes == [] and path.stat().st_size == 0
    spool.write_out()
    spool.write_out()
    assert len(writes) == 1
    for i in range(1024):
        spool.begin(f"more{i}", 1, EVENT)
    assert len(writes) == 2
    spool.close()
    assert len(Spool(path, max_bytes=1 << 20)) == 2 + 1024


def test_full_until_something_is_forgotten(path: Path) -> None:
    spool = Spool(path, max_bytes=900)
    for name in ("a", "b", "c"):
        assert not spool.full
        spool.begin(name, 1, EVENT)
    assert spool.full
    spool.begin("d", 1, EVENT)  # what runs may still end
    spool.forget(["a", "b"])
    assert not spool.full
    spool.close()
    assert not Spool(path, max_bytes=900).full


def test_disk_that_refuses_is_remembered_and_repaired(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(path, max_bytes=10_000)
    spool.begin("a", 1, EVENT)
    write = os.write
    with monkeypatch.context() as patch:

        def half(fd: int, data: bytes) -> int:
            return write(fd, data[: len(data) // 2])

        patch.setattr(os, "write", half)
        spool.begin("b", 1, EVENT)
        spool.write_out()
        assert spool.failed and spool.full
        spool.repair()
        assert spool.failed
    spool.repair()
    assert not spool.failed and not spool.full
    spool.begin("c", 1, EVENT)
    spool.close()
    assert ids(Spool(path, max_bytes=10_000)) == ["a", "b", "c"]


def test_due_records_come_back_at_growing_intervals(path: Path) -> None:
    clock = Clock()
    spool = Spool(path, max_bytes=10_000, republish_after_s=10, republish_max_s=30, now_s=clock)
    spool.begin("a", 1, EVENT)
    due_at = []
    for second in range(120):
        clock.now_s = second
        if spool.due(10):
            due_at.append(second)
    assert due_at == [10, 30, 60, 90]


def test_due_is_bounded(path: Path) -> None:
    clock = Clock()
    spool = Spool(path, max_bytes=10_000, now_s=clock)
    for i in range(5):
        spool.begin(str(i), 1, EVENT)
    clock.now_s = 11
    first: list[Record] = spool.due(3)
    assert len(first) == 3 and len(spool.due(3)) == 2 and spool.due(3) == []


def test_empty_file_is_removed_on_close(path: Path) -> None:
    spool = Spool(path, max_bytes=10_000)
    spool.begin("a", 1, EVENT)
    spool.forget(["a"])
    spool.close(delete_if_empty=True)
    assert not path.exists()
