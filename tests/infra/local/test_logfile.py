"""Log files: bounded while held open, and followed through it all."""

import os
from pathlib import Path

from infra.local.logfile import bound_log, follow, log_tail


def test_file_over_its_bound_moves_aside_and_its_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "web.log"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as writer:
        print("old", file=writer, flush=True)
        bound_log(path, max_bytes=3)
        print("new", file=writer, flush=True)
    assert path.read_text() == "new\n"
    assert (tmp_path / "web.log.1").read_text() == "old\n"
    assert (tmp_path / "web.log.1").stat().st_mode & 0o777 == 0o600


def test_file_within_its_bound_and_missing_file_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("kept\n")
    bound_log(tmp_path / "a.log", max_bytes=5)
    bound_log(tmp_path / "missing.log")
    assert (tmp_path / "a.log").read_text() == "kept\n"
    assert log_tail(tmp_path / "missing.log") == ""


def test_follow_shows_the_end_then_what_comes_also_after_the_file_is_emptied(tmp_path: Path) -> None:
    a, b = tmp_path / "a.log", tmp_path / "b.log"
    a.write_text("1\n2\n3\n")
    steps = iter(
        [
            lambda: a.open("a").write("4\nhal"),
            lambda: a.open("a").write("f\n"),
            lambda: b.write_text("first of b\n"),
            lambda: a.write_text("5\n"),
            lambda: None,
        ]
    )

    def stop() -> bool:
        step = next(steps, None)
        if step:
            step()
        return step is None

    lines = list(follow({"a": a, "b": b}, n_lines=2, stop=stop))
    assert lines == [("a", "2"), ("a", "3"), ("a", "4"), ("a", "half"), ("b", "first of b"), ("a", "5")]
