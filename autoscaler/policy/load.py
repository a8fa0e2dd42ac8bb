"""How loaded a deployment is: what we are sure of, and what it may be when some of it cannot be seen.

Growth follows the first figure, shrinking the second: a missing or stale reading counts as idle when growing
and as full when shrinking, so that blindness neither buys machines nor takes them away. Pure.
"""

from autoscaler.types import Beat, Observation, ReplicaPhase, Sample, ScalerMemory, ScalerSpec


def next_beats(observation: Observation, memory: ScalerMemory) -> tuple[Beat, ...]:
    """Last heartbeat number of each replica, and since when on our clock; those that left are forgotten."""
    before = {beat.replica_id: beat for beat in memory.beats}
    beats = []
    for replica in sorted(observation.replicas, key=lambda r: r.id):
        old = before.get(replica.id)
        if replica.beat_seq is None:
            if old is not None:
                beats.append(old)
        elif old is not None and old.seq == replica.beat_seq:
            beats.append(old)
        else:
            beats.append(Beat(replica.id, replica.beat_seq, observation.now_s))
    return tuple(beats)


def fresh(beats: tuple[Beat, ...], now_s: float, spec: ScalerSpec) -> frozenset[str]:
    """Replicas whose readings may be believed: their heartbeat number changed less than `beat_stale_s` ago."""
    return frozenset(b.replica_id for b in beats if now_s - b.since_s < spec.beat_stale_s)


def load_now(observation: Observation, beats: tuple[Beat, ...], spec: ScalerSpec) -> tuple[float, float]:
    """(known, possible) requests, queued and running. `possible` is at least `known`.

    What runs on draining replicas, and on those told to sleep, is left out: it needs no capacity that we could add or
    keep.
    """
    away = (ReplicaPhase.DRAINING, ReplicaPhase.SLEEPING)
    serving = [r for r in observation.replicas if r.phase not in away]
    known = float(observation.n_queued or 0)
    possible = known
    believed = fresh(beats, observation.now_s, spec)
    for replica in serving:
        if replica.phase is not ReplicaPhase.READY:
            continue
        if replica.used is not None and replica.id in believed:
            known += replica.used
            possible += replica.used
        else:
            possible += replica.slots
    if observation.n_queued is None:  # enough to keep what there is
        possible = max(possible, len(serving) * spec.slots * spec.target_ratio)
    return known, possible


def slots_now(observation: Observation, beats: tuple[Beat, ...], spec: ScalerSpec) -> float:
    """Requests that one replica takes at present, mean over those that serve: latency may have shrunk their slots.

    Demand is counted in requests, queued ones included, so fewer slots never look like less of it.
    """
    believed = fresh(beats, observation.now_s, spec)
    given = [
        float(r.slots_now)
        for r in observation.replicas
        if r.phase is ReplicaPhase.READY and r.slots_now is not None and r.id in believed
    ]
    if not given:
        return float(spec.slots)
    return min(max(mean(given), spec.slots * spec.min_slots_ratio, 1.0), float(spec.slots))


def keep_samples(samples: tuple[Sample, ...], now_s: float, spec: ScalerSpec) -> tuple[Sample, ...]:
    """Samples young enough to matter, one per second at most: a burst of ticks must not outvote the rest."""
    oldest_s = now_s - max(spec.stable_window_s, spec.scale_down_delay_s)
    kept: dict[int, Sample] = {}
    for sample in samples:
        if oldest_s < sample.at_s <= now_s:
            slot = int(sample.at_s)
            other = kept.get(slot)
            kept[slot] = sample if other is None else _merge(other, sample)
    return tuple(kept[slot] for slot in sorted(kept))


def _merge(one: Sample, other: Sample) -> Sample:
    return Sample(
        at_s=max(one.at_s, other.at_s),
        known=max(one.known, other.known),
        possible=max(one.possible, other.possible),
        wanted=max(one.wanted, other.wanted),
        slots=other.slots or one.slots,
    )


def mean(values: list[float]) -> float:
    """0 for nothing."""
    return sum(values) / len(values) if values else 0.0
