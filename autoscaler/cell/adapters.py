"""LoRA adapters in the cell: what machines may be asked for, and what their replicas say that they have in memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import msgspec

from autoscaler.cell.connection import Connection
from autoscaler.cell.desired import BELL_MAX
from workers.contract import AdapterSpec

MAX_NOTED: Final = 256  # of a replica: more fit into no engine's memory
_ID: Final = re.compile(r"[0-9a-f]{32}\Z")
_json = msgspec.json.Encoder()
_decode = msgspec.json.Decoder(AdapterSpec).decode


class CellAdapters(Connection):
    """Written by ticks (machines) and by the watcher (replicas)."""

    def bring_adapters(
        self,
        machine: str,
        deployment: str,
        wanted: Iterable[str],
        spec_of: Callable[[str], AdapterSpec],
        fresh_since_ms: int,
    ) -> int:
        """The machine may be asked for these adapters of the deployment and no others of it; how many changed.

        `spec_of` is called for those that are missing or were written before `fresh_since_ms`.
        """
        keys = self._machine(machine)
        known = _read(cast(dict[bytes, bytes], self.redis.hgetall(keys.adapters)))
        wanted = set(wanted)
        stale = [
            name
            for name in sorted(wanted)
            if (spec := known.get(name)) is None
            or spec.deployment != deployment
            or (spec.urls and spec.at_ms < fresh_since_ms)
        ]
        gone = [name for name, spec in known.items() if spec.deployment == deployment and name not in wanted]
        if not stale and not gone:
            return 0
        pipeline = self.redis.pipeline(transaction=True)
        if stale:
            mapping: Mapping[str, bytes] = {name: _json.encode(spec_of(name)) for name in stale}
            pipeline.hset(keys.adapters, mapping=cast(dict[Any, Any], mapping))
        if gone:
            pipeline.hdel(keys.adapters, *gone)
        pipeline.lpush(keys.bell, "1")
        pipeline.ltrim(keys.bell, 0, BELL_MAX - 1)
        pipeline.execute()
        return len(stale) + len(gone)

    def note_adapters(self, replica: str, held: Iterable[str]) -> None:
        """What the replica has in memory, for gateways to route by. Machines are not trusted to speak well."""
        names = [name for name in list(held)[:MAX_NOTED] if _ID.match(name)]
        self.redis.hset(self.keys.replica(replica), "ad", " ".join(names))


def _read(found: dict[bytes, bytes]) -> dict[str, AdapterSpec]:
    """Without what nobody of ours wrote: it is written again where it is wanted."""
    specs = {}
    for name, payload in found.items():
        try:
            specs[name.decode()] = _decode(payload)
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return specs
