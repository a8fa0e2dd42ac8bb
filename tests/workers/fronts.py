"""A machine's corner of Redis, and replica fronts that run there as processes under its restricted user."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import threading
from collections import Counter
from types import TracebackType
from typing import Any, Self

import redis
from celery import Celery

from tests.workers.waiting import wait_until
from workers.app import ConsumerConfig, make_app
from workers.contract import celery_message
from workers.keys import MachineKeys
from workers.scripts import MACHINE_SCRIPTS
from workers.transport import CONSUMER_COMMANDS

_PASSWORD = "machine-password"


class Machine:
    """Trusted view of one machine: its user exists, limited to the commands that a consumer needs."""

    def __init__(self, redis_url: str, machine_id: str = "m1") -> None:
        self.trusted_url = redis_url
        self.r: Any = redis.Redis.from_url(redis_url)
        self.keys = MachineKeys("t0", machine_id)
        rules = self.keys.acl_rules(hashlib.sha256(_PASSWORD.encode()).hexdigest())
        rules = [rule for rule in rules if not rule.startswith("+")]
        self.r.execute_command(
            "ACL",
            "SETUSER",
            self.keys.redis_user,
            *rules,
            *(f"+{name}" for name in sorted(CONSUMER_COMMANDS)),
        )
        address = redis_url.rpartition("@")[2]
        self.url = f"redis://{self.keys.redis_user}:{_PASSWORD}@{address}"
        self.load_scripts()

    def load_scripts(self) -> None:
        for script in MACHINE_SCRIPTS:
            self.r.script_load(script.source)

    def send(self, *request_ids: str, epoch: int = 1, replica_id: str = "r1") -> None:
        """Queue the messages as the bind script does, oldest first."""
        queue = self.keys.prefix + self.keys.queue_name(replica_id)
        self.r.lpush(queue, *(celery_message(request_id, epoch, replica_id) for request_id in request_ids))

    def queued(self, replica_id: str = "r1") -> list[str]:
        """Task ids in the replica's queue, next first."""
        entries = self.r.lrange(self.keys.prefix + self.keys.queue_name(replica_id), 0, -1)
        return [json.loads(entry)["headers"]["id"] for entry in reversed(entries)]

    def unacked(self, replica_id: str = "r1") -> set[str]:
        """Delivery tags on record; every one must be in the index too."""
        with self.r.pipeline() as pipe:
            pipe.hkeys(f"{self.keys.prefix}unacked.{replica_id}")
            pipe.zrange(f"{self.keys.prefix}unacked_index.{replica_id}", 0, -1)
            tags, index = pipe.execute()
        assert set(tags) <= set(index)
        return {tag.decode() for tag in tags}

    def log(self) -> list[str]:
        """What the jobs of all fronts of this machine reported, in order."""
        return [line.decode() for line in self.r.lrange(f"{self.keys.prefix}log", 0, -1)]

    def events(self) -> Counter[str]:
        """How often each event was reported."""
        return Counter(line.partition(" ")[0] for line in self.log())

    def operator(self, replica_id: str = "r1") -> Celery:
        """The application as an operator on the trusted side uses it to inspect and revoke."""
        return make_app(ConsumerConfig(self.trusted_url, self.keys.prefix, replica_id))


class Front:
    """One front process; as a context manager it is killed at the end. Its output is kept."""

    def __init__(self, machine: Machine, replica_id: str = "r1", **options: Any) -> None:
        self.machine = machine
        self.replica_id = replica_id
        self._lines: list[str] = []
        arguments = {
            "redis_url": machine.url,
            "key_prefix": machine.keys.prefix,
            "replica_id": replica_id,
            **options,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.workers.scripted_front", json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        try:
            wait_until(lambda: "ready" in self._lines or self.process.poll() is not None, "the front")
            assert self.process.poll() is None, self.output
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None:
            print(self.output)
        self.kill()

    @property
    def output(self) -> str:
        return "\n".join(self._lines)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self._reader.join(5)

    def stop(self, *signals: signal.Signals) -> int:
        """Send the signals in turn (default SIGTERM), wait for the end, return the exit code."""
        for number in signals or (signal.SIGTERM,):
            self.process.send_signal(number)
        code = self.process.wait(20)
        self._reader.join(5)
        return code

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line.rstrip("\n"))
