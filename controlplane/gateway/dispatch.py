"""From a stream to a replica or the queue in one write.

Called by the generation handler with a stream from opening.py. All numbers are computed before, from the pure policies;
the admission script only compares and takes. How a request ends is in ends.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final

from billing.money import Nano
from controlplane.gateway import endlimits, ratelimits, windows
from controlplane.gateway.decisions import Decisions
from controlplane.gateway.directory import KeyDirectory
from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import ApiError, unavailable
from controlplane.gateway.forecasts import Forecasts
from controlplane.gateway.identity import ALL_CHARGED, Digests
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.gateway.opening import Opener
from controlplane.gateway.placements import Placements
from controlplane.gateway.refusals import refusal
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.seeding import seed
from controlplane.gateway.stream import Stream
from controlplane.gateway.surface import served_as
from controlplane.policy import admission, prefix
from controlplane.policy.lengths import likely
from controlplane.policy.ordering import QueueOrder, order_key, predicted_ms
from controlplane.policy.routing import Ask
from workers import contract
from workers.contract import RequestEnvelope
from workers.keys import RETENTION_MS, CellKeys
from workers.redis_client import Client, RedisError, RedisUnavailable

_MAX_ROOMY: Final = 50_000


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
        opener: Opener,
        *,
        queue_bound: int,
        queue_age_s: float,
        request_timeout_s: float,
        digests: Digests,
        placements: Placements,
        forecasts: Forecasts,
        decisions: Decisions,
    ) -> None:
        self._redis = redis
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
        # A body outlives its request's timeout, and is found by a resume until the record is gone.
        self._body_ms = int(request_timeout_s * 1000) + RETENTION_MS
        self._digests = digests
        self._roomy = opener.roomy

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
            need, last = Nano(stream.hold.money_nano), n >= n_seeds - 2
            await seed(self._redis, self._keys, self._directory, stream.key, verdict, need, last=last)
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
            raise refusal(stream.key, *verdict[1:6])
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
        elif stream.is_count:
            # Without a token to make a replica ends it once the prompt is counted; charged it is as if it had been.
            envelope.n_carried_prompt, envelope.slo = ALL_CHARGED, None
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
        if stream.is_count:  # it takes no work, and leaves nothing in a cache
            return Ask(1, flow=organization)
        if not deployment.window or request.n_text_bytes < prefix.FIRST_BYTES:
            return Ask(n_prompt, adapter=deployment.adapter, flow=organization)
        text = request.prompt_bytes()
        found = prefix.fine_hashes(_salt(stream.key, deployment), text)
        ends = prefix.ends(found, len(text), n_prompt)
        return Ask(n_prompt, found, ends, deployment.adapter, organization)


def _beginnings(ask: Ask) -> str:
    """What the queue prefers a replica for: the adapter, if there is one, and the prompt's beginnings."""
    found = "".join(map(str, prefix.coarse(ask.prefixes)))
    return prefix.mark_of(ask.adapter) + found if ask.adapter else found


def _salt(key: KeyContext, deployment: Deployment) -> str:
    """Tenants share no cached prompts, and neither do the adapters of one: the same words mean another cache."""
    return f"{key.organization}.{deployment.adapter}" if deployment.adapter else key.organization
