"""Books what machines report as used: every request once, whatever is repeated, reordered, forged or cut off.

Called by the control worker (tasks.py) every second. One pass: read the machines' usage streams, vet, rate,
insert and commit, then settle holds, acknowledge to the spools and forget the entries. Each step may be
repeated, so a crash at any point loses nothing and books nothing twice: until the commit nothing is
acknowledged, and after it the insert changes nothing. Must never drop an entry that it has neither booked nor
put aside with a reason.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from billing import metrics
from billing.booking import Booked, Books, Rated
from billing.money import request_cost
from billing.rating import PriceBook
from billing.usage_streams import Done, Lost, Settlement, UsageStreams
from billing.vetting import Delivery, Refusal, Usage, decode, first_per_request, vet
from controlplane.ids import InvalidIdError, from_wire
from workers.contract import UsageEvent
from workers.keys import RETENTION_MS

BATCH: Final = 1_000

Clock = Callable[[], datetime]


@dataclass(slots=True)
class Tally:
    """What a run did, in deliveries."""

    n_booked: int = 0
    n_repeated: int = 0
    refused: Counter[Refusal] = field(default_factory=Counter)

    @property
    def n_refused(self) -> int:
        return self.refused.total()


def now_utc() -> datetime:
    return datetime.now(tz=UTC)


class Intake:
    """Intake of one cell. Not shared between threads; two at once do double work and no harm."""

    def __init__(
        self, streams: UsageStreams, books: Books, clock: Clock = now_utc, batch: int = BATCH
    ) -> None:
        self._streams = streams
        self._books = books
        self._prices = PriceBook(books.rates)
        self._clock = clock
        self._batch = batch

    def run(self, machines: Sequence[str], budget_s: float) -> Tally:
        """Book what is there, until `budget_s` is over (one pass always runs). What comes meanwhile is the next run's:
        few at a time are dear, and those that have just ended would be settled here before their gateway does it.

        Raises what Redis and Postgres raise when they are away; call again later.
        """
        tally = Tally()
        deadline = time.monotonic() + budget_s
        while deliveries := self._streams.read(machines, self._batch):
            oldest_ms = min(delivery.delivered_at_ms for delivery in deliveries)
            metrics.LAG_S.set(max(0.0, self._clock().timestamp() - oldest_ms / 1000))
            with metrics.BOOK_S.time():
                self._pass(deliveries, tally)
            if time.monotonic() >= deadline:
                return tally
            if len(deliveries) * len(machines) < self._batch:
                break  # no machine had its share of a batch
        metrics.LAG_S.set(0)
        return tally

    def _pass(self, deliveries: Sequence[Delivery], tally: Tally) -> None:
        now = self._clock()
        usages, done = self._vet(deliveries, now)
        rated, unpriced = self._rate(usages)
        done += unpriced
        first, others = first_per_request([item.usage for item in rated])
        firsts = {id(usage) for usage in first}
        to_book = [item for item in rated if id(item.usage) in firsts]
        booked = self._books.book(to_book, now) if to_book else Booked(frozenset(), frozenset(), frozenset())
        # Committed. From here on every step may be lost and will be repeated by the next pass.
        kept = [item for item in to_book if item.usage.request_id not in booked.refused]
        unsettled = [_settlement(item) for item in kept if not item.usage.settled]
        now_ms = int(now.timestamp() * 1000)
        if unsettled:
            self._streams.settle(unsettled, now_ms)
        lost = [_lost(item) for item in kept if _was_lost(item, booked, now_ms)]
        if lost:
            self._streams.charge_lost(lost, now_ms)
        for usage in [*first, *others]:
            refusal = Refusal.NOT_STORABLE if usage.request_id in booked.refused else None
            done.append(Done(usage.delivery, usage.event.replica, usage.event.request_id, refusal))
        self._streams.finish(done)
        self._books.touch_keys([item.usage for item in kept])
        _count(tally, booked, kept, done, n_others=len(others))

    def _vet(self, deliveries: Sequence[Delivery], now: datetime) -> tuple[list[Usage], list[Done]]:
        """(what may be booked, what was refused)."""
        done: list[Done] = []
        decoded: list[tuple[Delivery, UsageEvent]] = []
        for delivery in deliveries:
            event = decode(delivery)
            if isinstance(event, Refusal):
                done.append(Done(delivery, refusal=event))
            else:
                decoded.append((delivery, event))
        admissions = self._streams.admissions([event.request_id for _, event in decoded])
        usages: list[Usage] = []
        for (delivery, event), admission in zip(decoded, admissions, strict=True):
            verdict = vet(delivery, event, admission, now)
            if isinstance(verdict, Refusal):
                done.append(_refused(delivery, event, verdict))
            else:
                usages.append(verdict)
        return usages, done

    def _rate(self, usages: Sequence[Usage]) -> tuple[list[Rated], list[Done]]:
        """(usage with its price, what has a price version that does not exist)."""
        rates = self._prices.rates(usage.price_version_id for usage in usages)
        rated: list[Rated] = []
        unpriced: list[Done] = []
        for usage in usages:
            at = rates.get(usage.price_version_id)
            if at is None:
                unpriced.append(_refused(usage.delivery, usage.event, Refusal.UNKNOWN_PRICE))
                continue
            counts = usage.event
            cost = request_cost(
                at, n_prompt=counts.n_prompt, n_cached=counts.n_cached, n_completion=usage.n_completion
            )
            rated.append(Rated(usage, cost))
        return rated, unpriced


def _settlement(item: Rated) -> Settlement:
    event = item.usage.event
    return Settlement(
        event.request_id, event.n_prompt, item.usage.n_completion, item.cost_nano, event.n_cached
    )


def _was_lost(item: Rated, booked: Booked, now_ms: int) -> bool:
    """Whether Redis lost this request's record before anybody settled it, rather than forgot it in due time after."""
    usage, event = item.usage, item.usage.event
    ended_ms = event.admitted_at_ms + event.duration_ms
    return usage.unverified and usage.request_id in booked.new and now_ms < ended_ms + RETENTION_MS


def _lost(item: Rated) -> Lost:
    usage = item.usage
    return Lost(
        usage.api_key_id.hex,
        usage.project_id.hex,
        usage.organization_id.hex,
        item.cost_nano,
        usage.event.end_customer,
    )


def _refused(delivery: Delivery, event: UsageEvent, refusal: Refusal) -> Done:
    """Put aside, and acknowledged all the same where the ids allow it: a spool must not send it for ever."""
    try:
        from_wire(event.replica)
        from_wire(event.request_id)
    except InvalidIdError:
        return Done(delivery, refusal=refusal)
    return Done(delivery, event.replica, event.request_id, refusal)


def _count(tally: Tally, booked: Booked, kept: Sequence[Rated], done: Sequence[Done], n_others: int) -> None:
    n_repeated = len(booked.repeated) + n_others
    tally.n_booked += len(booked.new)
    tally.n_repeated += n_repeated
    metrics.EVENTS.labels("booked").inc(len(booked.new))
    metrics.EVENTS.labels("repeated").inc(n_repeated)
    for item in done:
        if item.refusal is not None:
            tally.refused[item.refusal] += 1
            metrics.EVENTS.labels(item.refusal.value).inc()
    new = [item.usage for item in kept if item.usage.request_id in booked.new]
    metrics.UNVERIFIED.inc(sum(usage.unverified for usage in new))
    metrics.CAPPED.inc(sum(usage.capped for usage in new))
