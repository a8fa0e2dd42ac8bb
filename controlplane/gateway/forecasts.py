"""What this gateway predicts of each deployment: the terms of an admission, and what came of it.

Called by admission for each request and by the end of each; the arithmetic is pure (controlplane/policy/outlook.py).
Holds a few numbers per deployment, organization and class, never a request. What it needs it has: the routes as last
seen, and the slot time that waits, which the admission script answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from controlplane.gateway.errors import ApiError
from controlplane.gateway.routes import RouteTable
from controlplane.gateway.stream import Stream
from controlplane.policy.outlook import MIN_JUDGED, Gate, Outlook, Record, Terms, Track
from controlplane.policy.routing import Ask

_MAX_GATES: Final = 10_000
# In place of the slot time that may wait before a request: it is for an overflow or refused, free slot or not.
_OVERFLOW_ONLY_MS: Final = -2


class Forecasts:
    """Gates by deployment. Belongs to one event loop."""

    def __init__(self, routes: RouteTable) -> None:
        self.n_refused = 0
        self._routes = routes
        self._gates: dict[str, Gate] = {}

    def terms(self, stream: Stream, ask: Ask, candidates: Sequence[str]) -> Terms:
        """What the script goes by. Where so much prefill of its own waits already at the best replica that the target
        will be missed there, free slot or not, an overflow may take it; ApiError where none is there. Another's prompts
        refuse nobody: who waits in the queue is what holds them back."""
        deployment, organization = stream.deployment, stream.key.organization
        gate = self._gates.get(deployment.id)
        if gate is None:
            if len(self._gates) >= _MAX_GATES:
                self._gates.clear()
            gate = self._gates[deployment.id] = Gate()
        if not gate.pace.n:
            self._presume(gate, deployment.id)
        slots, n_prefill = self._routes.standing(
            deployment.id, candidates[0] if candidates else "", organization
        )
        stream.slots, stream.coming = slots, self._routes.coming(deployment.id, stream.admitted_at_ms)
        terms = stream.terms = gate.terms(
            organization,
            deployment.promise,
            ask.n_prompt,
            stream.expected,
            slots=slots,
            n_prefill=n_prefill,
            predicts=deployment.predicts,
            coming=stream.coming,
        )
        if terms.is_hopeless:
            if not self._routes.overflows(deployment.id):
                raise self.refusal(stream, 0)
            terms = stream.terms = terms._replace(most_ahead_ms=_OVERFLOW_ONLY_MS)
        return terms

    def queued(self, stream: Stream, ahead_ms: int) -> None:
        """It waits, behind so much slot time."""
        assert stream.terms is not None
        gate = self._gates.get(stream.deployment.id)
        if gate is not None:
            stream.ahead_ms = ahead_ms
            stream.total_s = gate.total_s(stream.terms, ahead_ms, stream.slots, stream.coming)
            _record(gate, stream).let_in(stream.terms)

    def refusal(self, stream: Stream, ahead_ms: int) -> ApiError:
        """Its first word would come too late, with so much slot time before it."""
        gate, promise, terms = self._gates[stream.deployment.id], stream.deployment.promise, stream.terms
        assert terms is not None
        self.n_refused += 1
        stream.ahead_ms = ahead_ms
        stream.total_s = (
            terms.first_s if terms.is_hopeless else gate.total_s(terms, ahead_ms, stream.slots, stream.coming)
        )
        record = _record(gate, stream)
        seen = record.outlook(promise, stream.total_s)
        retry_after_s = record.late(terms, ahead_ms, stream.slots, stream.coming)
        if terms.is_hopeless:
            retry_after_s = max(retry_after_s, min(terms.first_s, 60.0))
        return ApiError(
            503,
            "slo_unattainable",
            f"the first word would probably come after {seen.p50_s:.3g} s ({seen.p90_s:.3g} s in one of ten cases), "
            f"and the class {promise.name} promises {promise.ttft_ms / 1000:g} s: try again after "
            f"{retry_after_s:.3g} s, or name a class that can wait",
            retry_after_s=retry_after_s,
            details={
                "slo_class": promise.name,
                "ttft_target_s": promise.ttft_ms / 1000,
                "ttft_p50_s": round(seen.p50_s, 3),
                "ttft_p90_s": round(seen.p90_s, 3),
                "attainment": round(seen.attainment, 3),
            },
        )

    def outlook(self, stream: Stream) -> Outlook | None:
        """What is predicted of a request that was admitted or refused; None where nothing was asked."""
        gate = self._gates.get(stream.deployment.id)
        if gate is None or stream.terms is None:
            return None
        return _record(gate, stream).outlook(
            stream.deployment.promise, stream.total_s or stream.terms.first_s
        )

    def ended(self, stream: Stream, n_prompt: int, n_completion: int) -> None:
        """A request of this process ended in order, by its first attempt."""
        gate, first_at = self._gates.get(stream.deployment.id), stream.first_at
        if gate is None or first_at is None:
            return
        first_s = first_at - stream.admitted_at
        placed = stream.placed
        if stream.queued:
            if not stream.waited_for_replica:  # else it waited for a machine, which this is not about
                _record(gate, stream).waited(stream.total_s, first_s)
        elif placed is not None:
            gate.pace.saw_first(placed.n_before + placed.n_fresh, first_s)
        gate.pace.saw_answer(n_prompt, n_completion, stream.last_at - first_at)

    def _presume(self, gate: Gate, deployment: str) -> None:
        """Before anything was seen: as fast as the performance model says of the replicas that are there."""
        told = self._routes.pace(deployment)
        if told is not None and told != gate.presumed:
            gate.presume(told)

    def coverage(self) -> float:
        """The least share of first words within the quantile for 90 %, over those that are judged."""
        return min((track.p90 for track in self.tracks() if track.n >= MIN_JUDGED), default=0.9)

    def n_failing(self) -> int:
        """Organizations, by class and deployment, whose predictions do not hold, so that they are not refused."""
        return sum(not track.holds for track in self.tracks())

    def tracks(self) -> Iterator[Track]:
        """How predictions did, of each organization in each class at each deployment."""
        for gate in self._gates.values():
            for _, record in gate.records():
                yield record.track


def _record(gate: Gate, stream: Stream) -> Record:
    return gate.record(stream.key.organization, stream.deployment.promise)
