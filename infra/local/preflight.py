"""Is this machine fit for Corral? Answers in well under 3 s and downloads nothing.

`make up` runs this file with whatever Python the machine has, before any environment exists, so it imports
the standard library only and keeps to Python 3.6 syntax. `gather` looks at the machine, `judge` (pure) says
what it means. stack.py asks `engine_verdict` whether the real engine can run: importing it takes seconds.
"""
# ruff: noqa: UP006, UP035, UP045  (older Pythons must be able to read this file)

import argparse
import importlib.util
import json
import os
import platform
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Tuple

ROOT = Path(__file__).resolve().parent.parent.parent
GIB = 1 << 30

WANTED_PYTHON = (3, 11)
BOOTSTRAP_PYTHON = (3, 8)  # the oldest that can install uv, which then fetches 3.11
WANTED_GLIBC = (2, 28)  # the wheels are manylinux_2_28
# Measured 2026-11: packages 4.0 GB on disk with bytecode (1.2 GB compressed), demo model 0.3 GB, then growth.
DISK_FIRST_GIB = 6.0
DISK_LATER_GIB = 1.0
DOWNLOAD_GB = 1.2
MEMORY_ENGINE_GIB = 4.0  # engine processes about 2 GB, servers and control plane about 1 GB
MEMORY_LEAST_GIB = 1.5
PORTS = {"gateway": 8000, "console": 8080}


class Facts(NamedTuple):
    """What was found. Sizes in bytes; `cpu_flags` as in /proc/cpuinfo; versions as numbers, () = unknown."""

    python: Tuple[int, ...]
    venv_python: Tuple[int, ...]
    has_uv: bool
    can_make_venv: bool
    system: str
    machine: str
    libc: str
    libc_version: Tuple[int, ...]
    n_cpus: int
    cpu_flags: FrozenSet[str]
    memory: int
    memory_available: int
    disk_free: int
    disk_path: str
    installed: bool
    engine_installed: bool
    n_packages: int
    model_made: bool
    ports_in_use: Tuple[Tuple[str, int], ...]
    stack_runs: bool
    is_root: bool
    has_nobody: bool
    engine: str


class Finding(NamedTuple):
    """`level` is ok, warn (works, less well) or error (will not work); `remedy` empty when none is needed."""

    level: str
    what: str
    value: str
    remedy: str = ""


def judge(facts: Facts) -> List[Finding]:
    """Findings in reading order. Pure."""
    return [
        _python(facts),
        _system(facts),
        *_root(facts),
        _cpu(facts),
        _memory(facts),
        _disk(facts),
        *_ports(facts),
        _fetch(facts),
        _engine(facts),
    ]


def engine_verdict(facts: Facts) -> Tuple[bool, str]:
    """Whether the real engine can run here, and why not. Installed or not is another question. Pure."""
    if facts.machine in ("x86_64", "amd64", "AMD64"):
        if "avx2" not in facts.cpu_flags:
            return False, "this processor has no AVX2"
    elif facts.machine not in ("aarch64", "arm64"):
        return False, f"no build of the engine for {facts.machine}"
    if facts.memory < MEMORY_ENGINE_GIB * GIB * 0.95:  # a "4 GB" machine shows a little less
        return False, f"{facts.memory / GIB:.1f} GiB of memory, {MEMORY_ENGINE_GIB:g} needed"
    return True, ""


def _python(facts: Facts) -> Finding:
    wanted = _dotted(WANTED_PYTHON)
    if facts.venv_python[:2] == WANTED_PYTHON:
        return Finding("ok", "Python", _dotted(facts.venv_python) + " in .venv")
    if facts.venv_python:
        value = f"{_dotted(facts.venv_python)} in .venv, {wanted} needed"
        return Finding("error", "Python", value, "`make clean`, then again: uv brings " + wanted)
    if not facts.has_uv and facts.python[:2] < BOOTSTRAP_PYTHON:
        value = f"{_dotted(facts.python)}, too old to begin with"
        return Finding(
            "error", "Python", value, "install Python 3.8 or newer, or uv; uv then brings " + wanted
        )
    if not facts.has_uv and not facts.can_make_venv:
        value = f"{_dotted(facts.python)} without the venv module"
        return Finding(
            "error", "Python", value, "install it (Debian: apt install python3-venv), or install uv"
        )
    if facts.python[:2] == WANTED_PYTHON:
        return Finding("ok", "Python", _dotted(facts.python))
    return Finding(
        "warn",
        "Python",
        f"{_dotted(facts.python)} here, {wanted} needed",
        "none: uv fetches it (about 30 MB)",
    )


def _system(facts: Facts) -> Finding:
    value = f"{facts.system} {facts.machine}"
    if facts.system != "Linux":
        return Finding(
            "error", "System", value, "the local stack runs on Linux: use a container or a virtual machine"
        )
    if facts.libc != "glibc":
        return Finding(
            "error", "System", value + ", no glibc", "use a distribution with glibc (Debian, Ubuntu, Fedora)"
        )
    value += ", glibc " + _dotted(facts.libc_version)
    if facts.libc_version and facts.libc_version < WANTED_GLIBC:
        return Finding(
            "error", "System", value, "glibc 2.28 or newer: Debian 10, Ubuntu 20.04, RHEL 8 or later"
        )
    if facts.machine != "x86_64":
        return Finding(
            "warn", "System", value, "packages are pinned for x86_64: run `make lock` on this machine first"
        )
    return Finding("ok", "System", value)


def _root(facts: Facts) -> List[Finding]:
    if not facts.is_root:
        return []
    if not facts.has_nobody:
        remedy = "add a user `nobody`, or run as an ordinary user: PostgreSQL refuses to run as root"
        return [Finding("error", "User", "root, and there is no user `nobody`", remedy)]
    return [Finding("ok", "User", "root; PostgreSQL will run as `nobody`")]


def _cpu(facts: Facts) -> Finding:
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in facts.cpu_flags]
    value = "{} core{}{}".format(
        facts.n_cpus, "" if facts.n_cpus == 1 else "s", "".join(", " + f for f in features)
    )
    if facts.n_cpus < 2:
        return Finding("warn", "Processor", value, "works, slowly: engine and control plane share one core")
    if facts.machine == "x86_64" and "avx2" in facts.cpu_flags and "avx512f" not in facts.cpu_flags:
        return Finding("warn", "Processor", value, "works, slower: the engine is at its best with AVX-512")
    return Finding("ok", "Processor", value)


def _memory(facts: Facts) -> Finding:
    value = f"{facts.memory / GIB:.1f} GiB, {facts.memory_available / GIB:.1f} available"
    if facts.memory < MEMORY_LEAST_GIB * GIB:
        return Finding("error", "Memory", value, f"{MEMORY_LEAST_GIB:g} GiB at the very least")
    if (
        not facts.stack_runs
        and facts.memory_available < (MEMORY_ENGINE_GIB - 1) * GIB
        and engine_verdict(facts)[0]
    ):
        return Finding("warn", "Memory", value, "end other programs: the engine wants about 3 GiB")
    return Finding("ok", "Memory", value)


def _disk(facts: Facts) -> Finding:
    needed_gib = DISK_LATER_GIB if facts.installed else DISK_FIRST_GIB
    value = f"{facts.disk_free / GIB:.1f} GiB free at {facts.disk_path}"
    if facts.disk_free < needed_gib * GIB:
        return Finding("error", "Disk", value, f"{needed_gib:g} GiB needed: free some, or clone elsewhere")
    return Finding("ok", "Disk", value)


def _ports(facts: Facts) -> List[Finding]:
    if facts.stack_runs:
        return [Finding("ok", "Ports", "held by this stack, which runs already")]
    if not facts.ports_in_use:
        return [
            Finding(
                "ok", "Ports", ", ".join("{} {}".format(*item) for item in sorted(PORTS.items())) + " free"
            )
        ]
    return [
        Finding(
            "warn",
            "Ports",
            f"{port} ({name}) is in use",
            "none: another free port is chosen and shown",
        )
        for name, port in facts.ports_in_use
    ]


def _fetch(facts: Facts) -> Finding:
    if facts.installed:
        return Finding("ok", "To fetch", "nothing: packages are installed")
    value = f"{facts.n_packages} packages from your index, about {DOWNLOAD_GB:g} GB (4 GB on disk)"
    return Finding("ok", "To fetch", value + "; no other network access")


def _engine(facts: Facts) -> Finding:
    if facts.engine == "toy":
        return Finding("ok", "Engine", "toy, as asked by CORRAL_ENGINE")
    runs, reason = engine_verdict(facts)
    if not runs:
        return Finding(
            "warn", "Engine", reason, "none: the toy engine serves instead (its text means nothing)"
        )
    if facts.installed and not facts.engine_installed:
        return Finding(
            "warn", "Engine", "vLLM is not installed", "`make install`; until then the toy engine serves"
        )
    model = (
        "demo model ready"
        if facts.model_made
        else "demo model is unpacked at first start (about 30 s, 0.3 GB)"
    )
    return Finding("ok", "Engine", "vLLM on CPU; " + model)


def gather(environ: Optional[Dict[str, str]] = None, root: Path = ROOT) -> Facts:
    """Look at this machine. Never raises for what it cannot find out: unknown is empty or 0."""
    env = dict(os.environ if environ is None else environ)
    var = Path(env.get("CORRAL_VAR") or root / "var")
    venv_packages = root / ".venv" / "lib" / f"python{_dotted(WANTED_PYTHON)}" / "site-packages"
    libc, _, libc_version = _libc().partition(" ")
    memory, available = _memory_bytes()
    existing = next((path for path in [root, *root.parents] if path.exists()), Path("/"))
    stack_runs = _lock_is_held(var / "stack.lock")
    requirements = _read(root / "requirements.txt")
    return Facts(
        python=tuple(sys.version_info[:3]),
        venv_python=_venv_python(root / ".venv"),
        has_uv=shutil.which("uv") is not None or (root / ".tools" / "bin" / "uv").exists(),
        can_make_venv=all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip")),
        system=platform.system(),
        machine=platform.machine(),
        libc=libc,
        libc_version=_numbers(libc_version),
        n_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_flags=_cpu_flags(),
        memory=memory,
        memory_available=available,
        disk_free=shutil.disk_usage(str(existing)).free,
        disk_path=str(existing),
        installed=any((root / ".venv").glob(".installed-*")) or (venv_packages / "django").is_dir(),
        engine_installed=(venv_packages / "vllm").is_dir() or importlib.util.find_spec("vllm") is not None,
        n_packages=sum(1 for line in requirements.splitlines() if "==" in line),
        model_made=any((var / "models").glob("*")),
        ports_in_use=()
        if stack_runs
        else tuple((name, port) for name, port in _wanted_ports(env, var) if not _port_is_free(port)),
        stack_runs=stack_runs,
        is_root=hasattr(os, "geteuid") and os.geteuid() == 0,
        has_nobody=any(line.startswith("nobody:") for line in _read(Path("/etc/passwd")).splitlines()),
        engine=env.get("CORRAL_ENGINE", ""),
    )


def _wanted_ports(env: Dict[str, str], var: Path) -> List[Tuple[str, int]]:
    try:
        recorded = json.loads(_read(var / "ports.json") or "{}")
    except ValueError:
        recorded = {}
    wanted = []
    for name, default in sorted(PORTS.items()):
        variable = {"gateway": "CORRAL_GATEWAY_PORT", "console": "CORRAL_WEB_PORT"}[name]
        text = str(recorded.get({"console": "web"}.get(name, name)) or env.get(variable) or default)
        wanted.append((name, int(text) if text.isdigit() else default))
    return wanted


def _port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            return False
    return True


def _lock_is_held(path: Path) -> bool:
    try:
        import fcntl

        with open(str(path), "r+") as file:  # noqa: PTH123  (old Pythons)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _memory_bytes() -> Tuple[int, int]:
    """(total, available), a container's limit respected."""
    table: Dict[str, int] = {}
    for line in _read(Path("/proc/meminfo")).splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()[0] if rest.split() else ""
        if number.isdigit():
            table[name] = int(number) * 1024
    total = table.get("MemTotal", 0)
    available = table.get("MemAvailable", total)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        limit, used = _read(Path(limit_file)).strip(), _read(Path(used_file)).strip()
        if limit.isdigit() and 0 < int(limit) < total:
            total = int(limit)
            available = min(available, total - int(used) if used.isdigit() else total)
    return total, max(0, available)


def _libc() -> str:
    """As "glibc 2.36"; platform.libc_ver would give what the interpreter was built against."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (AttributeError, OSError, ValueError):
        return ""


def _cpu_flags() -> FrozenSet[str]:
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, rest = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(rest.split())
    return frozenset()


def _venv_python(venv: Path) -> Tuple[int, ...]:
    for line in _read(venv / "pyvenv.cfg").splitlines():
        name, _, value = line.partition("=")
        if name.strip() in ("version", "version_info"):
            return _numbers(value)
    return ()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _numbers(text: str) -> Tuple[int, ...]:
    return tuple(int(part) for part in text.strip().split(".") if part.isdigit())


def _dotted(numbers: Tuple[int, ...]) -> str:
    return ".".join(str(number) for number in numbers)


def render(findings: List[Finding], elapsed_s: float, colour: bool) -> str:
    """The table people read."""
    codes = {"ok": "32", "warn": "33", "error": "31"} if colour else {}
    lines = [f"Preflight ({elapsed_s:.1f} s)"]
    for finding in findings:
        level = finding.level.ljust(5)
        if finding.level in codes:
            level = f"\033[{codes[finding.level]}m{level}\033[0m"
        lines.append(f"  {level}  {finding.what:<9}  {finding.value}")
        if finding.remedy:
            lines.append("  {}  {:<9}  -> {}".format(" " * 5, "", finding.remedy))
    return "\n".join(lines)


def main(argv: Optional[List[str]] = None) -> int:
    """Print the findings; 1 when something will not work."""
    parser = argparse.ArgumentParser(description="Is this machine fit for Corral? Downloads nothing.")
    parser.add_argument("--json", action="store_true", help="findings as JSON")
    options = parser.parse_args(argv)
    started_s = time.time()
    findings = judge(gather())
    elapsed_s = time.time() - started_s
    failed = any(finding.level == "error" for finding in findings)
    if options.json:
        report: Dict[str, Any] = {
            "ok": not failed,
            "elapsed_s": round(elapsed_s, 3),
            "findings": [dict(finding._asdict()) for finding in findings],
        }
        print(json.dumps(report, indent=1))
    else:
        print(render(findings, elapsed_s, sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
