"""What a machine's disk remembers of its replicas, so that an agent that comes back starts nothing twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from workers.config import MachineDirs
from workers.contract import ReplicaSpec, ReplicaStatus

_KEEP_LOGS: Final = 32


class Record(msgspec.Struct):
    """One replica: written before its fork (`end` None), and again when it has ended."""

    spec: ReplicaSpec
    end: ReplicaStatus | None = None
    gpus: list[str] = []  # its own among several


class Records:
    """The records of one machine, one small file each."""

    def __init__(self, dirs: MachineDirs) -> None:
        self._dirs = dirs

    def read_all(self) -> Iterator[Record]:
        """Every record that can be read; what cannot is removed."""
        for path in sorted(self._dirs.run.glob("*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=Record)
            except (OSError, msgspec.MsgspecError):
                path.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        """Whole or not at all."""
        path = self._dirs.record(record.spec.replica)
        scratch = path.with_suffix(".new")
        scratch.write_bytes(msgspec.json.encode(record))
        scratch.rename(path)

    def forget(self, replica: str) -> None:
        """Remove what is left of a replica, and the oldest logs beyond a bound."""
        for path in (self._dirs.record(replica), self._dirs.outcome(replica), self._dirs.beat(replica)):
            path.unlink(missing_ok=True)
        logs = sorted(self._dirs.logs.glob("*.log"), key=lambda path: path.stat().st_mtime)
        for path in logs[:-_KEEP_LOGS]:
            path.unlink(missing_ok=True)
