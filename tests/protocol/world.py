"""One small cell on virtual time, from its gateways to its books, and what must hold of it.

A test builds a `World` from a seed, asks questions through its clients, breaks things, and calls `rest()`: the world
then runs until nothing moves any more, and every promise is checked (checks.py). A failure prints the seed and the
last events; CORRAL_PROTOCOL_SEED runs that seed again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import uuid_utils

import controlplane.gateway.app
import controlplane.gateway.gateway
from autoscaler.models import MachineState, ReplicaPhase
from controlplane.gateway.directory import LimitsRow, PriceRow
from tests.controlplane.gateway.harness import DEPLOYMENT, FakeDirectory
from tests.protocol import checks, clock, fleet
from tests.protocol.clock import Stuck, VirtualLoop, VirtualTime
from tests.protocol.control import Booking, Control, Ledger, Rows
from tests.protocol.fleet import PROFILE, Agent, Front
from tests.protocol.network import Network
from tests.protocol.surface import Answer, Client, Door, Ids
from tests.records import expanded
from workers import scripts
from workers.contract import ReplicaSpec
from workers.keys import CellKeys

KEYS = CellKeys("t0")
SLOTS = 4
PASSWORD_SHA = "0" * 64
BUDGET_NANO = 1_000_000_000
TIDY_S = 2.5  # agents and watchers tidy up once a second
LIMIT_S = 240.0  # of virtual time: what has not come to rest by then never will


class Chance:
    """Small faults that may happen anywhere, by name; none unless given a probability."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.p: dict[str, float] = {}

    def __call__(self, name: str) -> bool:
        p = self.p.get(name, 0.0)
        return p > 0 and self.rng.random() < p

    def delay(self, name: str, most_s: float) -> float:
        return self.rng.uniform(0.0, most_s) if self(name) else 0.0


class World:
    """See the module."""

    def __init__(self, seed: int, redis_url: str, var: Path) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.loop = VirtualLoop(seed)
        self.time = VirtualTime(self.loop)
        self.keys = KEYS
        self.var = var
        self.profile = PROFILE
        self.deployment = DEPLOYMENT
        self.stream_buffer = 1024
        self.network = Network(self.loop, redis_url, random.Random(self.rng.random()))
        self.network.empty()
        self.network.after_script.append(self._ring_consumers)
        self.chance = Chance(random.Random(self.rng.random()))
        self.network.reply_takers.append(
            lambda process, data: process.host in self.machines and self.chance("reply_lost")
        )
        self.skew_s: dict[str, float] = {}
        self.log: list[str] = []
        self.postgres_up = True
        self.machines: list[str] = []
        self.dead_machines: set[str] = set()
        self.fronts: dict[str, Front] = {}
        self.agents: dict[str, Agent] = {}
        self.doors: list[Door] = []
        self.clients: list[Client] = []
        self.allowed_codes: set[str] = set()  # retryable errors that the faults of this run excuse
        self.forgot = False  # Redis lost something that it had promised to keep
        self.directory = FakeDirectory()
        self.directory.spent_nano = self._spent_nano
        self.price = PriceRow("c" * 32, 1_000_000, 500_000, 2_000_000)
        self.key = self.directory.add_key(key_limits=LimitsRow(max_concurrency=200, budget_nano=BUDGET_NANO))
        self.budgets: dict[str, int] = {}  # of keys with little money, by id
        self.rows = Rows(self)
        self.ledger = Ledger(self)
        self._n_ids = 0
        self._url = urlsplit(redis_url)
        self._lengths = self.network.wire()
        self._lengths.execute(self.network._auth)
        for script in (*scripts.TRUSTED_SCRIPTS, *scripts.MACHINE_SCRIPTS):
            self.network.admin.script_load(script.source)

    # -- building

    def build(self, *, machines: int = 2, replicas: int = 2, gateways: int = 2, slots: int = SLOTS) -> World:
        for _ in range(machines):
            self.add_machine()
        for i in range(replicas):
            self.add_replica(self.machines[i % machines], slots)
        for i in range(gateways):
            self.doors.append(Door(self, f"gateway:{i}"))
        self.control = Control(self)
        self.booking = Booking(self)
        self.client = self.add_client()
        return self

    def add_client(self) -> Client:
        self.clients.append(Client(self, f"client:{len(self.clients)}"))
        return self.clients[-1]

    def add_machine(self) -> str:
        machine = self.new_id()
        self.machines.append(machine)
        self.make_user(machine)
        self.rows.machines(dict.fromkeys(self.machines, MachineState.READY))
        self.agents[machine] = Agent(self, machine)
        return machine

    def make_user(self, machine: str) -> None:
        """Enrolment's user, with its very rules; the password is 'pw'."""
        import hashlib

        keys = self.keys.machine(machine)
        rules = keys.acl_rules(hashlib.sha256(b"pw").hexdigest())
        self.network.admin.execute_command("ACL", "SETUSER", keys.redis_user, *rules)

    def key_with(self, **limits: int) -> str:
        """An API key of its own, with these limits."""
        if "budget_nano" in limits:
            self.budgets[f"{len(self.directory.records):032x}"] = limits["budget_nano"]
        return self.directory.add_key(key_limits=LimitsRow(**limits))

    def machine_url(self, machine: str) -> str:
        return f"redis://{self.keys.machine(machine).redis_user}:pw@{self._url.hostname}:{self._url.port}/0"

    def add_replica(self, machine: str, slots: int = SLOTS) -> Front:
        replica = self.new_id()
        self.rows.add(replica, machine, slots)
        front = self.fronts[replica] = Front(self, replica, machine, slots)
        self.set_desired(machine, front.spec)
        return front

    def set_clock(self, host: str, skew_s: float) -> None:
        """The wall clock of a machine or gateway is wrong by so much."""
        self.skew_s[host] = skew_s
        owners = [*self.fronts.values(), *self.agents.values(), *self.doors]
        for process in (owner.process for owner in owners if owner.process.host == host):
            process.skew_s = skew_s

    def order(self, slots: int) -> None:
        """A replica has ended: another one comes up a while later, on a machine that lives."""
        nobody = contextvars.Context()  # a provider's work: it goes on whoever dies
        self.loop.call_later(self.rng.uniform(0.8, 2.0), self._start_ordered, slots, context=nobody)

    def _start_ordered(self, slots: int) -> None:
        hosts = [m for m in self.machines if m not in self.dead_machines]
        if not hosts:
            hosts = [self.add_machine()]
        host = min(hosts, key=lambda m: sum(f.machine == m and f.process.alive for f in self.fronts.values()))
        self.note(f"a new replica starts on {host[-4:]}")
        self.add_replica(host, slots)

    # -- what the control plane would write (Cell.set_desired and reconcile)

    def set_desired(self, machine: str, spec: ReplicaSpec) -> None:
        key = self.keys.machine(machine).desired
        self.network.admin.hset(key, spec.replica, msgspec.json.encode(spec))
        self.network.admin.hincrby(key, "generation", 1)

    def drop_desired(self, machine: str, replica: str) -> None:
        self.network.admin.hdel(self.keys.machine(machine).desired, replica)

    def drain(self, front: Front) -> None:
        """The autoscaler wants it gone, gently (a spot notice, a scale-down)."""
        self.rows.advance(front.id, ReplicaPhase.DRAINING)
        self.set_desired(front.machine, msgspec.structs.replace(front.spec, drain=True))

    def restore_cell(self) -> None:
        """reconcile.restore: users and desired replicas, from Postgres."""
        for machine in self.machines:
            self.make_user(machine)
        for replica in self.rows.table.replicas:
            front = self.fronts[replica]
            self.set_desired(front.machine, front.spec)

    # -- looking

    def new_id(self) -> str:
        self._n_ids += 1
        return f"{self._n_ids:032x}"

    @property
    def r(self) -> Any:
        """Redis as a test sees it: at once, whatever the network does."""
        return self.network.admin

    @property
    def answers(self) -> list[Answer]:
        return [answer for client in self.clients for answer in client.answers]

    def live_fronts(self) -> list[Front]:
        return [f for f in self.fronts.values() if f.process.alive]

    def record(self, request: str) -> dict[bytes, bytes]:
        return expanded(self.r.hgetall(self.keys.request(request)))

    def front_of(self, request: str) -> Front | None:
        rid = self.r.hget(self.keys.request(request), "rid")
        return self.fronts.get(rid.decode()) if rid else None

    def note(self, text: str) -> None:
        self.log.append(f"{self.loop.now_s:8.3f}  {text}")

    async def _spent_nano(self, scope: str, scope_id: str) -> Any:
        await asyncio.sleep(0.002)
        self.directory._require_up()
        return (
            sum(row.cost_nano for row in self.ledger.rows.values() if row.key == scope_id)
            if scope == "key"
            else 0
        )

    def _ring_consumers(self) -> None:
        """What BLMOVE does for a consumer: it wakes when its queue is not empty."""
        consumers = [f.consumer for f in self.live_fronts() if f.consumer and not f.consumer.wake.is_set()]
        if not consumers:
            return
        import hiredis

        data = b"".join(hiredis.pack_command(("LLEN", c.queue)) for c in consumers)
        lengths = self._lengths.execute(data).split(b"\r\n")
        for consumer, length in zip(consumers, lengths, strict=False):
            if length != b":0":
                delay_s = self.rng.uniform(0.0005, 0.003)
                self.loop.call_later(delay_s, consumer.wake.set, context=consumer.front.process.context())

    # -- running

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(work)

    async def until(self, condition: Callable[[], Any], within_s: float = 60.0, step_s: float = 0.02) -> Any:
        """The first true value of `condition`, looked at every `step_s`."""
        deadline = self.loop.now_s + within_s
        while not (value := condition()):
            if self.loop.now_s >= deadline:
                raise Stuck(f"not within {within_s:g} s")
            await asyncio.sleep(step_s)
        return value

    async def ready(self) -> None:
        """Gateways are open and the replicas are routed to."""
        await self.until(
            lambda: (
                all(d.open for d in self.doors)
                and self.r.scard(self.keys.replicas(self.deployment)) >= len(self.live_fronts())
            )
        )

    async def rest(self) -> None:
        """Until every client has its answer and every trace of every request is settled and booked."""
        while not all(answer.over for answer in self.answers) or not checks.at_rest(self):
            if self.loop.now_s > LIMIT_S:
                raise Stuck("something waits for ever: " + checks.what_waits(self))
            await asyncio.sleep(0.25)
        n_ended = -1
        while n_ended != (n_ended := sum(not front.process.alive for front in self.fronts.values())):
            await asyncio.sleep(TIDY_S)  # again where a replica ended meanwhile: its agent has yet to see it
        checks.everything(self)

    def close(self) -> None:
        self.loop.shut_down()
        self._lengths.close()
        self.network.close()


@contextmanager
def world(seed: int, redis_url: str, **build: Any) -> Iterator[World]:
    """A world of this seed, on an empty Redis; what fails inside is told with seed and story."""
    var = Path(tempfile.mkdtemp(prefix="corral-protocol-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, var, ignore_errors=True)
        made = World(seed, redis_url, var)
        stack.callback(_close_quietly, made)
        stack.enter_context(clock.installed(made.loop))
        stack.enter_context(fleet.installed(made.loop))
        for module in (controlplane.gateway.app, controlplane.gateway.gateway):
            assert module.uuid_utils is uuid_utils
            module.uuid_utils = Ids(made)
            stack.callback(setattr, module, "uuid_utils", uuid_utils)
        asyncio.set_event_loop(None)
        try:
            made.build(**build)
            yield made
            _raise_errors(made)
        except Exception as error:
            story = "\n".join([*made.log[-60:], *_errors(made)])
            error.add_note(f"seed {seed}: run again with CORRAL_PROTOCOL_SEED={seed}\n{story}")
            raise


def _errors(made: World) -> list[str]:
    """What failed inside of processes: never allowed."""
    found = [
        f"{task.get_coro().__qualname__}: {task.exception()!r}"
        for task in made.loop.tasks
        if task.done() and not task.cancelled() and task.exception() is not None
    ]
    return found + [f"{context.get('message')}: {context.get('exception')!r}" for context in made.loop.errors]


def _raise_errors(made: World) -> None:
    assert not (errors := _errors(made)), errors


def _close_quietly(made: World) -> None:
    with contextlib.suppress(Exception):
        made.close()
