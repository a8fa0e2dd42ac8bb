"""What the drills' tenant was billed, and what its counters in Redis still hold.

Called by `manage.py drill` after each run. Usage arrives by intake within a second or two; waits are bounded.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast
from uuid import UUID

import redis
from django.db import Error as DatabaseError
from django.db import connection, connections

from billing.booking import Books as UsageBooks
from billing.models import UsageEvent
from billing.money import request_cost
from controlplane.drills.tenant import DrillTenant
from infra.drills.scene import DrillError, Scene
from infra.drills.verdict import Answer, Books, Row

BOOKED_WITHIN_S = 45.0
# After the last row came: a second witness that books again, or a counter that moves late, gets this long.
SETTLED_FOR_S = 1.5
_POLL_S = 0.1


class BookKeeper:
    """Reads the books of one deployment's runs. Requests of earlier reads are left out of the next."""

    def __init__(self, tenant: DrillTenant, deployment_id: UUID, scene: Scene) -> None:
        self._tenant = tenant
        self._deployment_id = deployment_id
        self._scene = scene
        self._seen: set[str] = set()
        self._spent_before = self._spent()

    def read(self, answers: Sequence[Answer], judges: bool) -> Books:
        """Rows of all requests since the last read and what is left in the counters, once both came to rest.

        `judges`: these answers are the run to be judged; otherwise their rows are only waited for.
        """
        wanted = {answer.request for answer in answers if answer.finished}
        deadline_s = time.monotonic() + BOOKED_WITHIN_S
        rested_since_s, last = time.monotonic(), None
        while True:
            books = self._look()
            state = (books, {row.request for row in books.rows} >= wanted)
            if state != last:
                last, rested_since_s = state, time.monotonic()
            complete = state[1] and not books.left
            rested_s = time.monotonic() - rested_since_s
            if (complete and rested_s >= SETTLED_FOR_S) or time.monotonic() > deadline_s:
                break
            time.sleep(_POLL_S)
        self._seen |= {row.request for row in books.rows}
        self._spent_before = self._spent()
        if not judges and not complete:
            raise DrillError(
                f"the undisturbed run was not settled: {'; '.join(books.left) or 'bills missing'}"
            )
        return books

    def _look(self) -> Books:
        try:
            rows = self._rows()
        except DatabaseError as error:  # a drill may have taken Postgres away: it comes back
            connections.close_all()
            return Books(left=(f"Postgres does not answer: {type(error).__name__}",))
        try:
            spent = self._spent()
            before = self._spent_before
            return Books(
                rows=tuple(rows),
                left=tuple(self._left()),
                spent_nano=None if spent is None or before is None else spent - before,
            )
        except redis.RedisError as error:
            return Books(rows=tuple(rows), left=(f"Redis does not answer: {type(error).__name__}",))

    def _rows(self) -> list[Row]:
        events = UsageEvent.objects.filter(
            organization_id=self._tenant.organization_id,
            deployment_id=self._deployment_id,
            api_key_id=self._tenant.key_id,
        )
        rates = UsageBooks(connection).rates({event.price_version_id for event in events})
        rows = []
        for event in events:
            if event.request_id.hex in self._seen:
                continue
            due = request_cost(
                rates[event.price_version_id],
                n_prompt=event.n_prompt_tokens,
                n_cached=event.n_cached_tokens,
                n_completion=event.n_completion_tokens,
            )
            rows.append(
                Row(
                    request=event.request_id.hex,
                    n_prompt=event.n_prompt_tokens,
                    n_completion=event.n_completion_tokens,
                    attempts=event.attempts,
                    cost_nano=event.cost_nano,
                    due_nano=due,
                )
            )
        return sorted(rows, key=lambda row: row.request)

    # -- Redis

    def _counters(self) -> dict[str, dict[bytes, bytes]]:
        keys = self._scene.keys
        names = {
            "key": keys.limits("key", self._tenant.key_id.hex),
            "project": keys.limits("prj", self._tenant.project_id.hex),
            "organization": keys.limits("org", self._tenant.organization_id.hex),
        }
        return {name: cast(dict[bytes, bytes], self._scene.redis.hgetall(key)) for name, key in names.items()}

    def _spent(self) -> int | None:
        """Nano-dollars that the key's counter says; None where it keeps none (not seeded, or Redis away)."""
        try:
            value = self._counters()["key"].get(b"spent")
        except redis.RedisError:
            return None
        return None if value is None else int(float(value))

    def _left(self) -> list[str]:
        """Counters that are not back to zero."""
        found = []
        for name, fields in self._counters().items():
            for counter, word in ((b"conc", "requests in flight"), (b"held", "nano-dollars held")):
                value = int(float(fields.get(counter, b"0")))
                if value:
                    found.append(f"{name}: {value} {word} after the end")
        scene, keys = self._scene, self._scene.keys
        n_queued = scene.redis.zcard(keys.queue(scene.deployment))
        if n_queued:
            found.append(f"{n_queued} requests still queued")
        for replica in scene.routed():
            used = cast(bytes | None, scene.redis.hget(keys.replica(replica.id), "used"))
            if int(used or 0) or scene.live_requests(replica):
                found.append(f"replica {replica.id[:8]}: {int(used or 0)} slots taken after the end")
        return found
