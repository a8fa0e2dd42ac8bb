"""The connection of the trusted, synchronous side to a cell's Redis: calls with a timeout, scripts by digest."""

from __future__ import annotations

import time
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from workers.keys import CellKeys, MachineKeys
from workers.scripts import MACHINE_SCRIPTS, Script

TIMEOUT_S = 2.0


class Connection:
    """Safe to share between threads (redis-py's connection pool is)."""

    def __init__(self, url: str, keys: CellKeys) -> None:
        self.keys = keys
        self.redis = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            max_connections=16,
            client_name="autoscaler",
        )

    def run_id(self) -> str:
        """Changes when the server was restarted or replaced."""
        return str(self.redis.info("server")["run_id"])

    def load_machine_scripts(self) -> None:
        """Machines run scripts by name only and may not load any: somebody trusted must, after every start of Redis."""
        for script in MACHINE_SCRIPTS:
            self.redis.script_load(script.source)

    def _machine(self, machine: str) -> MachineKeys:
        return self.keys.machine(machine)

    def _run(self, script: Script, *args: str | int | bytes) -> Any:
        return self._run_bare(script, self.keys.prefix, time.time_ns() // 1_000_000, *args)

    def _run_bare(self, script: Script, *arguments: str | int | bytes) -> Any:
        try:
            return self.redis.evalsha(script.sha, 0, *arguments)
        except redis.exceptions.NoScriptError:
            return self.redis.eval(script.source, 0, *arguments)
