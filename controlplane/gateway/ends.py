"""How a request ends on this side: settled at its last entry, cancelled when its client has gone.

Called by the inbox, the generation handler, the watch and the stage board. A request that this process
admitted is always ended by somebody: here at its last entry, here by a cancel, or by billing intake and the
watcher if this process dies. Settling happens once; whoever is first wins, and later calls change nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from typing import Final

from billing.money import TOKENS_PER_RATE, request_cost
from controlplane.gateway.batches import Passes
from controlplane.gateway.forecasts import Forecasts
from controlplane.gateway.inbox import Inbox
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.stream import Stream
from controlplane.policy import estimate
from controlplane.policy.admission import prompt_rate
from controlplane.policy.ordering import QueueOrder
from workers import scripts
from workers.contract import Ask, End
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError

_MAX_CALIBRATIONS: Final = 50_000
_MAX_ORPHANS: Final = 10_000
_ORPHANS_PER_CALL: Final = 256
_CHARGE_STEP: Final = 32  # output tokens worth a charge of their own before the end
_CHARGES_PER_CALL: Final = 256
_CHARGES_A_PASS: Final = 4 * _CHARGES_PER_CALL
_ASK_INTERVAL_S: Final = 0.001  # between top-ups of one stream, so that a mad machine cannot keep Redis busy
_ROOMY_S: Final = 2.0  # for so long what the cell said of its room is believed
_TOMBSTONE_S: Final = 120.0  # a cancelled request has ended by then; intake settles what has not


class Ends:
    """The streams of one gateway process until they are over, in `inbox`. Belongs to one event loop."""

    def __init__(
        self, redis: Client, keys: CellKeys, routes: RouteTable, gateway: str, forecasts: Forecasts
    ) -> None:
        self.inbox = Inbox(redis, keys, self.on_end, self.on_ask)
        self.n_settled = self.n_cancelled = self.n_top_ups = 0
        self._redis = redis
        self.passes = Passes(redis, keys.prefix)
        self._keys = keys
        self._routes = routes
        self._forecasts = forecasts
        self._gateway = gateway
        self._calibrations: OrderedDict[tuple[str, str], estimate.Calibration] = OrderedDict()
        # Cancels that Redis was not there for, oldest dropped first.
        self._orphans: deque[Stream] = deque(maxlen=_MAX_ORPHANS)
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def n_orphans(self) -> int:
        """Cancels that wait for Redis."""
        return len(self._orphans)

    def calibration(self, organization: str, deployment: str) -> estimate.Calibration:
        """What its finished requests taught about this tenant's prompts for this model."""
        return self._calibrations.get((organization, deployment), estimate.NEW)

    def on_end(self, stream: Stream) -> None:
        """Its last entry arrived: settle it now, however slowly the client reads."""
        end = stream.end
        assert end is not None
        # A machine says these numbers; the holds bound what they can do here. Intake vets the bill itself.
        n_prompt = min(max(end.n_prompt, 0), stream.deployment.context_tokens)
        n_cached = min(max(end.n_cached, 0), n_prompt)
        origin = stream.origin
        n_carried, n_charged = (0, 0) if origin is None else (origin.n_carried, origin.n_carried_prompt)
        n_completion = min(max(end.n_completion, 0), n_carried + stream.hold.n_output)
        if (n_prompt, n_cached, n_completion) != (end.n_prompt, end.n_cached, end.n_completion):
            stream.end = End(end.reason, n_prompt, n_cached, n_completion, end.error, end.attempts)
        if origin is None and (end.error is None or n_completion):
            self._observe(stream, n_prompt, n_completion)
            if end.attempts == 1:
                self._forecasts.ended(stream, n_prompt, n_completion)
        n_prompt = 0 if stream.is_count else max(0, n_prompt - n_charged)
        self._settle(stream, n_prompt, min(n_cached, n_prompt), max(0, n_completion - n_carried))
        if stream.abandoned:
            self.inbox.streams.pop(stream.number, None)

    def on_ask(self, stream: Stream, machine: str, ask: Ask) -> None:
        """Its money is used up or soon will be: hold more for it, if there is more. The answer goes to the replica,
        which asks again when it hears nothing.
        """
        now = time.monotonic()
        if (stream.abandoned and not stream.keep) or now < stream.ask_after:
            return
        stream.ask_after = now + _ASK_INTERVAL_S
        self.n_top_ups += 1
        hold, rates = stream.hold, stream.deployment.rates
        self._redis.fire(
            "EVALSHA",
            scripts.TOPUP.sha,
            0,
            self._keys.prefix,
            stream.request,
            machine,
            ask.n_granted,
            min(max(ask.n_prompt, 1), stream.deployment.context_tokens),
            "empty" if ask.empty else "soon",
            prompt_rate(rates) / TOKENS_PER_RATE,
            hold.output_rate_nano,
            hold.share,
        )

    def close(self, stream: Stream) -> None:
        """The handler is done with it. What has not ended is cancelled and kept until it has; what may be collected
        later runs on, as long as its deadline allows."""
        if stream.end is not None or not stream.admitted:
            self.inbox.streams.pop(stream.number, None)
            return
        stream.abandoned = True
        stream.pieces.clear()
        if stream.keep:
            stream.failure = None
            self.inbox.catch_up(stream)  # whatever state it was in, its end must be heard
        else:
            self.give_up(stream)

    def give_up(self, stream: Stream) -> None:
        """Cancel what nobody waits for (any more)."""
        stream.keep = False
        stream.deadline = time.monotonic() + _TOMBSTONE_S
        self._start_cancel(stream)

    def retry_orphans(self) -> None:
        """Redis is there: send the cancels that it was not there for. Bounded per call."""
        for _ in range(min(len(self._orphans), _ORPHANS_PER_CALL)):
            if not self._redis.connected:
                return
            self._start_cancel(self._orphans.popleft())

    def charge_produced(self) -> None:
        """Tell the fair queue of answers that have become longer than expected, so that they weigh while they
        run. Called every second, a few calls for all streams; the settle is exact, whatever is lost here."""
        if not self._redis.connected:
            return
        grown: list[str | int] = []
        for stream in self.inbox.streams.values():
            if stream.end is None and stream.n_new >= stream.counted + _CHARGE_STEP:
                stream.counted = stream.n_new
                grown += (stream.request, stream.n_new)
                if len(grown) == 2 * _CHARGES_A_PASS:
                    break
        for i in range(0, len(grown), 2 * _CHARGES_PER_CALL):
            part = grown[i : i + 2 * _CHARGES_PER_CALL]
            self._redis.fire("EVALSHA", scripts.CHARGE.sha, 0, self._keys.prefix, *part)

    async def cancel_queued(self, stream: Stream) -> bool:
        """Take a request out of the queue and settle it; False when it is not waiting there (any more)."""
        state = await self._redis.call("HGET", self._keys.request(stream.request), "state")
        if state != b"queued":
            return False
        return await self._cancel(stream) == b"queued"

    async def drain(self) -> None:
        """Let cancels under way finish (bounded by the client's own deadline), and settlements leave."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.passes.send()

    def _start_cancel(self, stream: Stream) -> None:
        task = asyncio.get_running_loop().create_task(self._cancel_abandoned(stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _cancel_abandoned(self, stream: Stream) -> None:
        try:
            outcome = await self._cancel(stream)
        except RedisError:
            self._orphans.append(stream)
            return
        if outcome == b"bound":
            self.inbox.catch_up(stream)  # whatever state it was in, its end must be heard
        else:
            self.inbox.streams.pop(stream.number, None)

    async def _cancel(self, stream: Stream) -> bytes:
        now_ms = time.time_ns() // 1_000_000
        outcome: bytes = await self._redis.evalsha(
            scripts.CANCEL, (), (self._keys.prefix, now_ms, stream.request, self._gateway, stream.number)
        )
        self.n_cancelled += 1
        if outcome == b"queued":
            # At nothing, even if a replica that died had produced something: no witness is left to book it
            # by.
            self._settle(stream, 0, 0, 0)
        return outcome

    def _settle(self, stream: Stream, n_prompt: int, n_cached: int, n_completion: int) -> None:
        """Idempotent on the other side, and a lost one is made up for by intake: nobody waits for the
        answer."""
        if stream.settled:
            return
        stream.settled = True
        self.n_settled += 1
        if stream.placed is not None:
            stream.placed.is_waiting = False
        if stream.replica:
            self._routes.released(stream.deployment.id, stream.replica)
        cost = request_cost(
            stream.deployment.rates, n_prompt=n_prompt, n_cached=n_cached, n_completion=n_completion
        )
        self.passes.settle(
            stream.request,
            n_prompt,
            n_completion,
            cost,
            n_cached,
            is_roomy=stream.is_roomy and time.monotonic() - stream.admitted_at < _ROOMY_S,
        )

    def _observe(self, stream: Stream, n_prompt: int, n_completion: int) -> None:
        pair = (stream.key.organization, stream.deployment.id)
        known = self._calibrations.pop(pair, estimate.NEW)
        known = estimate.observe(known, stream.raw_estimate, n_prompt)
        known = estimate.observe_output(known, n_completion)
        if stream.deployment.queue_order is QueueOrder.SJF:
            said = stream.predicted
            known = estimate.observe_length(
                known, n_completion, None if said is None else (said.low, said.high)
            )
        self._calibrations[pair] = known
        if len(self._calibrations) > _MAX_CALIBRATIONS:
            self._calibrations.popitem(last=False)
