"""What a drill may touch: processes of the running local stack, found through its own records, and its cell's Redis.

A process is signalled by pid and start time, and only after it has shown that it belongs to this stack: the state
file names it, or its environment carries the mark of a machine of this data directory. Called by the drills.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import msgspec
import redis

from infra.drills.load import Target
from infra.local.privatefile import read_json
from infra.local.process import ProcessIdentity, command_line, identity_of, is_alive
from infra.local.stackstate import StackRecord, read_state
from infra.providers.local import MARK, give_notice, read_agent_pid
from workers.contract import Heartbeat, ReplicaStatus
from workers.keys import CellKeys

# In the environment of every process of a simulated instance, with its id: its agent's own mark is overwritten by its
# user data. The file `instance` of a machine's directory says which.
INSTANCE_MARK = "CORRAL_SIMULATED_INSTANCE"
MAX_ANSWER_BYTES = 65_536
REGION_FILE = "region.json"  # {"url"}: where the simulated region that this stack buys from takes orders
REGION_BUCKET = "s3://models/drills"

_status = msgspec.json.Decoder(ReplicaStatus).decode
_heartbeat = msgspec.json.Decoder(Heartbeat).decode


class DrillError(RuntimeError):
    """The drill cannot be carried out as things are; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class ServingReplica:
    """A replica that requests are routed to: its front's process, and whose machine it is on."""

    id: str
    machine: str
    front: ProcessIdentity


class Strike:
    """What was done to the stack, and when. Filled by the drill's thread, read by everybody."""

    def __init__(self) -> None:
        self.at_s: float | None = None
        self.what = ""
        self.notes: dict[str, Any] = {}
        self.problems: list[str] = []

    def done(self, what: str, at_s: float | None = None) -> None:
        """The fault is in the world now (or since `at_s`, monotonic seconds)."""
        self.at_s, self.what = time.monotonic() if at_s is None else at_s, what

    def require(self, condition: bool, otherwise: str) -> None:
        """A promise of the drill beside its streams: `otherwise` is the problem if it is broken."""
        if not condition:
            self.problems.append(otherwise)


class Scene:
    """One running local stack and one deployment on it. Methods block; call them from the drill's thread."""

    def __init__(
        self,
        var: Path,
        redis_url: str,
        cell: str,
        deployment: str,
        say: Callable[[str], None],
        engine: str = "toy",
        end_of: Callable[[str], str] = lambda replica: "",
    ) -> None:
        """`end_of(replica id)` answers `code: sentence` of a replica that is over, '' while it is not."""
        self.var = var
        self.engine = engine
        self.end_of = end_of
        self.n_served_before = 0  # tokens of the undisturbed run: the replica's own count includes them
        self.keys = CellKeys(cell)
        self.deployment = deployment
        self.say = say
        self.redis_url = redis_url
        self.redis = redis.Redis.from_url(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0)
        # Of a key of the drill's that no gateway has seen; given by whoever makes the keys.
        self.unseen: Target | None = None
        # Takes the stack over to another version; answers notes. Given by whoever has that version.
        self.upgrade: Callable[[], dict[str, str]] = _no_upgrade
        # A management command with --json, run against this stack by the operator; its answer. Given by the command.
        self.manage: Callable[..., Any] = _no_command
        # After secrets were changed: the addresses that count now. Set by whoever has connections of its own.
        self.on_renewal: Callable[[], None] = lambda: None

    def close(self) -> None:
        self.redis.close()

    def renew(self, redis_url: str) -> None:
        """The cell's Redis has another password."""
        self.redis.close()
        self.redis_url = redis_url
        self.redis = redis.Redis.from_url(redis_url, socket_timeout=2.0, socket_connect_timeout=2.0)
        self.on_renewal()

    # -- looking

    def record(self) -> StackRecord:
        """The stack's state file now. DrillError when no stack runs from this directory."""
        record = read_state(self.var)
        if record is None or not record.supervisor_runs():
            raise DrillError(f"no stack runs from {self.var}: start it with `make up`")
        return record

    def process(self, name: str) -> ProcessIdentity:
        """A supervised process that is ready. DrillError when there is none."""
        for process in self.record().processes:
            identity = process.identity()
            if process.name == name and identity and is_alive(identity):
                if process.marker not in " ".join(command_line(identity.pid)):
                    raise DrillError(f"{name}: pid {identity.pid} is not what the stack started")
                return identity
        raise DrillError(f"{name} does not run: `manage.py status`")

    def is_ready(self, name: str) -> bool:
        """Whether the supervisor calls it ready."""
        return any(p.name == name and p.phase == "ready" for p in self.record().processes)

    def is_down(self, name: str) -> bool:
        """Whether the supervisor has seen it end, and ended what it left."""
        return any(p.name == name and p.phase == "backing-off" for p in self.record().processes)

    def ask_with_unseen_key(self) -> int:
        """Status of one plain request under a key that no gateway has seen yet; 0 when nobody answers."""
        return self.ask("hello", timeout_s=10.0)[0]

    def ask(self, text: str, *, timeout_s: float) -> tuple[int, str]:
        """(status, error code) of one plain request beside the streams, under a key of its own; 0 when nobody
        answers."""
        if self.unseen is None:
            raise DrillError("this drill needs a key that was never used")
        body = {
            "model": self.unseen.model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 1,
        }
        headers = {"authorization": f"Bearer {self.unseen.api_key}", "content-type": "application/json"}
        status, answer = _answer_of(
            self.unseen.host, self.unseen.port, "POST", self.unseen.path, json.dumps(body), headers, timeout_s
        )
        try:
            return status, str(json.loads(answer)["error"]["code"])
        except (ValueError, LookupError, TypeError):
            return status, ""

    def console_status(self) -> int:
        """Status of a console page that needs the database (a visitor with a session of unknown worth)."""
        url = urlsplit(str(self.record().facts.get("console_url")))
        cookie = {"cookie": f"corral_session={secrets.token_hex(16)}"}
        return _status_of(url.hostname or "127.0.0.1", url.port or 80, "GET", "/", None, cookie)

    def routed(self) -> list[ServingReplica]:
        """Replicas that serve the deployment, with live fronts."""
        found = []
        for raw in sorted(cast(set[bytes], self.redis.smembers(self.keys.replicas(self.deployment)))):
            rid = raw.decode()
            mid = cast(bytes | None, self.redis.hget(self.keys.replica(rid), "mid"))
            if mid is None:
                continue
            machine = self.keys.machine(mid.decode())
            payload = cast(bytes | None, self.redis.hget(machine.actual, rid))
            if payload is None:
                continue
            identity = identity_of(_status(payload).pid)
            if identity is not None and self._belongs(identity.pid, mid.decode()):
                found.append(ServingReplica(rid, mid.decode(), identity))
        return found

    def serving(self) -> ServingReplica:
        """The one replica that serves the deployment."""
        found = self.routed()
        if len(found) != 1:
            raise DrillError(f"{len(found)} replicas serve the drill's deployment, expected one")
        return found[0]

    def heartbeat(self, replica: ServingReplica) -> Heartbeat | None:
        payload = cast(bytes | None, self.redis.get(self.keys.machine(replica.machine).heartbeat(replica.id)))
        return None if payload is None else _heartbeat(payload)

    def replica_state(self, replica: ServingReplica) -> str:
        """`ready`, `draining`, `dead`, or '' when the cell has forgotten it."""
        state = cast(bytes | None, self.redis.hget(self.keys.replica(replica.id), "state"))
        return (state or b"").decode()

    def live_requests(self, replica: ServingReplica) -> list[str]:
        """Requests bound to it."""
        members = cast(set[bytes], self.redis.smembers(self.keys.replica_live(replica.id)))
        return sorted(member.decode() for member in members)

    def n_journaled(self, request: str) -> int:
        """Tokens accepted of a request by the replicas that lost it."""
        return int(cast(bytes | None, self.redis.hget(self.keys.request(request), "n")) or 0)

    def core_of(self, replica: ServingReplica) -> ProcessIdentity | None:
        """The engine core, a child of the front; None for the toy, which runs inside. DrillError when there is none.

        A core names itself over its own environment, so it is known by its parent, not by a mark.
        """
        if self.engine == "toy":
            return None
        for pid in _children(replica.front.pid):
            identity = identity_of(pid)
            if identity is not None and "EngineCore" in " ".join(command_line(pid)):
                return identity
        raise DrillError(f"replica front, pid {replica.front.pid}, has no engine core")

    def n_messages(self, replica: ServingReplica) -> int:
        """Celery messages that were pushed for it and not acknowledged yet."""
        keys = self.keys.machine(replica.machine)
        unacked, _ = keys.unacked(replica.id)
        return self.redis.hlen(unacked) + self.redis.llen(keys.prefix + keys.queue_name(replica.id))

    def is_gone(self, replica: ServingReplica) -> bool:
        return not is_alive(replica.front)

    def agent_beat(self, machine: str) -> Heartbeat | None:
        """The agent's last heartbeat."""
        payload = cast(bytes | None, self.redis.get(self.keys.machine(machine).heartbeat()))
        return None if payload is None else _heartbeat(payload)

    def machine_dir(self, machine: str) -> Path:
        return self.var / "machines" / machine

    def agent_of(self, machine: str) -> ProcessIdentity | None:
        """The live agent of a machine."""
        identity = read_agent_pid(self.machine_dir(machine) / "agent.pid")
        return identity if identity is not None and is_alive(identity) else None

    def processes_of(self, machine: str) -> list[ProcessIdentity]:
        """All of the machine: agent, zygote, fronts (engine cores die with their fronts)."""
        pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
        found = (identity_of(pid) for pid in pids if self._belongs(pid, machine))
        return [identity for identity in found if identity is not None]

    def machine_ends(self, machine: str) -> bool:
        """Whether nothing of the machine runs any more."""
        return not self.processes_of(machine)

    # -- acting

    def signal(self, identity: ProcessIdentity, signum: int, *, machine: str = "") -> None:
        """Signal a process that `process`, `serving`, `core_of` or `agent_of` named. DrillError when it is gone."""
        if not is_alive(identity) or (machine and not self._belongs(identity.pid, machine)):
            raise DrillError(f"pid {identity.pid} is gone or not of this stack")
        os.kill(identity.pid, signum)

    def announce(self, machine: str, in_s: float, *, centrally: bool = False) -> str:
        """Its provider says that it will take this machine away, and does: the machine itself is told, or only the
        provider's central queue. Answers who told. DrillError where this stack's machines have no such queue.
        """
        region = read_json(self.var / REGION_FILE)
        if region is not None:
            order = {"machine": machine, "in_s": in_s, "centrally": centrally}
            url = urlsplit(str(region["url"]))
            body = json.dumps(order)
            status = _status_of(url.hostname or "", url.port or 0, "POST", "/notice", body, {})
            if status != 200:
                raise DrillError(f"the simulated region did not take the notice: HTTP {status}")
            return "EventBridge and its queue" if centrally else "its metadata service"
        if centrally:
            raise DrillError("machines of this stack have no central notices: run it with --region")
        give_notice(self.machine_dir(machine), in_s)
        return "its notice file"

    def wait(self, condition: Callable[[], object], what: str, timeout_s: float) -> None:
        """Poll every 20 ms. DrillError names what never came. Redis being away counts as not yet."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(redis.RedisError):
                if condition():
                    return
            if time.monotonic() > deadline_s:
                raise DrillError(f"within {timeout_s:g} s it did not happen that {what}")
            time.sleep(0.02)

    def _belongs(self, pid: int, machine: str) -> bool:
        """Whether the process carries the mark of that machine, and the machine is of this data directory."""
        directory = self.machine_dir(machine)
        if not directory.is_dir():
            return False
        instance = directory / "instance"
        mark = f"{INSTANCE_MARK}={instance.read_text()}" if instance.exists() else f"{MARK}={machine}"
        try:
            marks = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            return False
        return mark.encode() in marks


def _no_upgrade() -> dict[str, str]:
    raise DrillError("this drill makes a stack of its own: `manage.py drill rolling-upgrade`")


def _no_command(*args: str) -> Any:
    raise DrillError(f"nobody is here who may run `manage.py {args[0]}`")


def _status_of(
    host: str, port: int, method: str, path: str, body: str | None, headers: dict[str, str]
) -> int:
    return _answer_of(host, port, method, path, body, headers, 10.0)[0]


def _answer_of(
    host: str, port: int, method: str, path: str, body: str | None, headers: dict[str, str], timeout_s: float
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _children(pid: int) -> list[int]:
    """Direct children, of all threads of the process."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return sorted(set(found))


def describe_signal(signum: int) -> str:
    return signal.Signals(signum).name
