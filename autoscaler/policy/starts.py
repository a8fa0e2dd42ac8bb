"""When replicas that are being started will probably serve, and with how many slots: what admission counts on. Pure.

Called by tick.py, which tells the gateways (controlplane/policy/coming.py). A start whose duration was never measured
is not told of.
"""

from __future__ import annotations

from typing import Final

from autoscaler.policy.eta import Timings, eta_ms
from autoscaler.policy.status import stage_of
from autoscaler.types import Observation, ReplicaPhase, ScalerSpec
from controlplane.policy.coming import Starts

COMING: Final = (ReplicaPhase.STARTING, ReplicaPhase.LOADING, ReplicaPhase.WAKING)


def starts(observation: Observation, spec: ScalerSpec, timings: Timings) -> Starts:
    """(slots, Unix ms) of each, as planned at the beginning of its present stage, so that nothing changes while it goes
    by plan. Slots: as many as the ready ones are given on average, where there are any."""
    given = [r.slots_now for r in observation.replicas if r.phase is ReplicaPhase.READY and r.slots_now]
    slots = min(spec.slots, round(sum(given) / len(given))) if given else spec.slots
    found = []
    for replica in observation.replicas:
        if replica.phase in COMING and not replica.canary:
            stage, since_s = stage_of(replica, observation)
            takes_ms = eta_ms(stage, 0.0, timings)
            if takes_ms is not None:
                found.append((max(slots, 1), round(since_s * 1000) + takes_ms))
    return tuple(found)
