"""The process that has everything imported and only forks: `python -m workers.agent.zygote --socket PATH`.

Started by the agent (`zygote_client.Zygote.start`), once per machine. It imports the engine (7-11 s), freezes
the heap and stays single-threaded for good, so a fork is safe and a replica starts in a second from shared
pages. It never runs an engine, a loop or a tensor operation, and never talks to anything but the agent.

Lives and deaths:

- Replicas outlive the agent, because the zygote does: it keeps its socket, remembers exits, and the next
  agent that connects is told what runs. Without an agent for `--orphan-s` it ends its replicas and itself.
- Replicas do not outlive the zygote (PR_SET_PDEATHSIG), nor engine cores their replica. So ending the zygote,
  even by SIGKILL, ends everything on the machine; nothing can leak.
- When a replica ends, so does whatever it started: the rest of its session, and, this process being the
  subreaper, what has left that session.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from pathlib import Path
from typing import Final

from workers.agent.zygote_child import run_child
from workers.agent.zygote_protocol import (
    MAX_LINE_BYTES,
    ChildExit,
    ChildInfo,
    Command,
    Event,
    ForkSpec,
    decode_command,
    encode,
    short_address,
)
from workers.engine import forking

MAX_CHILDREN: Final = 256
MAX_REMEMBERED_EXITS: Final = 1024
_TICK_S: Final = 1.0
_STOP_GRACE_S: Final = 10.0
_HANDLED: Final = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
# What a replica front needs besides its engine.
_PREIMPORTED: Final = (
    "asyncio",
    "celery.apps.worker",
    "celery.bin.worker",
    "celery.worker.consumer",
    "celery.worker.control",
    "kombu.transport.redis",
    "redis",
    "uvloop",
    "workers.engine.toy",
)


class ZygoteServer:
    """One listening socket, one agent at a time, and the children. `serve` returns a ForkSpec in a child."""

    def __init__(self, listener: socket.socket, engines: tuple[str, ...], missing: dict[str, str]) -> None:
        self._listener = listener
        self._hello = Event(
            kind="hello", pid=os.getpid(), engines=engines, missing=missing, loads_arriving=True
        )
        self._children: dict[int, ChildInfo] = {}
        self._exits: deque[ChildExit] = deque(maxlen=MAX_REMEMBERED_EXITS)
        self._agent: socket.socket | None = None
        self._inbox = b""
        self._alone_since_s = time.monotonic()
        self._sigterm = False
        self._stop_at_s: float | None = None  # when what still runs is killed
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_in = socket.socketpair()

    def serve(self, orphan_s: float) -> ForkSpec | None:
        """Until told to stop. Returns None in the zygote, and in each forked child the spec it is to run."""
        for each in (self._wakeup, self._wakeup_in, self._listener):
            each.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_in.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._wakeup:
                    with contextlib.suppress(BlockingIOError):
                        self._wakeup.recv(4096)
                elif key.fileobj is self._listener:
                    self._greet()
                elif key.fileobj is self._agent and (spec := self._hear()) is not None:
                    return spec
            self._reap()
            if self._sigterm:
                self._begin_stop(_STOP_GRACE_S)
            if self._stop_at_s is not None:
                if not self._children:
                    return None
                if time.monotonic() >= self._stop_at_s:
                    self._signal_all(signal.SIGKILL)
            elif self._agent is None and time.monotonic() - self._alone_since_s > orphan_s:
                self._begin_stop(_STOP_GRACE_S)

    def _on_sigterm(self, *_: object) -> None:
        self._sigterm = True  # the loop is woken by the wakeup fd

    def _patience_s(self) -> float:
        """How long to wait for something to happen."""
        if self._stop_at_s is None:
            return _TICK_S
        return min(_TICK_S, max(0.01, self._stop_at_s - time.monotonic()))

    # -- the agent

    def _greet(self) -> None:
        """A new agent replaces the old one, and hears what it has missed."""
        try:
            agent, _ = self._listener.accept()
        except BlockingIOError:
            return
        self._part()
        agent.settimeout(5.0)  # for sends; reads happen only when the selector says so
        self._agent, self._inbox = agent, b""
        self._selector.register(agent, selectors.EVENT_READ)
        self._hello.children = tuple(self._children.values())
        self._tell(self._hello)
        for ended in tuple(self._exits):
            self._tell(Event(kind="exit", exit=ended))

    def _part(self) -> None:
        if self._agent is not None:
            self._selector.unregister(self._agent)
            self._agent.close()
            self._agent = None
            self._alone_since_s = time.monotonic()

    def _tell(self, event: Event) -> None:
        if self._agent is None:
            return
        try:
            self._agent.sendall(encode(event) + b"\n")
        except OSError:
            self._part()

    def _hear(self) -> ForkSpec | None:
        """Obey what the agent sent. A spec is returned in a forked child only."""
        assert self._agent is not None
        try:
            data = self._agent.recv(65536)
        except OSError:
            data = b""
        if not data or len(self._inbox) + len(data) > MAX_LINE_BYTES:
            self._part()
            return None
        *lines, self._inbox = (self._inbox + data).split(b"\n")
        for line in lines:
            try:
                command = decode_command(line)
            except ValueError as error:
                self._tell(Event(kind="answer", error=f"not a command: {error}"))
                continue
            if (spec := self._obey(command)) is not None:
                return spec
        return None

    def _obey(self, command: Command) -> ForkSpec | None:
        answer = Event(kind="answer", seq=command.seq)
        if command.op == "fork" and command.spec is not None:
            try:
                answer.pid = self._fork(command.spec)
            except (OSError, ValueError, forking.UnsafeForkError) as error:
                answer.error = str(error)
            else:
                if answer.pid == 0:
                    return command.spec
        elif command.op == "kill":
            # Only our own, unreaped children: their pids cannot have been given to somebody else.
            if command.pid not in self._children:
                answer.error = f"no living child has pid {command.pid}"
            else:
                try:
                    (os.killpg if command.group else os.kill)(command.pid, command.signum)
                except OSError as error:  # no session of its own yet, or an unknown signal
                    answer.error = str(error)
        elif command.op == "forget":
            self._exits = deque((e for e in self._exits if e.pid != command.pid), MAX_REMEMBERED_EXITS)
        elif command.op == "shutdown":
            self._begin_stop(command.grace_s)
        else:
            answer.error = f"unknown command {command.op!r}"
        self._tell(answer)
        return None

    # -- the children

    def _fork(self, spec: ForkSpec) -> int:
        """The child's pid, 0 in the child. Raises ValueError when the spec is refused."""
        if self._stop_at_s is not None:
            raise ValueError("the zygote is stopping")
        if len(self._children) >= MAX_CHILDREN:
            raise ValueError(f"{MAX_CHILDREN} children are running; stop one first")
        if any(child.tag == spec.tag for child in self._children.values()):
            raise ValueError(f"a child with tag {spec.tag!r} is running")
        forking.require_single_thread("zygote")
        zygote_pid = os.getpid()
        # A signal to the child before it has shed our handlers must wait until it has.
        signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
        try:
            pid = os.fork()
            if pid == 0:
                self._become_child(zygote_pid)
                return 0
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        self._children[pid] = ChildInfo(pid=pid, tag=spec.tag, started_at_s=time.time())
        return pid

    def _become_child(self, zygote_pid: int) -> None:
        """Shed everything of the zygote: signals, sockets, session."""
        forking.die_with_parent(zygote_pid)
        signal.set_wakeup_fd(-1)
        for signum in _HANDLED:
            signal.signal(signum, signal.SIG_DFL)
        self._selector.close()
        for each in (self._listener, self._agent, self._wakeup, self._wakeup_in):
            if each is not None:
                each.close()
        os.setsid()

    def _reap(self) -> None:
        """Collect every child that has ended, and what is left of its session."""
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            child = self._children.pop(pid, None)
            if child is not None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)  # before it is reaped: its pid is still its own
            _, status, usage = os.wait4(pid, 0)
            if child is None:
                continue  # an adopted grandchild
            self._kill_strays()
            code = os.waitstatus_to_exitcode(status)
            exit_ = ChildExit(
                pid=pid,
                tag=child.tag,
                code=code if code >= 0 else None,
                signum=-code if code < 0 else None,
                max_rss_kb=usage.ru_maxrss,
            )
            self._exits.append(exit_)
            self._tell(Event(kind="exit", exit=exit_))

    def _kill_strays(self) -> None:
        """What a replica had put into a session of its own is our child now that the replica is gone."""
        try:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
        except FileNotFoundError:  # a kernel without CONFIG_PROC_CHILDREN
            return
        for pid in map(int, children.split()):
            if pid not in self._children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _begin_stop(self, grace_s: float) -> None:
        if self._stop_at_s is None:
            self._stop_at_s = time.monotonic() + grace_s
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, signum: int) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)


def preimport(wanted: tuple[str, ...], extra: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Import for all replicas to come. Returns the engines that are there, and why the others are not."""
    for name in _PREIMPORTED + extra:
        importlib.import_module(name)
    engines, missing = ["toy"], {}
    if "vllm" in wanted:
        from workers.engine import vllm_process

        try:
            vllm_process.preimport()
            engines.append("vllm")
        except Exception as error:  # whatever a broken wheel raises: a machine without vLLM still serves toy
            missing["vllm"] = f"{type(error).__name__}: {error}"
    sys.stdout.flush()  # or every child would write what the imports have said
    gc.collect()
    gc.freeze()
    return tuple(engines), missing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workers.agent.zygote", description="fork server of the agent"
    )
    parser.add_argument("--socket", required=True, type=Path, help="Unix socket to listen on")
    parser.add_argument("--engines", default="vllm,toy", help="engines to import: vllm,toy or toy")
    parser.add_argument("--preimport", default="", help="more modules to import, comma-separated")
    parser.add_argument("--orphan-s", default=120.0, type=float, help="end everything after so long alone")
    options = parser.parse_args(argv)
    forking.name_process("corral-zygote")
    forking.adopt_orphans()
    listener = _listen(options.socket)
    extra = tuple(name for name in options.preimport.split(",") if name)
    engines, missing = preimport(tuple(options.engines.split(",")), extra)
    spec = ZygoteServer(listener, engines, missing).serve(options.orphan_s)
    if spec is None:
        options.socket.unlink(missing_ok=True)
        code = 0
    else:
        code = run_child(spec)
        logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: a fork must not run exit handlers that belong to the zygote, and the C++ libraries of the
    # engine report hundreds of "leaks" on an orderly end.
    os._exit(code)


def _listen(path: Path) -> socket.socket:
    """Listening before the imports: an agent may connect meanwhile and is greeted afterwards."""
    listener = socket.socket(socket.AF_UNIX)
    path.unlink(missing_ok=True)
    old_mask = os.umask(0o177)
    try:
        with short_address(path) as address:
            listener.bind(address)
    finally:
        os.umask(old_mask)
    listener.listen(4)
    return listener


if __name__ == "__main__":
    main()
