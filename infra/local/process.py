"""Starting, recognising and ending processes of this machine.

A pid alone names nobody: it is reused. Everything here speaks of a process by pid AND start time (field 22 of
/proc/<pid>/stat), so that a record left by an earlier run can never end a stranger. Called by the embedded
servers, the supervisor and the local provider. Linux only (/proc, prctl).
"""

import contextlib
import ctypes
import os
import pwd
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from infra.local.privatefile import make_traversable

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded here: nothing may be imported between fork and exec


@dataclass(frozen=True)
class Account:
    """The operating-system user a process is started as."""

    name: str
    uid: int
    gid: int


@dataclass(frozen=True)
class ProcessIdentity:
    """One process for good: `start_ticks` are clock ticks since boot at which it started."""

    pid: int
    start_ticks: int


def unprivileged_account() -> Account | None:
    """Who servers run as: `nobody` when we are root (PostgreSQL refuses root), ourselves (None) otherwise."""
    if os.geteuid() != 0:
        return None
    try:
        entry = pwd.getpwnam("nobody")
    except KeyError:
        raise RuntimeError(
            "running as root, and this system has no user `nobody` to run PostgreSQL as: "
            "run as an ordinary user, or add the account"
        ) from None
    return Account(entry.pw_name, entry.pw_uid, entry.pw_gid)


def spawn(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    log_path: Path | None,
    cwd: Path = Path("/"),
    account: Account | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
) -> subprocess.Popen[bytes]:
    """Start `argv` in its own session, output appended to `log_path` (mode 600; None: ours).

    The kernel sends it `death_signal` when the calling THREAD ends, however: call from the main thread.
    Raises OSError when it cannot be started.
    """
    parent_pid = os.getpid()

    def _tie_to_parent() -> None:  # after fork: no locks, no imports, no logging
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
        if os.getppid() != parent_pid:  # it died between fork and prctl
            os._exit(1)

    output: int | None = None
    if log_path is not None:
        make_traversable(log_path.parent)
        output = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
            umask=0o077,
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            preexec_fn=_tie_to_parent,  # after the change of user, which clears the death signal
        )
    finally:
        if output is not None:
            os.close(output)


def identity_of(pid: int) -> ProcessIdentity | None:
    """Identity of the process that has this pid now; None when there is none, or only its zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may hold spaces and parentheses
    if fields[0] in ("Z", "X"):
        return None
    return ProcessIdentity(pid, int(fields[19]))


def is_alive(identity: ProcessIdentity) -> bool:
    """Whether that very process (not another one with its pid) runs."""
    return identity_of(identity.pid) == identity


def command_line(pid: int) -> list[str]:
    """Arguments of a process; empty when it is gone or a kernel thread."""
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [part.decode(errors="replace") for part in raw.split(b"\0") if part]


def find_working_in(directory: Path, program: str) -> list[ProcessIdentity]:
    """Processes running executable `program` with `directory` as working directory, where our servers live.

    Both must fit: a shell that stands in the directory is nobody's server.
    """
    wanted = str(directory.resolve())
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                executable = (entry / "exe").readlink().name.removesuffix(" (deleted)")
                if executable == program and str((entry / "cwd").readlink()) == wanted:
                    identity = identity_of(int(entry.name))
                    if identity is not None:
                        found.append(identity)
    return found


def session_members(session: int) -> list[int]:
    """Live pids of the session or process group of that number."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                state, _, pgid, sid = (
                    (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[:4]
                )
                if str(session) in (pgid, sid) and state not in ("Z", "X"):
                    found.append(int(entry.name))
    return found


def end_group(identity: ProcessIdentity, *, stop_signal: signal.Signals, grace_s: float) -> bool:
    """End a session: `stop_signal` to its leader, `grace_s` for all of it, then SIGKILL.

    True when it was ended. A process that is gone, leads no session, or whose pid is another's now, is left
    alone. Blocks for `grace_s` plus two seconds at most.
    """
    try:
        if not is_alive(identity) or os.getsid(identity.pid) != identity.pid:
            return False
        os.kill(identity.pid, stop_signal)
    except ProcessLookupError:
        return False
    wait_until(lambda: not session_members(identity.pid), grace_s)
    kill_session(identity.pid)
    return True


def find_marked(mark: str) -> list[int]:
    """Live pids, but ours, whose environment holds exactly `mark` ("NAME=value")."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return [pid for pid in found if identity_of(pid)]


def kill_marked(mark: str) -> bool:
    """SIGKILL to all of `find_marked` until there are none, two seconds at most; whether there were any."""
    any_found = False

    def _gone() -> bool:
        nonlocal any_found
        pids = find_marked(mark)
        for pid in pids:
            any_found = True
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return not pids

    wait_until(_gone, 2.0)
    return any_found


def kill_session(session: int) -> None:
    """SIGKILL to all that is left of a session, whose number cannot be reused before; waits 2 s."""
    for pid in session_members(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not session_members(session), 2.0)


def wait_until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll every 20 ms; whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.02)
    return True


def listens_on(pid: int, port: int) -> bool:
    """Whether that very process listens on `port`, which several may share (SO_REUSEPORT)."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(descriptor.readlink()) in inodes:
                    return True
    return False
