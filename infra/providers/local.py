"""Machines that are agent processes on this computer, started the way a cloud starts computers.

Each has a directory <root>/<machine id>: machine.json (what was asked, without the proof), agent.pid
({"pid", "start_time"}: start_time in clock ticks since boot), agent.log, and what the agent itself keeps. A file
notice.json says when it will be taken away (`give_notice`); it is ended then.
Agents live in a session of their own and outlive the control worker, which finds them again by these files.
Directories of the last terminated machines stay, with their logs and whatever usage was not booked.
Called by the autoscaler's act and reconcile; `manage.py down` reads agent.pid.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infra.local.privatefile import read_json, write_private_json
from infra.local.process import (
    ProcessIdentity,
    end_group,
    find_marked,
    identity_of,
    is_alive,
    kill_marked,
)
from infra.providers.base import (
    CapacityError,
    CentralNotice,
    LaunchSpec,
    Offering,
    ProviderMachine,
    ProviderRefusedError,
    ProviderState,
)
from workers.agent.notice import Notice, read_notice

# What an agent and its engine need of our environment. Nothing of ours: the control worker's holds secrets.
_PASS_NAMES = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
)
_PASS_PREFIXES = ("VLLM_", "HF_", "OMP_", "MKL_", "TORCH", "CUDA_", "NVIDIA_")
MARK = "CORRAL_MACHINE_ID"  # in the environment of every process of a machine
TERM_GRACE_S = 10.0
LOCK_TIMEOUT_S = 10.0
MAX_LOG_BYTES = 32 << 20
KEEP_TERMINATED = 8
_ROOT = Path(__file__).resolve().parents[2]


class LocalProvider:
    """Provider over one directory. Several processes may use it at once: changes are made under a lock."""

    name = "local"
    stops = False
    lists_after_s = 0.0

    def __init__(
        self,
        root: Path,
        *,
        capacity: int = 1,
        command: Sequence[str] = (sys.executable, "-m", "workers.agent"),
        environ: Mapping[str, str] = os.environ,
        grace_s: float = TERM_GRACE_S,
    ) -> None:
        self.root = root.absolute()
        self.capacity = capacity
        self._command = tuple(command)
        self._environ = environ
        self._grace_s = grace_s
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    # -- Provider

    def launch(self, spec: LaunchSpec, client_token: str) -> ProviderMachine:
        """See Provider. A token whose machine was terminated raises CapacityError: tokens are not reused."""
        with self._lock():
            known = self._by_token(client_token)
            if known is None:
                # One under notice makes room for its successor, as another computer would.
                n_alive = sum(
                    1
                    for m in self._list()
                    if m.state is not ProviderState.GONE and _notice_of(self._dir(m.ref)) is None
                )
                if n_alive >= self.capacity:
                    raise CapacityError(
                        f"the local provider runs {n_alive} of {self.capacity} machines: "
                        "raise CORRAL_MAX_MACHINES"
                    )
                record: dict[str, Any] = {
                    "machine_id": spec.machine_id,
                    "client_token": client_token,
                    "created_at_s": time.time(),
                    "agent_args": self._agent_args(spec),
                }
                self._dir(spec.machine_id).mkdir(mode=0o700, exist_ok=True)
                write_private_json(self._dir(spec.machine_id) / "machine.json", record)
            else:
                record = known
            directory = self._dir(record["machine_id"])
            if (directory / "terminated").exists():
                raise CapacityError(f"the machine of this token was terminated: {record['machine_id']}")
            if self._agent_of(directory) is None:
                self._start_agent(directory, record, spec.proof)
            return self._describe_one(directory, record)

    def restart_agent(self, ref: str) -> bool:
        """See Provider. The agent goes on with the credentials it was given at enrolment."""
        with self._lock():
            directory = self._dir(ref)
            record = read_json(directory / "machine.json")
            if record is None or (directory / "terminated").exists() or _is_taken(directory):
                return False
            if self._agent_of(directory) is None:
                self._start_agent(directory, record, proof="")
            return True

    def terminate(self, ref: str) -> None:
        """SIGTERM, a grace, then SIGKILL for everything of the machine."""
        with self._lock():
            directory = self._dir(ref)
            if not directory.is_dir():
                return
            (directory / "terminated").touch(mode=0o600)
        agent = self._agent_of(directory)  # the grace is spent outside of the lock
        if agent is not None:
            end_group(agent, stop_signal=signal.SIGTERM, grace_s=self._grace_s)
        kill_marked(f"{MARK}={directory.name}")
        self._reap()
        ended = [path.parent for path in self.root.glob("*/terminated")]
        for old in sorted(ended, key=lambda path: path.name)[:-KEEP_TERMINATED]:  # ids sort by time
            shutil.rmtree(old, ignore_errors=True)

    def stop(self, ref: str) -> None:
        raise ProviderRefusedError(f"{ref}: a machine of this computer is ended, not stopped")

    def start(self, ref: str) -> None:
        raise ProviderRefusedError(f"{ref}: a machine of this computer is ended, not stopped")

    def leaving(self, ref: str, in_s: float) -> None:
        """As if notice were given: this computer has room for its successor, and it is ended then."""
        directory = self._dir(ref)
        if directory.is_dir() and _notice_of(directory) is None:
            give_notice(directory, in_s)

    def staying(self, ref: str) -> None:
        """The notice is withdrawn, unless it has run out."""
        directory = self._dir(ref)
        if not _is_taken(directory):
            (directory / "notice.json").unlink(missing_ok=True)

    def describe(self) -> list[ProviderMachine]:
        """See Provider; oldest first. Whose notice has run out is ended first, ready or not."""
        for path in self.root.glob("*/notice.json"):
            if _is_taken(path.parent):
                kill_marked(f"{MARK}={path.parent.name}")
        self._reap()
        return self._list()

    def offerings(self) -> list[Offering]:
        """One kind, this computer, which is paid for already."""
        return []

    def notices(self) -> list[CentralNotice]:
        """None: its machines read their own (`give_notice`)."""
        return []

    def heeded(self, notice: CentralNotice) -> None:
        """There are none."""

    # -- files

    def _dir(self, machine_id: str) -> Path:
        if not machine_id.isalnum():
            raise ValueError(f"machine_id: {machine_id!r} must be letters and digits")
        return self.root / machine_id

    def _list(self) -> list[ProviderMachine]:
        found = []
        for path in sorted(self.root.glob("*/machine.json")):
            with contextlib.suppress(ValueError, KeyError):  # damaged: nobody's machine
                record = read_json(path)
                if record is not None:
                    found.append(self._describe_one(path.parent, record))
        return sorted(found, key=lambda m: (m.started_at_s, m.machine_id))

    def _describe_one(self, directory: Path, record: dict[str, Any]) -> ProviderMachine:
        if self._agent_of(directory) is not None:
            state = ProviderState.RUNNING
        else:
            terminated = (directory / "terminated").exists() or _is_taken(directory)
            state = ProviderState.GONE if terminated else ProviderState.AGENT_DOWN
        return ProviderMachine(
            ref=record["machine_id"],
            machine_id=record["machine_id"],
            client_token=record["client_token"],
            state=state,
            started_at_s=float(record["created_at_s"]),
        )

    def _by_token(self, client_token: str) -> dict[str, Any] | None:
        for path in self.root.glob("*/machine.json"):
            with contextlib.suppress(ValueError):
                record = read_json(path)
                if record is not None and record.get("client_token") == client_token:
                    found: dict[str, Any] = record
                    return found
        return None

    @contextmanager
    def _lock(self) -> Iterator[None]:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline_s = time.monotonic() + LOCK_TIMEOUT_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline_s:
                        raise CapacityError("the local provider is busy: its lock is held") from None
                    time.sleep(0.02)
            yield
        finally:
            os.close(descriptor)

    # -- processes

    def _agent_args(self, spec: LaunchSpec) -> list[str]:
        args = ["--machine-id", spec.machine_id, "--enrol-url", spec.enrol_url, "--cell", spec.cell]
        args += ["--var", str(self._dir(spec.machine_id)), "--engine", spec.engine]
        args += ["--model-cache", spec.model_cache] if spec.model_cache else []
        args += ["--redis", spec.redis] if spec.redis else []
        return args

    def _agent_of(self, directory: Path) -> ProcessIdentity | None:
        """The live agent, by its record, or by its mark when we died between starting and recording it."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = read_json(directory / "agent.pid")
            if record is not None:
                identity = ProcessIdentity(int(record["pid"]), int(record["start_time"]))
                return identity if is_alive(identity) else None
        for pid in sorted(find_marked(f"{MARK}={directory.name}")):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(pid) == pid:
                    return identity_of(pid)
        return None

    def _start_agent(self, directory: Path, record: dict[str, Any], proof: str) -> None:
        """The proof travels in the environment, which only this user can read, and dies with the process."""
        env = {
            name: value
            for name, value in self._environ.items()
            if name in _PASS_NAMES or name.startswith(_PASS_PREFIXES)
        }
        env |= {MARK: record["machine_id"], "PYTHONPATH": str(_ROOT), "PYTHONUNBUFFERED": "1"}
        if proof:
            env["CORRAL_ENROL_PROOF"] = proof
        (directory / "agent.pid").unlink(missing_ok=True)
        log_path = directory / "agent.log"
        if log_path.exists() and log_path.stat().st_size > MAX_LOG_BYTES:
            log_path.replace(directory / "agent.log.1")
        log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            process = subprocess.Popen(
                [*self._command, *record["agent_args"]],
                env=env,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
            )
        finally:
            os.close(log)
        self._children[process.pid] = process
        identity = identity_of(process.pid)
        if identity is not None:
            text = {"pid": identity.pid, "start_time": identity.start_ticks}
            write_private_json(directory / "agent.pid", text)

    def _reap(self) -> None:
        """Collect agents that ended, or they would stay zombies of the control worker."""
        for pid, process in list(self._children.items()):
            if process.poll() is not None:
                self._children.pop(pid, None)


def give_notice(directory: Path, ends_in_s: float) -> None:
    """Tell a machine that it will be taken away, as a cloud does with a spot instance. Its agent reads the file."""
    write_private_json(directory / "notice.json", {"ends_at_s": time.time() + ends_in_s})


def _notice_of(directory: Path) -> Notice | None:
    return read_notice(directory / "notice.json")


def _is_taken(directory: Path) -> bool:
    """Whether the machine's notice has run out."""
    notice = _notice_of(directory)
    return notice is not None and time.time() >= notice.ends_at_s


def read_agent_pid(path: Path) -> ProcessIdentity | None:
    """The process an agent.pid names (it may be long gone); None when unreadable."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return ProcessIdentity(int(record["pid"]), int(record["start_time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
