"""Forking without surprises: who may fork, and what a child does first.

Used by the zygote (which forks replicas) and by engines that fork their own core. Linux only. Holds no state
beyond the hooks that `os.register_at_fork` keeps for the life of the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_CHILD_SUBREAPER: Final = 36
_SETTLE_S: Final = 1.0
_libc = ctypes.CDLL(None, use_errno=True)  # loaded here: a freshly forked child must not import or link


class UnsafeForkError(RuntimeError):
    """A fork with more threads than allowed: the child could inherit a lock that nobody will ever release."""


def thread_names(pid: int | None = None) -> list[str]:
    """Names of all threads of a process (ours) as the kernel knows them, Python's and native ones."""
    names = []
    for task in Path(f"/proc/{pid or 'self'}/task").iterdir():
        try:
            names.append((task / "comm").read_text().strip())
        except OSError:  # the thread ended in between
            continue
    return names


def _own_name() -> str:
    return Path("/proc/self/comm").read_text().strip()


def require_single_thread(purpose: str) -> None:
    """Raise UnsafeForkError unless this process has exactly one thread, native ones included."""
    names = thread_names()
    if len(names) != 1:
        raise UnsafeForkError(f"{purpose}: this process must be single-threaded to fork, but runs {names}")


def die_with_parent(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """In a fresh child: ask the kernel for `signum` when the parent's forking thread ends. Exits at once if
    the parent ended before we could ask."""
    _libc.prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the reaper of grandchildren whose parent dies, so that none is left as a zombie of pid 1."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def name_process(name: str) -> None:
    """What `ps -o comm` and `top` show; at most 15 bytes count."""
    _libc.prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


class ForkWatch:
    """While active, children die with this process, and what ran at each fork is recorded.

    Entering with a second Python thread alive raises UnsafeForkError, and so does leaving if a fork met one.
    Native threads are only recorded (`threads_at_fork`), see vllm.py for why they are harmless there.
    """

    _active: ForkWatch | None = None
    _hooked = False

    def __init__(self) -> None:
        self.parent_pid = os.getpid()
        self.threads_at_fork: list[list[str]] = []
        self._n_python_threads: list[int] = []

    def __enter__(self) -> ForkWatch:
        if threading.active_count() > 1:
            raise UnsafeForkError(f"fork from a process with several Python threads: {thread_names()}")
        if not ForkWatch._hooked:
            os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)
            ForkWatch._hooked = True
        ForkWatch._active = self
        return self

    def __exit__(self, exc_type: object, exc: object, traceback: object) -> None:
        ForkWatch._active = None
        if exc is None and any(n > 1 for n in self._n_python_threads):
            raise UnsafeForkError(f"forked with several Python threads alive: {self.threads_at_fork}")

    def note_fork(self) -> None:
        """Runs just before the fork, which waits until native threads that have just begun have come to rest."""
        self._n_python_threads.append(threading.active_count())
        end_s = time.monotonic() + _SETTLE_S
        while True:
            # A thread carries its creator's name until it has set itself up; libzmq's name themselves last.
            names = thread_names()
            if names.count(_own_name()) <= 1 or time.monotonic() > end_s:
                break
            time.sleep(0.001)
        self.threads_at_fork.append(names)


def _before_fork() -> None:
    if ForkWatch._active is not None:
        ForkWatch._active.note_fork()


def _after_fork_in_child() -> None:
    watch, ForkWatch._active = ForkWatch._active, None
    if watch is not None:
        die_with_parent(watch.parent_pid)
