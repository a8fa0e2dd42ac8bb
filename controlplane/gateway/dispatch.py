"""From a checked request to a replica or the queue in one write.

Called by the generation handler. All numbers are computed here from the pure policies; the admission script
only compares and takes. How a request ends is in ends.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from billing.money import Nano
from controlplane.gateway import endlimits, ratelimits, windows
from controlplane.gateway.auth import Deployment, KeyContext
from controlplane.gateway.decisions import Decisions
from controlplane.gateway.directory import DirectoryUnavailable, KeyDirectory
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError, Headers, bad_request, unavailable
from controlplane.gateway.forecasts import Forecasts
from controlplane.gateway.identity import Digests
from controlplane.gateway.placements import Placements
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.stream import Origin, Stream
from controlplane.gateway.surface import Surface, served_as
from controlplane.gateway.toolcalls import CallReader
from controlplane.policy import admission, estimate, prefix
from controlplane.policy.lengths import likely
from controlplane.policy.ordering import QueueOrder, order_key, predicted_ms
from controlplane.policy.promises import best
from controlplane.policy.routing import Ask
from controlplane.prediction.lengths.model import LengthModel
from workers import contract, scripts
from workers.contract import RequestEnvelope
from workers.keys import RETENTION_MS, CellKeys
from workers.redis_client import Client, RedisError, RedisUnavailable

_MAX_ROOMY: Final = 50_000
_SCOPE_NAMES: Final = {"end": "end customer", "key": "API key", "prj": "project", "org": "organization"}


class Dispatcher:
    """Admission for one gateway process. Belongs to one event loop."""

    def __init__(
        self,
        redis: Client,
        keys: CellKeys,
        gateway: str,
        directory: KeyDirectory,
        routes: RouteTable,
        ends: Ends,
        *,
        queue_bound: int,
        queue_age_s: float,
        request_timeout_s: float,
        stream_buffer: int,
        digests: Digests,
        placements: Placements,
        forecasts: Forecasts,
        decisions: Decisions,
        lengths: LengthModel | None = None,
        first_number: int = 0,
    ) -> None:
        """`first_number`: streams are numbered from there, so that two of these may share an inbox."""
        self._redis = redis
        self._lengths = lengths
        self._keys = keys
        self._gateway = gateway
        self._directory = directory
        self._routes = routes
        self._placements = placements
        self._forecasts = forecasts
        self._decisions = decisions
        self._ends = ends
        self._queue_bound = queue_bound
        self._age_ms = int(queue_age_s * 1000)
        self._timeout_s = request_timeout_s
        self._buffer = stream_buffer
        # A body outlives its request's timeout, and is found by a resume until the record is gone.
        self._body_ms = int(request_timeout_s * 1000) + RETENTION_MS
        self._digests = digests
        self._roomy: set[str] = set()  # keys of which the last admission found room for many more
        self._n_streams = first_number

    def open(
        self,
        request_id: str,
        key: KeyContext,
        deployment: Deployment,
        request: GenerationRequest,
        origin: Origin | None = None,
    ) -> Stream:
        """A stream for the request, known to the inbox before anything is sent, because frames may be
        quick. With `origin` it continues that one, and only the rest is held."""
        ids = request.token_ids  # a count that is known teaches the calibration nothing
        raw = 0 if ids is not None else estimate.raw_tokens(request.n_text_bytes, request.n_messages)
        if request.tier is not None or request.slo_class is not None:
            deployment = _chosen(deployment, request)
        calibration = self._ends.calibration(key.organization, deployment.id)
        n_exact = None if ids is None else min(len(ids), deployment.context_tokens)
        n_prompt = n_exact or min(estimate.estimate(raw, calibration), deployment.context_tokens)
        hold = admission.hold(
            n_prompt,
            request.max_tokens,
            deployment.context_tokens,
            deployment.rates,
            streaming=request.stream,
            n_paid=n_exact
            or min(
                estimate.upper_bound(n_prompt, calibration, is_roomy=key.key in self._roomy),
                deployment.context_tokens,
            ),
        )
        if origin is not None:
            hold = admission.rest(hold, origin.n_carried_prompt, origin.n_carried, deployment.rates)
        stream = Stream(
            self.next_number(),
            request_id,
            request.endpoint,
            key,
            deployment,
            hold,
            streaming=request.stream,
            raw_estimate=raw,
            expected=estimate.expected_output(calibration, hold.n_output),
            now=time.monotonic(),
            now_ms=time.time_ns() // 1_000_000,
            timeout_s=self._timeout_s,
            buffer=self._buffer,
            origin=origin,
        )
        stream.is_greedy = request.body.temperature == 0
        if request.calls is not None:
            stream.calls = CallReader(only_one=not request.calls.many)
        if self._lengths is not None and deployment.queue_order is QueueOrder.SJF:
            stream.predicted = self._lengths.predict(request.question(), deployment.name)
        self._ends.inbox.streams[stream.number] = stream
        return stream

    def next_number(self) -> int:
        """A number that no other stream of this process has."""
        self._n_streams += 1
        return self._n_streams

    def reopen(
        self,
        number: int,
        request_id: str,
        key: KeyContext,
        deployment: Deployment,
        origin: Origin,
        *,
        endpoint: Surface,
        streaming: bool,
        admitted_ms: int,
        timeout_s: float,
        calls: CallReader | None = None,
    ) -> Stream:
        """A stream for a request that was admitted before, known to the inbox."""
        stream = Stream(
            number,
            request_id,
            endpoint,
            key,
            deployment,
            admission.hold(1, None, deployment.context_tokens, deployment.rates, streaming=streaming),
            streaming=streaming,
            raw_estimate=0,
            expected=0,
            now=time.monotonic(),
            now_ms=admitted_ms,
            timeout_s=timeout_s,
            buffer=self._buffer,
            origin=origin,
        )
        stream.admitted = True
        stream.calls = calls
        self._ends.inbox.streams[number] = stream
        return stream

    async def admit(self, stream: Stream, request: GenerationRequest, body: bytes) -> None:
        """Take the holds and bind or queue the request; ApiError says what refused it. Call once per
        stream."""
        if not stream.note:
            stream.note = self._digests.note(request, body, keyed=stream.keep)
        ask = self._ask(stream, request)
        told = self._decisions.candidates(stream, ask) if self._decisions.wants() else None
        verdict = await self._try_admit(stream, request, body, ask)
        ends = stream.key.ends
        n_seeds = 1 + len(stream.key.budgets) + (0 if ends is None else ends.n_seeds)
        for n in range(n_seeds):
            if verdict[0] != b"seed":
                break
            await self._seed(stream.key, verdict, Nano(stream.hold.money_nano), last=n >= n_seeds - 2)
            verdict = await self._try_admit(stream, request, body, ask)
        outcome = verdict[0]
        if outcome == b"bound":
            stream.replica = verdict[2].decode()
            did, replica = stream.deployment.id, stream.replica
            stream.machine, stream.placed = self._routes.bound(did, replica, ask)
            self._placements.note(did, replica, ask)
            stream.limits = ratelimits.headers(verdict[4:])
        elif outcome == b"queued":
            stream.queued = True
            stream.waited_for_replica = bool(verdict[2])
            stream.limits = ratelimits.headers(verdict[5:])
            self._forecasts.queued(stream, verdict[4])
        elif outcome == b"late":
            stream.limits = ratelimits.headers(verdict[3:])
            raise self._forecasts.refusal(stream, verdict[2])
        elif outcome == b"refused":
            stream.limits = ratelimits.headers(verdict[6:])
            raise _refusal(stream.key, *verdict[1:6])
        elif outcome == b"full":
            whose = "" if verdict[2] == b"deployment" else ", as many of them yours as may"
            stream.limits = ratelimits.headers(verdict[3:])
            raise unavailable(
                "queue_full",
                f"{verdict[1]} requests already wait for this model{whose}: try again shortly",
                2.0,
            )
        elif outcome == b"seed":
            raise unavailable(
                "budget_unavailable", "the budget cannot be read at the moment: try again shortly", 2.0
            )
        elif outcome == b"gone":
            raise unavailable("cell_unavailable", "the request could not be stored: try again shortly", 1.0)
        else:
            raise ApiError(409, "request_exists", "a request with this id exists: send it again")
        self._note_room(stream)
        stream.admitted = True
        if told is not None:
            self._decisions.admitted(stream, told)
        if stream.end is None:
            stream.live_machine = stream.machine
            if stream.held_back:
                self._ends.inbox.take_early(stream)

    def _note_room(self, stream: Stream) -> None:
        roomy, key = self._roomy, stream.key.key
        if not stream.is_roomy:
            roomy.discard(key)
        elif key not in roomy:
            if len(roomy) >= _MAX_ROOMY:
                roomy.clear()
            roomy.add(key)

    async def _try_admit(
        self, stream: Stream, request: GenerationRequest, body: bytes, ask: Ask
    ) -> list[Any]:
        key, deployment, hold, origin = stream.key, stream.deployment, stream.hold, stream.origin
        promise = deployment.promise
        band = promise.band
        candidates = self._routes.candidates(deployment.id, ask, stream.number, stream.request)
        terms = self._forecasts.terms(stream, ask, candidates)
        end_customer = self._digests.end_customer(key.organization, request)
        ends = None if key.ends is None else key.ends.scope(end_customer)
        budgeted = key.budgeted or (ends is not None and key.ends is not None and key.ends.budgeted)
        last: tuple[Any, ...] = ()
        if key.budgets:
            last = windows.argument(key.budgets, deployment.name, deployment.base)
        if ends is not None:
            last = endlimits.argument(ends, last)
        envelope = RequestEnvelope(
            id=stream.request,
            org=key.organization,
            project=key.project,
            key=key.key,
            deployment=deployment.id,
            model=deployment.name,
            endpoint=served_as(stream.endpoint),
            payload=body,
            sampling=request.sampling(hold.n_output + (0 if origin is None else origin.n_carried)),
            price_version=deployment.price_version,
            slo=deployment.slo,
            end_customer=end_customer,
            admitted_at_ms=stream.admitted_at_ms,
            stream=stream.streaming,
            priority=band,
            cache_salt=_salt(key, deployment),
            adapter=deployment.adapter,
            zero_retention=key.zero_retention,
            open_ended=request.max_tokens is None,
            n_prompt_held=max(1, hold.n_paid) if budgeted else 0,
            prompt_rate=admission.prompt_rate(deployment.rates) if budgeted else 0,
            output_rate=deployment.rates.output if budgeted else 0,
        )
        if origin is not None:
            envelope.continues = origin.request
            envelope.n_carried, envelope.n_carried_prompt = origin.n_carried, origin.n_carried_prompt
        now_ms = time.time_ns() // 1_000_000
        try:
            verdict, stream.is_roomy = await self._ends.passes.admit(
                self._keys.body(stream.request),
                contract.encode(envelope),
                self._body_ms,
                (
                    self._keys.prefix,
                    str(now_ms),
                    stream.request,
                    deployment.id,
                    self._gateway,
                    str(stream.number),
                    deployment.price_version,
                    hold.n_prompt,
                    str(hold.n_output),
                    hold.money_nano,
                    order_key(
                        deployment.queue_order,
                        stream.admitted_at_ms,
                        ttft_ms=promise.ttft_ms,
                        predicted_ms=predicted_ms(hold.n_prompt, self._likely(stream), promise.itl_ms),
                    ),
                    self._queue_bound,
                    hold.prompt_nano,
                    hold.output_rate_nano,
                    stream.note,
                    "0" if origin is None else str(origin.n_carried),
                    *key.scope_args,
                    str(band),
                    stream.expected,
                    _beginnings(ask),
                    deployment.window,
                    self._age_ms,
                    hold.share,
                    terms.slot_ms,
                    terms.most_ahead_ms,
                    terms.most_own_ms,
                    *candidates,
                    *last,
                ),
            )
        except asyncio.CancelledError:
            stream.admitted = True  # perhaps: `close` then cancels it
            raise
        except RedisUnavailable as error:
            stream.admitted = error.maybe_applied  # likewise, once Redis answers
            raise unavailable(
                "cell_unavailable", "the service is restarting: try again shortly", 1.0
            ) from error
        except RedisError as error:
            raise unavailable(
                "cell_unavailable", "the service cannot take requests: try again shortly", 2.0
            ) from error
        return verdict

    def _likely(self, stream: Stream) -> int:
        """Output tokens that the order of the queue goes by."""
        if stream.deployment.queue_order is not QueueOrder.SJF:
            return stream.expected
        known = self._ends.calibration(stream.key.organization, stream.deployment.id).lengths
        said = stream.predicted
        return likely(known, stream.hold.n_output, None if said is None else said.middle)

    @staticmethod
    def _ask(stream: Stream, request: GenerationRequest) -> Ask:
        """What routing wants to know; hashes of the prompt's beginnings where locality may decide and it is long
        enough."""
        n_prompt, deployment, organization = stream.hold.n_prompt, stream.deployment, stream.key.organization
        if not deployment.window or request.n_text_bytes < prefix.FIRST_BYTES:
            return Ask(n_prompt, adapter=deployment.adapter, flow=organization)
        text = request.prompt_bytes()
        found = prefix.fine_hashes(_salt(stream.key, deployment), text)
        ends = prefix.ends(found, len(text), n_prompt)
        return Ask(n_prompt, found, ends, deployment.adapter, organization)

    async def _seed(self, key: KeyContext, verdict: list[Any], need: Nano, *, last: bool) -> None:
        """Give the cell the money already booked, from the ledger: of the window budget or the end customer that the
        verdict names, or of each scope with a lifetime budget. `last`: who asks takes what there is then."""
        try:
            if verdict[1] == b"bud":
                if not verdict[4]:  # the key was cached for longer than the windows it knew of
                    raise DirectoryUnavailable
                budget = next(b for b in key.budgets if b.id == verdict[2].decode())
                await budget.seed(self._redis, self._keys, self._directory, int(verdict[3]), int(verdict[4]))
                return
            if verdict[1] == b"end":
                name, leased = verdict[2].decode(), key.ends is not None and key.ends.leased
                await endlimits.seed(
                    self._redis, self._keys, self._directory, name, need, leased=leased, last=last
                )
                return
            for scope, scope_id, limits in key.scopes:
                if limits[4] >= 0:
                    asked_ms = time.time_ns() // 1_000_000
                    # A leased budget is this cell's part of it, and so is what was spent of it.
                    ask = (
                        self._directory.spent_nano
                        if key.lease_ms is None
                        else self._directory.spent_here_nano
                    )
                    spent = await ask(scope, scope_id)
                    args = (self._keys.prefix, scope, scope_id, spent, asked_ms)
                    await self._redis.evalsha(scripts.SEED, (), args)
        except (DirectoryUnavailable, RedisError) as error:
            raise unavailable(
                "budget_unavailable", "the budget cannot be read at the moment: try again shortly", 2.0
            ) from error


def _beginnings(ask: Ask) -> str:
    """What the queue prefers a replica for: the adapter, if there is one, and the prompt's beginnings."""
    found = "".join(map(str, prefix.coarse(ask.prefixes)))
    return prefix.mark_of(ask.adapter) + found if ask.adapter else found


def _salt(key: KeyContext, deployment: Deployment) -> str:
    """Tenants share no cached prompts, and neither do the adapters of one: the same words mean another cache."""
    return f"{key.organization}.{deployment.adapter}" if deployment.adapter else key.organization


def _chosen(deployment: Deployment, request: GenerationRequest) -> Deployment:
    """The deployment at the class that the request names, by header or in OpenAI's words. ApiError (400) for one it may
    not have by name; `priority` is the best it may have."""
    classes, named = deployment.classes, request.slo_class
    if named is not None:
        found = classes.get(named)
        if found is None:
            raise bad_request(
                f"X-Corral-Slo-Class: {named[:40]!r} is none that this model gives to this key; send one of "
                f"{', '.join(sorted(classes))}, or have a rule made for the class",
                "X-Corral-Slo-Class",
                "slo_class_unavailable",
            )
        return found
    if request.tier == "flex":
        return classes.get("flex", deployment)
    if request.tier == "priority":
        return classes[best(each.promise for each in classes.values()).name]
    if request.tier == "default":
        return classes[deployment.own_class]
    return deployment


def _refusal(key: KeyContext, scope: bytes, limit: bytes, retry_ms: int, value: int, left: int) -> ApiError:
    """A limit as a 429 in OpenAI's terms: a budget is `insufficient_quota`, which no client should retry."""
    who = _SCOPE_NAMES[scope.decode()]
    name = limit.decode()
    if name.startswith("budget "):
        named = name.removeprefix("budget ")
        return next(b for b in key.budgets if b.id == named).refusal(retry_ms, value)
    if name == "budget" and who is _SCOPE_NAMES["end"]:
        return endlimits.refusal(limit, scope, retry_ms)
    if name == "budget":
        return ApiError(
            429,
            "insufficient_quota",
            f"the budget of this {who} is used up: an owner, admin or billing member can raise it",
            type_="insufficient_quota",
            headers=((b"x-should-retry", b"false"), (b"x-corral-limit", limit), (b"x-corral-scope", scope)),
        )
    own: Headers = ((b"x-corral-limit", limit), (b"x-corral-scope", scope))
    if name == "concurrency":  # the one limit that no standard header tells
        own = (
            *own,
            (b"x-ratelimit-limit-concurrency", b"%d" % value),
            (b"x-ratelimit-remaining-concurrency", b"%d" % max(0, left)),
            (b"x-ratelimit-reset-concurrency", b"%dms" % retry_ms),
        )
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"the {name.replace('_', ' ')} limit of this {who} ({value}) is reached: "
        f"try again in {retry_ms / 1000:.3g} s",
        retry_after_s=retry_ms / 1000,
        headers=own,
    )
