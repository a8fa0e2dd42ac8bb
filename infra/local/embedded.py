"""What embedded servers have in common: one owner at a time, leftovers ended, launched, awaited, stopped.

Subclasses (postgres.py, redis.py) say how to prepare, launch and ask their server. Called by stack.py, which
lets the supervisor run `argv()`, and by tests, which call `start`. Must never end a process that is not this
data's.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from infra.local.logfile import log_tail
from infra.local.ports import HOST, free_port
from infra.local.privatefile import make_traversable
from infra.local.process import Account, find_working_in, is_alive, spawn

__all__ = ["HOST", "EmbeddedServer"]


class EmbeddedServer(ABC):
    """One server over a directory of its own (`base`, created if missing), on a loopback port."""

    program: ClassVar[str]
    """File name of its executable."""
    stop_steps: ClassVar[tuple[tuple[signal.Signals, float], ...]]
    """(signal, seconds to wait for the end), mildest first; the first is also sent when the parent dies."""

    def __init__(self, base: Path, port: int | None) -> None:
        self.base = base.absolute()
        self.port = port or free_port()
        self.log_path = self.base / "server.log"
        self.account: Account | None = None
        self._lock_fd: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def argv(self) -> list[str]:
        """Command of the server, once prepared."""

    @abstractmethod
    def is_ready(self) -> bool:
        """Whether it answers a request now; False, never an exception, while it cannot. Takes 2 s at most."""

    @abstractmethod
    def _prepare(self) -> None:
        """Make the data if missing, end leftovers, write the configuration."""

    def env(self) -> dict[str, str]:
        """Environment of the server: nothing of ours, in particular no secret."""
        return {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}

    def prepare(self) -> None:
        """All but the launch; safe to repeat, and needed again before a relaunch.

        Raises RuntimeError with the remedy when another process runs this server, or its data cannot be used.
        """
        self._take_lock()
        self._prepare()

    def start(self) -> None:
        """Prepare and launch; returns before the server answers (`wait_ready`). Call from the main thread."""
        self.prepare()
        self._process = spawn(
            self.argv(),
            env=self.env(),
            log_path=self.log_path,
            account=self.account,
            death_signal=self.stop_steps[0][0],
        )

    def wait_ready(self, timeout_s: float = 30.0) -> None:
        """Block until it answers. Raises RuntimeError with the end of the log if it dies or is too slow."""
        deadline = time.monotonic() + timeout_s
        while not self.is_ready():
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(
                    f"{self.program} ended ({self._process.returncode}):\n{log_tail(self.log_path)}"
                )
            if time.monotonic() >= deadline:
                raise RuntimeError(
                    f"{self.program} not ready after {timeout_s:g} s:\n{log_tail(self.log_path)}"
                )
            time.sleep(0.02)

    def stop(self) -> None:
        """End it, by ever harder signals. Does nothing when it was not started here."""
        process, self._process = self._process, None
        if process is not None:
            for stop_signal, grace_s in self.stop_steps:
                if process.poll() is None:
                    process.send_signal(stop_signal)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace_s)
                    break
        self.release()

    def release(self) -> None:
        """Give up the lock on the directory, after whoever ran `argv` has ended it."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def destroy(self) -> None:
        """Stop and delete the data for good."""
        self.stop()
        shutil.rmtree(self.base, ignore_errors=True)

    def _take_lock(self) -> None:
        if self._lock_fd is not None:
            return
        make_traversable(self.base)
        lock_fd = os.open(self.base / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock_fd)
            raise RuntimeError(f"another process already runs the {self.program} of {self.base}") from None
        self._lock_fd = lock_fd

    def _end_leftovers(self, working_directory: Path) -> None:
        """End servers of an earlier run (its children too) that still work in that directory."""
        for stop_signal, grace_s in self.stop_steps:
            leftovers = find_working_in(working_directory, self.program)
            for identity in leftovers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(identity.pid, stop_signal)
            deadline = time.monotonic() + grace_s
            while any(map(is_alive, leftovers)) and time.monotonic() < deadline:
                time.sleep(0.02)
