"""The Redis side of intake: read what machines delivered, settle holds, acknowledge, put aside.

Called by intake only, as the trusted user. Every call has the client's socket timeout; redis-py's
ConnectionError and TimeoutError pass through, and the caller starts over: each step here may be repeated
without harm.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import msgspec
import redis

from billing.vetting import Admission, Delivery, Refusal
from workers.contract import USAGE_FIELD, WITNESS_FIELD, WITNESS_SPOOL
from workers.keys import RETENTION_MS, CellKeys
from workers.records import OLD_FIELDS, Admitted, decode_admitted, from_fields
from workers.scripts import LATE, SETTLE

# A replica's front reads its acknowledgements within a second; the list is for one that is away for a while.
# What falls off is re-published by the spool, booked before, and acknowledged again.
ACK_LENGTH: Final = 100_000
ACK_LIFE_MS: Final = 24 * 60 * 60 * 1000
BAD_LENGTH: Final = 1_000
BAD_PAYLOAD_BYTES: Final = 4_096


@dataclass(frozen=True, slots=True)
class Settlement:
    """Actual use of one request, for the limits that hold for it."""

    request: str
    n_prompt: int
    n_completion: int
    cost_nano: int
    n_cached: int = 0


@dataclass(frozen=True, slots=True)
class Lost:
    """Cost of a request that this Redis has lost before it was settled. Ids are bare hex."""

    key: str
    project: str
    org: str
    cost_nano: int
    end_customer: str = ""  # its pseudonym


@dataclass(frozen=True, slots=True)
class Done:
    """An entry that needs no more reading. `replica` and `request` are empty where they could not be made
    out.
    """

    delivery: Delivery
    replica: str = ""
    request: str = ""
    refusal: Refusal | None = None


class UsageStreams:
    """Usage streams of one cell."""

    def __init__(self, client: redis.Redis, keys: CellKeys) -> None:
        self._client = client
        self._keys = keys
        self._settle = client.register_script(SETTLE.source)
        self._late = client.register_script(LATE.source)

    def find_machines(self) -> set[str]:
        """Machines that have a usage stream. Walks all keys of the cell: not for every second."""
        found = self._client.scan_iter(self._keys.usage_pattern, count=1_000, _type="stream")
        return {machine for key in found if (machine := self._keys.machine_of_channel(key))}

    def read(self, machines: Sequence[str], limit: int) -> list[Delivery]:
        """The oldest entries, at most about `limit`, shared evenly between the machines that have any."""
        pipeline = self._client.pipeline(transaction=False)
        for machine in machines:
            pipeline.xlen(self._keys.machine(machine).usage)
        waiting = [machine for machine, n in zip(machines, pipeline.execute(), strict=True) if n]
        if not waiting:
            return []
        share = max(1, limit // len(waiting))
        for machine in waiting[:limit]:
            pipeline.xrange(self._keys.machine(machine).usage, count=share)
        return [
            Delivery(
                machine_id=machine,
                entry_id=entry_id.decode(),
                payload=fields.get(USAGE_FIELD.encode(), b""),
                from_spool=fields.get(WITNESS_FIELD.encode()) == WITNESS_SPOOL.encode(),
            )
            for machine, entries in zip(waiting, pipeline.execute(), strict=False)
            for entry_id, fields in entries
        ]

    def admissions(self, request_ids: Sequence[str]) -> list[Admission | None]:
        """The admission record of each request, None where it is gone; in the order given."""
        pipeline = self._client.pipeline(transaction=False)
        for request_id in request_ids:
            pipeline.hmget(self._keys.request(request_id), "adm", "state", "granted")
        found = pipeline.execute()
        return [
            _admission(self._admitted(request_id, packed, state), state, granted)
            for request_id, (packed, state, granted) in zip(request_ids, found, strict=True)
        ]

    def _admitted(self, request_id: str, packed: bytes | None, state: bytes | None) -> Admitted | None:
        """What a record says; also one that was in flight over an upgrade, for which it is asked again."""
        if state is None:
            return None
        if packed is not None:
            return decode_admitted(packed)
        found = self._client.hmget(self._keys.request(request_id), OLD_FIELDS)
        return from_fields(cast("list[bytes | None]", found))

    def settle(self, settlements: Iterable[Settlement], now_ms: int) -> None:
        """Give back what is held for these requests and charge what they used; at most once each, ever."""
        pipeline = self._client.pipeline(transaction=False)
        for item in settlements:
            self._settle(
                args=[
                    self._keys.prefix,
                    now_ms,
                    item.request,
                    item.n_prompt,
                    item.n_completion,
                    item.cost_nano,
                    RETENTION_MS,
                    item.n_cached,
                ],
                client=pipeline,
            )
        pipeline.execute()

    def charge_lost(self, lost: Iterable[Lost], booked_ms: int) -> None:
        """Add them to what their scopes have spent, where that was read from the ledger before `booked_ms`."""
        pipeline = self._client.pipeline(transaction=False)
        for item in lost:
            args: list[str | int] = [
                self._keys.prefix,
                booked_ms,
                item.cost_nano,
                item.key,
                item.project,
                item.org,
                f"{item.project}.{item.end_customer}" if item.end_customer else "",
            ]
            self._late(args=args, client=pipeline)
        pipeline.execute()

    def finish(self, done: Sequence[Done]) -> None:
        """Acknowledge to the spools, keep what was refused for a human, and forget the entries; one
        transaction.
        """
        acks: dict[str, list[str]] = defaultdict(list)
        entries: dict[str, list[str]] = defaultdict(list)
        bad: list[bytes] = []
        for item in done:
            machine = self._keys.machine(item.delivery.machine_id)
            entries[machine.usage].append(item.delivery.entry_id)
            if item.replica and item.request:
                acks[machine.ack(item.replica)].append(item.request)
            if item.refusal is not None:
                bad.append(_bad_record(item.delivery, item.refusal))
        pipeline = self._client.pipeline(transaction=True)
        for key, request_ids in acks.items():
            pipeline.rpush(key, *request_ids)
            pipeline.ltrim(key, -ACK_LENGTH, -1)
            pipeline.pexpire(key, ACK_LIFE_MS)
        if bad:
            pipeline.lpush(self._keys.usage_bad, *bad)
            pipeline.ltrim(self._keys.usage_bad, 0, BAD_LENGTH - 1)
        for key, entry_ids in entries.items():
            pipeline.xdel(key, *entry_ids)
        pipeline.execute()


def _admission(admitted: Admitted | None, state: bytes | None, granted: bytes | None) -> Admission | None:
    if admitted is None:
        return None
    # `granted` is there where money paid for less than was asked.
    return Admission(
        deployment=admitted.deployment,
        key=admitted.key,
        project=admitted.project,
        org=admitted.organization,
        price_version=admitted.price_version,
        n_output_held=admitted.n_output_asked if granted is None else int(float(granted)),
        settled=state == b"done",
    )


def _bad_record(delivery: Delivery, refusal: Refusal) -> bytes:
    record: dict[str, Any] = {
        "refusal": refusal.value,
        "machine": delivery.machine_id,
        "entry": delivery.entry_id,
        "payload": delivery.payload[:BAD_PAYLOAD_BYTES],  # base64 in the JSON
    }
    return msgspec.json.encode(record)
