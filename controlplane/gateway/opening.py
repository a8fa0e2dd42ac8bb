"""The stream of a request, with what it may cost: from a checked request, before anything is sent.

Called by generate.py, resume.py and shadows.py for a new request, by reopen.py for one that was admitted before. The
prompt is estimated and the hold computed here, from the pure policies; dispatch.py then takes it. Nothing here may wait
or be refused for want of money or room.
"""

from __future__ import annotations

import time

from controlplane.gateway.ends import Ends
from controlplane.gateway.errors import bad_request
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.gateway.schemas import GenerationRequest
from controlplane.gateway.stream import Origin, Stream
from controlplane.gateway.surface import Surface
from controlplane.gateway.toolcalls import CallReader
from controlplane.policy import admission, estimate
from controlplane.policy.ordering import QueueOrder
from controlplane.policy.promises import best
from controlplane.prediction.lengths.model import LengthModel


class Opener:
    """Streams of one gateway process. Belongs to one event loop."""

    def __init__(
        self,
        ends: Ends,
        *,
        request_timeout_s: float,
        stream_buffer: int,
        lengths: LengthModel | None = None,
        first_number: int = 0,
    ) -> None:
        """`first_number`: streams are numbered from there, so that two of these may share an inbox."""
        # Keys of which the last admission found room for many more; kept by dispatch.py.
        self.roomy: set[str] = set()
        self._ends = ends
        self._timeout_s = request_timeout_s
        self._buffer = stream_buffer
        self._lengths = lengths
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
                estimate.upper_bound(n_prompt, calibration, is_roomy=key.key in self.roomy),
                deployment.context_tokens,
            ),
        )
        if request.max_tokens == 0:
            hold = admission.NOTHING
        elif origin is not None:
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
