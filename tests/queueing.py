"""A deployment in virtual time: tenants that send, replicas that serve at a fixed pace, and a queue in between, which
is the twin in Python or the scripts of a real cell. Measures who was served how much."""

from __future__ import annotations

import heapq
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import redis

from controlplane.policy import estimate, prefix
from controlplane.policy.fairness import Binding, FairQueue
from controlplane.policy.flows import ANY_MS, Flow, Request, service
from workers import scripts
from workers.keys import RETENTION_MS, CellKeys
from workers.scripts import Script

START_MS = 1_800_000_000_000
PREFILL_PER_S = 4_000
DECODE_PER_S = 50
TRUE_UP_MS = 1_000  # as often as a gateway tells of long answers
TRUE_UP_STEP = 32
CONTEXT = 8_192


class Queue(Protocol):
    """What the world asks of a queue; see FairQueue."""

    def admit(
        self, request: Request, now_ms: int, candidates: Sequence[str] = ()
    ) -> tuple[str, list[Binding]]: ...

    def settle(
        self, request_id: str, now_ms: int, *, n_prompt: int, n_cached: int, n_output: int
    ) -> list[Binding]: ...

    def produced(self, request_id: str, n_output: int) -> None: ...

    def enrol(self, replica: str, slots: int, now_ms: int) -> list[Binding]: ...

    def __len__(self) -> int: ...


@dataclass
class Tenant:
    """Keeps `n_outstanding` requests under way, as a closed loop of clients. Lengths are drawn evenly from ranges."""

    name: str
    organization: str = ""  # its name, if nothing else is said
    weight: int = 100  # of the organization
    band: int = 0
    n_keys: int = 1
    n_outstanding: int = 40
    n_prompt: tuple[int, int] = (50, 600)
    n_output: tuple[int, int] = (20, 300)
    max_tokens: int | None = None
    cancels_at_first_token: bool = False
    n_prefixes: int = 0  # long prompts that begin alike, one of so many
    from_ms: int = 0
    until_ms: int = 1 << 50

    def __post_init__(self) -> None:
        self.organization = self.organization or self.name


@dataclass
class Running:
    tenant: Tenant
    request: Request
    n_output: int
    replica: str = ""
    n_cached: int = 0
    first_at_ms: int = 0
    ended_at_ms: int = 0
    counted: int = 0

    def produced(self, now_ms: int) -> int:
        return min(max((now_ms - self.first_at_ms) * DECODE_PER_S // 1000 + 1, 0), self.n_output)


@dataclass
class World:
    """Runs tenants against a queue. `service` counts tenths of prompt tokens that each tenant was really given, what
    is under way included. With `knows_lengths` every answer is predicted exactly."""

    queue: Queue
    tenants: list[Tenant]
    replicas: dict[str, int]
    seed: int = 0
    knows_lengths: bool = False
    service: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    n_prompt: int = 0
    n_cached: int = 0
    waited_ms: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    n_dispatched: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # by band
    idle_while_waiting: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.now_ms = START_MS
        self.events: list[tuple[int, int, str, str]] = []
        self.running: dict[str, Running] = {}
        self.calibrations: dict[str, estimate.Calibration] = {}
        self.caches: dict[str, prefix.PrefixIndex] = {name: prefix.PrefixIndex() for name in self.replicas}
        self.n = 0
        self.enrolled: dict[str, None] = {}
        self.n_busy: dict[str, int] = dict.fromkeys(self.replicas, 0)
        for i, tenant in enumerate(self.tenants):
            self._push(START_MS + tenant.from_ms, "begin", str(i))
        for name in self.replicas:  # the first requests wait for them
            self._push(START_MS, "enrol", name)
        self._push(START_MS + TRUE_UP_MS, "true-up", "")

    def run(self, for_ms: int, *, warm_up_ms: int = 0, check: Any = None) -> World:
        """Go on for so long; service is counted after the warm-up. `check(world)` is called after every event."""
        end_ms = self.now_ms + for_ms
        self._push(self.now_ms + warm_up_ms, "measure", "")
        while self.events and self.events[0][0] <= end_ms:
            self.now_ms, _, kind, name = heapq.heappop(self.events)
            if kind == "begin":
                tenant = self.tenants[int(name)]
                for _ in range(tenant.n_outstanding):
                    self._send(tenant)
            elif kind == "end":
                self._end(name)
            elif kind == "enrol":
                self._started(self.queue.enrol(name, self.replicas[name], self.now_ms))
                self.enrolled[name] = None
            elif kind == "measure":
                self.service.clear()
                self._count_running(-1)
                self.n_prompt = self.n_cached = 0
            else:
                self._true_up()
            if len(self.queue) and any(self.n_busy[r] < self.replicas[r] for r in self.enrolled):
                self.idle_while_waiting += 1
            if check is not None:
                check(self)
        self.now_ms = end_ms
        self._count_running(1)
        return self

    def ratio(self, one: str, other: str) -> float:
        return self.service[one] / self.service[other]

    def _count_running(self, sign: int) -> None:
        """Add or take away what was given to the requests under way."""
        for run in self.running.values():
            if run.replica:
                n_prompt = run.request.n_prompt if self.now_ms >= run.first_at_ms else run.n_cached
                given = service(n_prompt, run.n_cached, run.produced(self.now_ms))
                self.service[run.tenant.name] += sign * given

    def _push(self, at_ms: int, kind: str, name: str) -> None:
        self.n += 1
        heapq.heappush(self.events, (at_ms, self.n, kind, name))

    def _send(self, tenant: Tenant) -> None:
        if self.now_ms - START_MS >= tenant.until_ms:
            return
        self.n += 1
        rng = self.rng
        n_prompt, wished = rng.randint(*tenant.n_prompt), rng.randint(*tenant.n_output)
        held = CONTEXT - n_prompt if tenant.max_tokens is None else tenant.max_tokens
        calibration = self.calibrations.get(tenant.organization, estimate.NEW)
        key = f"{tenant.name}-k{rng.randrange(tenant.n_keys)}"
        flow = Flow(tenant.band, tenant.organization, f"{tenant.name}-p", key, (tenant.weight, 100, 100))
        prefixes: tuple[str, ...] = ()
        if tenant.n_prefixes:
            text = f"{tenant.organization}{rng.randrange(tenant.n_prefixes)}-".encode() * 4_000
            prefixes = prefix.hashes(tenant.organization, text[: 4 * n_prompt])
        request = Request(
            f"{self.n:08d}",
            flow,
            self.now_ms,
            n_prompt,
            min(wished, held) if self.knows_lengths else estimate.expected_output(calibration, held),
            prefixes,
        )
        run = Running(tenant, request, min(wished, held), counted=request.n_expected)
        self.running[request.id] = run
        free = [name for name in self.enrolled if self.n_busy[name] < self.replicas[name]]
        verdict, bindings = self.queue.admit(request, self.now_ms, free)
        if verdict == "full":
            del self.running[request.id]
            return
        self._started(bindings)

    def _started(self, bindings: list[Binding]) -> None:
        for request_id, replica in bindings:
            run = self.running[request_id]
            request, cache = run.request, self.caches[replica]
            run.replica = replica
            run.n_cached = prefix.cached_tokens(cache.longest(request.prefixes), request.n_prompt)
            cache.note(request.prefixes, self.now_ms)
            run.first_at_ms = self.now_ms + (request.n_prompt - run.n_cached) * 1000 // PREFILL_PER_S + 1
            if run.tenant.cancels_at_first_token:
                run.n_output = 1
            run.ended_at_ms = run.first_at_ms + run.n_output * 1000 // DECODE_PER_S
            self.n_busy[replica] += 1
            assert self.n_busy[replica] <= self.replicas[replica], "more requests than slots"
            self.n_dispatched[request.flow.band] += 1
            self.waited_ms[run.tenant.name].append(self.now_ms - request.admitted_at_ms)
            self._push(run.ended_at_ms, "end", request_id)

    def _end(self, request_id: str) -> None:
        run = self.running.pop(request_id)
        request = run.request
        self.n_busy[run.replica] -= 1
        self.service[run.tenant.name] += service(request.n_prompt, run.n_cached, run.n_output)
        self.n_prompt += request.n_prompt
        self.n_cached += run.n_cached
        known = self.calibrations.get(request.flow.organization, estimate.NEW)
        self.calibrations[request.flow.organization] = estimate.observe_output(known, run.n_output)
        self._started(
            self.queue.settle(
                request_id,
                self.now_ms,
                n_prompt=request.n_prompt,
                n_cached=run.n_cached,
                n_output=run.n_output,
            )
        )
        self._send(run.tenant)

    def _true_up(self) -> None:
        for request_id, run in self.running.items():
            if run.replica and (n := run.produced(self.now_ms)) >= run.counted + TRUE_UP_STEP:
                run.counted = n
                self.queue.produced(request_id, n)
        self._push(self.now_ms + TRUE_UP_MS, "true-up", "")


class CellQueue:
    """The scripts of a real cell behind the interface of the twin."""

    def __init__(
        self, client: redis.Redis, *, bound: int = 2_000, window: int = 0, age_ms: int = 30_000
    ) -> None:
        self.r = client
        self.keys = CellKeys("t0")
        self.bound, self.window, self.age_ms = bound, window, age_ms
        self.replicas: list[str] = []
        self.n_waiting = 0
        for script in scripts.TRUSTED_SCRIPTS:
            client.script_load(script.source)

    def __len__(self) -> int:
        """As the last call left it."""
        return self.n_waiting

    def _run(self, script: Script, *args: Any, body: str = "") -> tuple[Any, list[Binding]]:
        """The answer, and what the replicas' consumers find in their lists. One round trip."""
        pipeline = self.r.pipeline(transaction=False)
        if body:
            pipeline.set(self.keys.body(body), b"BODY")
        pipeline.evalsha(script.sha, 0, self.keys.prefix, *args)
        for replica in self.replicas:
            pipeline.rpop(f"{self.keys.machine('m1').prefix}replica.{replica}", 256)
        pipeline.zcard(self.keys.queue("d1"))
        answer, *messages, self.n_waiting = pipeline.execute()[1 if body else 0 :]
        return answer, [
            (json.loads(json.loads(message)["body"])[0][0], replica)
            for replica, found in zip(self.replicas, messages, strict=True)
            for message in found or ()
        ]

    def admit(
        self, request: Request, now_ms: int, candidates: Sequence[str] = ()
    ) -> tuple[str, list[Binding]]:
        request.admitted_at_ms = now_ms
        flow = request.flow
        scopes: list[Any] = []
        ids = (flow.key, flow.project, flow.organization)
        for scope_id, weight in zip(ids, reversed(flow.weights), strict=True):
            scopes += [scope_id, -1, -1, -1, -1, -1, weight]
        verdict, bindings = self._run(
            scripts.ADMIT, now_ms, request.id, "d1", "g1", 7, "pv1", request.n_prompt, CONTEXT, 0, request.order_key,
            self.bound, RETENTION_MS, 0, "", 0, *scopes, flow.band, request.n_expected, "".join(request.prefixes),
            self.window, self.age_ms, 0, 0, ANY_MS, 0, *candidates, body=request.id,
        )  # fmt: skip
        return verdict[0].decode(), bindings

    def settle(
        self, request_id: str, now_ms: int, *, n_prompt: int, n_cached: int, n_output: int
    ) -> list[Binding]:
        args = (now_ms, request_id, n_prompt, n_output, 0, RETENTION_MS, n_cached)
        return self._run(scripts.SETTLE, *args)[1]

    def produced(self, request_id: str, n_output: int) -> None:
        self._run(scripts.CHARGE, request_id, n_output)

    def enrol(self, replica: str, slots: int, now_ms: int) -> list[Binding]:
        self.replicas.append(replica)
        return self._run(scripts.ENROL, now_ms, replica, "m1", "d1", slots)[1]


def twin(**settings: int) -> FairQueue:
    return FairQueue(bound=100_000, **settings)
