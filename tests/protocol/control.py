"""The control worker on virtual time: the product's watcher and intake, stepping aside at every call to a server.

The product's: Watcher, Cell, Liveness, withdraw_ended, Intake, vetting, UsageStreams, PriceBook. Thin, and what they
stand for:

- `Rows`: Postgres as autoscaler/watch/recorder.py and records.py keep it (which replicas live, which ended, and a new
  one ordered for one that ended), with its notes held in memory for a moment and lost with the process;
- `Ledger`: billing/booking.py (one row per request, committed or not at all), away when Postgres is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec
import redis
from django.db import OperationalError

from autoscaler.cell import Cell
from autoscaler.models import MachineState, ReplicaPhase
from autoscaler.reconcile import withdraw_ended
from autoscaler.watch.recorder import CellEmptied, Lost, Reported, WatchBegins
from autoscaler.watch.table import KnownReplica, Table
from autoscaler.watch.watcher import BACKOFF_FIRST_S, BACKOFF_MAX_S, Watcher
from billing.booking import Booked, Rated
from billing.intake import Intake
from billing.money import NanoPerMillion, Rates
from billing.usage_streams import UsageStreams
from tests.protocol.clock import EPOCH_S, Process, step_aside, stepping_aside
from tests.protocol.network import Ear, blocking_client
from workers.contract import ReplicaPhase as Phase

if TYPE_CHECKING:
    from tests.protocol.world import World

STALE_S = 2.0
NOTE_S = 0.02  # what the recorder takes for a note
START_S = (0.8, 2.0)


class VirtualCell(Cell):
    """The product's Cell over the virtual network."""

    def __init__(self, world: World) -> None:
        self._network = world.network
        self.keys = world.keys
        self.redis = blocking_client(world.network, socket_timeout=2.0)

    def pubsub(self) -> Any:
        keys = self.keys
        return Ear(self._network, (keys.event_pattern, keys.wake_channel, keys.invalidate_channel))

    def run_id(self) -> str:
        self.redis.ping()
        return f"start-{self._network.n_starts}"


class Rows:
    """What Postgres says of machines and replicas."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.table = Table(deployments=(world.deployment,))
        self.ended: list[tuple[str, str, str]] = []  # replica, machine, deployment

    def add(
        self, replica: str, machine: str, slots: int, phase: ReplicaPhase = ReplicaPhase.STARTING
    ) -> None:
        known = KnownReplica(replica, machine, self.world.deployment, slots, phase)
        self._put({**self.table.replicas, replica: known})

    def advance(self, replica: str, phase: ReplicaPhase) -> None:
        known = self.table.replicas.get(replica)
        if known is not None:
            self._put({**self.table.replicas, replica: replace(known, phase=phase)})

    def end(self, replica: str) -> None:
        """It is over: a new one is ordered, as the tick would."""
        if replica in self.table.replicas:
            left = dict(self.table.replicas)
            gone = left.pop(replica)
            self.ended.append((gone.id, gone.machine, gone.deployment))
            self._put(left)
            self.world.drop_desired(gone.machine, replica)
            self.world.order(gone.slots)

    def machines(self, states: dict[str, MachineState]) -> None:
        self.table = replace(self.table, version=self.table.version + 1, machines=states)

    def _put(self, replicas: dict[str, KnownReplica]) -> None:
        self.table = replace(self.table, version=self.table.version + 1, replicas=replicas)


class Notes:
    """The recorder as the watcher sees it. Notes wait in this process and die with it."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process

    @property
    def table(self) -> Table:
        return self._world.rows.table

    def note(self, note: Any) -> None:
        self._process.spawn(self._record(note))

    def want_tick(self, deployment: str, not_before_s: float = 0.0) -> None:
        pass

    def want_table(self) -> None:
        pass

    async def _record(self, note: Any) -> None:
        await asyncio.sleep(NOTE_S)
        while not self._world.postgres_up:
            await asyncio.sleep(0.5)
        rows = self._world.rows
        match note:
            case Lost(replica, _, _):
                rows.end(replica)
            case Reported(_, status) if status.phase in (Phase.FAILED, Phase.STOPPED):
                rows.end(status.replica)
            case Reported(_, status) if status.phase is Phase.READY:
                rows.advance(status.replica, ReplicaPhase.READY)
            case Reported(_, status) if status.phase is Phase.DRAINING:
                rows.advance(status.replica, ReplicaPhase.DRAINING)
            case CellEmptied() | WatchBegins():
                await self._restore()
            case _:
                pass

    async def _restore(self) -> None:
        """reconcile.restore, tried until it is through: a note stays first in the recorder's queue until then."""
        rows = self._world.rows
        while True:
            try:
                self._world.restore_cell()
                await stepping_aside(lambda: withdraw_ended(VirtualCell(self._world), tuple(rows.ended)))
                return
            except redis.RedisError:
                await asyncio.sleep(0.5)


class Control:
    """The process that watches."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process = Process(world.loop, "control", "control")
        self.watcher: Watcher | None = None
        self.process.spawn(self._run())

    async def _run(self) -> None:
        """watcher.py `_run`, its thread."""
        cell = VirtualCell(self.world)
        notes: Any = Notes(self.world, self.process)
        self.watcher = Watcher(cell, notes, stale_after_s=STALE_S, clock=self.world.time.monotonic)
        n_failures = 0
        while True:
            try:
                await stepping_aside(lambda: self.watcher.step(0))
                n_failures = 0
            except (redis.RedisError, AssertionError) as error:
                if isinstance(error, AssertionError):
                    raise
                n_failures += 1
                self.watcher._disconnected()
                await asyncio.sleep(min(BACKOFF_FIRST_S * 2 ** min(n_failures - 1, 10), BACKOFF_MAX_S))
            await asyncio.sleep(0.25)


@dataclass
class Row:
    """One booked request."""

    n_prompt: int
    n_completion: int
    cost_nano: int
    key: str
    attempts: int
    finish: str
    status: int
    n_deliveries: int = 1


class Ledger:
    """The books: one row per request."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rows: dict[str, Row] = {}

    def rates(self, version_ids: set[UUID]) -> dict[UUID, Rates]:
        price = self.world.price
        rates = Rates(
            NanoPerMillion(price.input_nano_per_million),
            NanoPerMillion(price.cached_nano_per_million),
            NanoPerMillion(price.output_nano_per_million),
        )
        return {version: rates for version in version_ids if version.hex == price.version}

    def book(self, rated: Sequence[Rated], received_at: datetime) -> Booked:
        self._answer()
        new = set()
        for item in rated:
            event = item.usage.event
            row = self.rows.get(event.request_id)
            if row is None:
                new.add(item.usage.request_id)
                self.rows[event.request_id] = Row(
                    event.n_prompt, item.usage.n_completion, item.cost_nano, event.key, event.attempts,
                    event.finish_reason.value, event.status,
                )  # fmt: skip
            else:
                row.n_deliveries += 1
        step_aside(asyncio.sleep(0.002))  # committed; the answer is on its way
        given = frozenset(item.usage.request_id for item in rated)
        return Booked(new=frozenset(new), repeated=given - new, refused=frozenset())

    def touch_keys(self, usages: Sequence[Any]) -> None:
        self._answer()

    def _answer(self) -> None:
        step_aside(asyncio.sleep(0.002))
        if not self.world.postgres_up:
            raise OperationalError("the database is away")


class Booking:
    """The process that books: tasks.py `run_intake` once a second."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.process = Process(world.loop, "intake", "control")
        self.process.spawn(self._run())

    async def _run(self) -> None:
        world = self.world
        client = blocking_client(world.network, socket_timeout=2.0)
        intake = Intake(
            UsageStreams(client, world.keys), world.ledger,
            clock=lambda: datetime.fromtimestamp(EPOCH_S + world.loop.now_s, tz=UTC),
        )  # fmt: skip
        while True:
            await asyncio.sleep(1.0)
            with suppress(redis.RedisError, OperationalError):
                await stepping_aside(lambda: intake.run(sorted(world.machines), 0.8))


def spec_json(spec: Any) -> bytes:
    return msgspec.json.encode(spec)
