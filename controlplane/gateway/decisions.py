"""What this gateway decided, told off the path: every refusal, and one admission in so many.

Fed by admission and by the app's refusals; a batch leaves for the cell's stream once a second, and intake brings it to
Postgres. Bounded in every direction: per tenant and second, per second, and in the stream; what does not fit is
counted. Nobody waits for it, and what is lost is lost. Holds ids, counts and predictions; never a prompt, an answer or
a key.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final

from controlplane.decisions.wire import (
    FIELD,
    MAX_CANDIDATES,
    MAX_TEXT,
    Batch,
    Candidate,
    Decision,
    Facts,
    Prediction,
    Refusals,
    encode,
)
from controlplane.gateway.errors import ApiError
from controlplane.gateway.forecasts import Forecasts
from controlplane.gateway.keycontext import KeyContext
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.stream import Stream
from controlplane.gateway.surface import Surface
from controlplane.policy.flows import ANY_MS
from controlplane.policy.routing import Ask
from workers.keys import DECISIONS_STREAM_MAX, CellKeys
from workers.redis_client import Client

EVERY_S: Final = 1.0
MAX_PER_TENANT: Final = 50  # a batch
MAX_KEPT: Final = 500
MAX_SERIES: Final = 2_000
# Refusals that say something about what was asked of us, rather than about the request.
TOLD: Final = frozenset({403, 429, 503, 504})
# Refused for want of capacity: misses of the promise. A limit of the tenant's own is none.
CAPACITY: Final = 503


class Decisions:
    """Of one gateway process. Belongs to one event loop. `sample`: share of admissions told; `url`: of the API."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        name: str,
        routes: RouteTable,
        forecasts: Forecasts,
        *,
        sample: float,
        url: str,
    ) -> None:
        self.n_told = self.n_dropped = 0
        self._redis = redis
        self._key = keys.decisions
        self._name = name
        self._routes = routes
        self._forecasts = forecasts
        self._every = round(1 / sample) if sample > 0 else 0
        self._url = url.rstrip("/")
        self._n_seen = 0
        self._kept: list[Decision] = []
        self._by_tenant: Counter[str] = Counter()
        self._refusals: Counter[tuple[str, str, str, str, int]] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def url(self, request: str) -> str:
        """Where a refused request is explained to whoever has a management token."""
        return f"{self._url}/api/v1/requests/req_{request}"

    def wants(self) -> bool:
        """Whether the next admission is one of those told. Called once per request."""
        self._n_seen += 1
        if self._n_seen != self._every:
            return False
        self._n_seen = 0
        return True

    def candidates(self, stream: Stream, ask: Ask) -> list[Candidate]:
        """The replicas considered, as they stand now."""
        return [
            Candidate(load.replica, load.used, load.slots, round(cost, 1), n_prefill, n_cached)
            for load, cost, n_prefill, n_cached in self._routes.scores(stream.deployment.id, ask)[
                :MAX_CANDIDATES
            ]
        ]

    def admitted(self, stream: Stream, candidates: list[Candidate]) -> None:
        """A request was bound or queued."""
        facts = self._facts(stream, candidates)
        facts.replica = stream.replica
        facts.waits_for_replica = stream.waited_for_replica
        self._keep(
            self._decision(
                stream.key, stream.request, "queued" if stream.queued else "bound", stream, facts=facts
            )
        )

    def refused(
        self, key: KeyContext, request: str, error: ApiError, stream: Stream | None, endpoint: Surface | None
    ) -> None:
        """A call was refused; its answer will name where that is explained."""
        if error.status not in TOLD:
            return
        error.details = {**error.details, "decision_url": self.url(request)}
        if stream is not None and error.status == CAPACITY and len(self._refusals) < MAX_SERIES:
            slo = stream.deployment.promise
            whose = (key.organization, key.project, stream.deployment.id, slo.name, slo.objective_ppm)
            if not stream.admitted:  # else its machine tells of it
                self._refusals[whose] += 1
                self._arm()
        if not self._has_room(key.organization):
            self.n_dropped += 1
            return
        facts = Facts() if stream is None else self._facts(stream, self._last_look(stream))
        facts.message = error.message[:MAX_TEXT]
        facts.retry_after_s = error.retry_after_s
        for name, value in error.headers:
            if name == b"x-corral-limit":
                facts.limit = value.decode()
            elif name == b"x-corral-scope":
                facts.scope = value.decode()
        facts.gateway = self._name
        facts.endpoint = endpoint.value if endpoint is not None else "events"
        self._keep(self._decision(key, request, "refused", stream, error.code, error.status, facts))

    def close(self) -> None:
        """Tell what is left."""
        if self._timer is not None:
            self._timer.cancel()
        self._send()

    def _last_look(self, stream: Stream) -> list[Candidate]:
        return self.candidates(stream, Ask(stream.hold.n_prompt))

    def _facts(self, stream: Stream, candidates: list[Candidate]) -> Facts:
        hold, deployment, terms = stream.hold, stream.deployment, stream.terms
        facts = Facts(
            gateway=self._name,
            endpoint=stream.endpoint.value,
            n_prompt=hold.n_prompt,
            n_output_max=hold.n_output,
            n_output_expected=stream.expected,
            band=deployment.promise.band,
            order=deployment.queue_order.value,
            admission="predicted" if deployment.predicts else "bounded",
            limits={name.decode(): value.decode() for name, value in stream.limits},
            candidates=candidates,
        )
        seen = self._forecasts.outlook(stream)
        if seen is not None and terms is not None:
            facts.prediction = Prediction(
                ttft_p50_s=round(seen.p50_s, 4),
                ttft_p90_s=round(seen.p90_s, 4),
                target_s=deployment.promise.ttft_ms / 1000,
                attainment=round(seen.attainment, 4),
                slot_s=terms.slot_ms / 1000,
                ahead_s=stream.ahead_ms / 1000,
                most_ahead_s=None if terms.most_ahead_ms == ANY_MS else terms.most_ahead_ms / 1000,
                slots=stream.slots,
            )
        return facts

    def _decision(
        self,
        key: KeyContext,
        request: str,
        outcome: str,
        stream: Stream | None,
        code: str = "",
        status: int = 0,
        facts: Facts | None = None,
    ) -> Decision:
        deployment = None if stream is None else stream.deployment
        return Decision(
            request=request,
            organization=key.organization,
            project=key.project,
            key=key.key,
            at_ms=time.time_ns() // 1_000_000,
            outcome=outcome,
            deployment="" if deployment is None else deployment.id,
            model="" if deployment is None else deployment.name,
            code=code[:40],
            status=status,
            slo_class="" if deployment is None else deployment.promise.name,
            facts=facts or Facts(),
        )

    def _has_room(self, organization: str) -> bool:
        return len(self._kept) < MAX_KEPT and self._by_tenant[organization] < MAX_PER_TENANT

    def _keep(self, decision: Decision) -> None:
        if not self._has_room(decision.organization):
            self.n_dropped += 1
            return
        self._by_tenant[decision.organization] += 1
        self._kept.append(decision)
        self._arm()

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EVERY_S, self._send)

    def _send(self) -> None:
        self._timer = None
        kept, self._kept = self._kept, []
        refusals, self._refusals = self._refusals, Counter()
        self._by_tenant.clear()
        if not (kept or refusals):
            return
        self.n_told += len(kept)
        batch = Batch(
            time.time_ns() // 1_000_000, kept, [Refusals(*whose, n) for whose, n in refusals.items()]
        )
        self._redis.fire("XADD", self._key, "MAXLEN", "~", DECISIONS_STREAM_MAX, "*", FIELD, encode(batch))
