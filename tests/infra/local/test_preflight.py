"""Preflight: findings from made-up machines, and the script on the real one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.local.preflight import GIB, Facts, Finding, engine_verdict, gather, judge, render

SCRIPT = Path(__file__).resolve().parents[3] / "infra" / "local" / "preflight.py"
GOOD = Facts(
    python=(3, 11, 7),
    venv_python=(),
    has_uv=False,
    can_make_venv=True,
    system="Linux",
    machine="x86_64",
    libc="glibc",
    libc_version=(2, 36),
    n_cpus=2,
    cpu_flags=frozenset({"avx2", "avx512f", "avx512_bf16"}),
    memory=8 * GIB,
    memory_available=7 * GIB,
    disk_free=20 * GIB,
    disk_path="/srv",
    installed=False,
    engine_installed=False,
    n_packages=190,
    model_made=False,
    ports_in_use=(),
    stack_runs=False,
    is_root=False,
    has_nobody=True,
    engine="",
)


def finding(what: str, **changes: object) -> Finding:
    return next(found for found in judge(GOOD._replace(**changes)) if found.what == what)


def test_good_machine_has_nothing_to_say() -> None:
    assert {found.level for found in judge(GOOD)} == {"ok"}
    assert all(not found.remedy for found in judge(GOOD))


@pytest.mark.parametrize(
    ("changes", "what", "level", "words"),
    [
        ({"python": (3, 13, 0)}, "Python", "warn", "uv fetches it"),
        ({"python": (3, 7, 1)}, "Python", "error", "install Python 3.8 or newer, or uv"),
        ({"python": (3, 7, 1), "has_uv": True}, "Python", "warn", "uv fetches it"),
        ({"python": (3, 11, 2), "can_make_venv": False}, "Python", "error", "python3-venv"),
        ({"python": (3, 13, 0), "venv_python": (3, 11, 9)}, "Python", "ok", ""),
        ({"venv_python": (3, 12, 1)}, "Python", "error", "make clean"),
        ({"system": "Darwin"}, "System", "error", "container"),
        ({"libc": ""}, "System", "error", "glibc"),
        ({"libc_version": (2, 17)}, "System", "error", "2.28"),
        ({"machine": "aarch64", "cpu_flags": frozenset({"asimd"})}, "System", "warn", "make lock"),
        ({"is_root": True}, "User", "ok", ""),
        ({"is_root": True, "has_nobody": False}, "User", "error", "ordinary user"),
        ({"n_cpus": 1}, "Processor", "warn", "slowly"),
        ({"cpu_flags": frozenset({"avx2"})}, "Processor", "warn", "AVX-512"),
        ({"memory": GIB}, "Memory", "error", "1.5 GiB"),
        ({"memory_available": 2 * GIB}, "Memory", "warn", "3 GiB"),
        ({"memory_available": 2 * GIB, "stack_runs": True}, "Memory", "ok", ""),
        ({"disk_free": 5 * GIB}, "Disk", "error", "6 GiB needed"),
        ({"disk_free": 5 * GIB, "installed": True}, "Disk", "ok", ""),
        ({"disk_free": GIB // 2, "installed": True}, "Disk", "error", "1 GiB needed"),
        ({"ports_in_use": (("gateway", 8000),)}, "Ports", "warn", "another free port"),
        ({"cpu_flags": frozenset({"sse4_2"})}, "Engine", "warn", "toy engine"),
        ({"memory": 3 * GIB}, "Engine", "warn", "toy engine"),
        ({"machine": "riscv64"}, "Engine", "warn", "toy engine"),
        ({"installed": True}, "Engine", "warn", "make install"),
        ({"installed": True, "engine_installed": True}, "Engine", "ok", ""),
        ({"memory": 3 * GIB, "engine": "toy"}, "Engine", "ok", ""),
    ],
)
def test_what_is_wrong_comes_with_a_remedy(
    changes: dict[str, object], what: str, level: str, words: str
) -> None:
    found = finding(what, **changes)
    assert (found.level, bool(found.remedy)) == (level, level != "ok")
    assert words in found.remedy


def test_what_will_be_fetched_is_said_before() -> None:
    assert finding("To fetch").value.startswith("190 packages from your index, about 1.2 GB")
    assert finding("To fetch", installed=True).value == "nothing: packages are installed"


def test_four_gigabyte_machine_runs_the_engine() -> None:
    assert engine_verdict(GOOD._replace(memory=int(3.83 * GIB))) == (True, "")
    assert engine_verdict(GOOD._replace(machine="aarch64", cpu_flags=frozenset())) == (True, "")


def test_ports_remembered_from_last_time_are_the_ones_looked_at(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (tmp_path / "ports.json").write_text(json.dumps({"gateway": port}))
        assert ("gateway", port) in gather({"CORRAL_VAR": str(tmp_path)}).ports_in_use


def test_remedy_stands_below_its_finding() -> None:
    text = render([Finding("error", "Disk", "1 GiB free", "free some")], 0.25, colour=False)
    assert text.splitlines() == [
        "Preflight (0.2 s)",
        "  error  Disk       1 GiB free",
        "                    -> free some",
    ]


def test_script_runs_alone_and_knows_the_machine() -> None:
    ran = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "--json"],
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
    )
    report = json.loads(ran.stdout)
    assert ran.returncode == (0 if report["ok"] else 1)
    assert report["elapsed_s"] > 0
    assert {"Python", "System", "Processor", "Memory", "Disk", "To fetch", "Engine"} <= {
        f["what"] for f in report["findings"]
    }


def test_older_pythons_can_read_it() -> None:
    older = next(filter(None, map(shutil.which, ("python3.8", "python3.9", "python3.10"))), None)
    if older and subprocess.run([older, "--version"], capture_output=True, timeout=10).returncode == 0:
        ran = subprocess.run(
            [older, str(SCRIPT), "--json"], cwd="/", capture_output=True, text=True, timeout=30
        )
        assert "findings" in json.loads(ran.stdout)
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 7))
