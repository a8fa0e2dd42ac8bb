"""How many replicas a deployment wants: load over capacity in two windows, delays, bounds, and zero.

Knative's pod autoscaler in short: the stable window decides, a short window may declare panic, and during
panic the count only grows. Shrinking waits until the highest wish of `scale_down_delay_s` has passed. Zero
has its own rule: nothing queued, nothing running, and idle for the deployment's idle timeout. Pure.
"""

import math
from dataclasses import replace

from autoscaler.policy.forecast import Forecast, forecast, learn
from autoscaler.policy.load import keep_samples, load_now, mean, next_beats, slots_now
from autoscaler.policy.usual import learn as learn_usual
from autoscaler.policy.usual import level
from autoscaler.types import Observation, ReplicaPhase, Sample, ScalerMemory, ScalerSpec, Wish


def wish(observation: Observation, spec: ScalerSpec, memory: ScalerMemory) -> Wish:
    """Replicas wanted now, between the owner's bounds, and what to remember of it."""
    now_s = observation.now_s
    beats = next_beats(observation, memory)
    known, possible = load_now(observation, beats, spec)
    memory = _note_activity(replace(memory, beats=beats), observation, known)
    samples = keep_samples(
        (*memory.samples, Sample(now_s, known, possible, 0, slots_now(observation, beats, spec))), now_s, spec
    )
    memory = replace(memory, samples=samples)
    away = (ReplicaPhase.DRAINING, ReplicaPhase.SLEEPING)
    present = [r for r in observation.replicas if r.phase not in away and not r.canary]
    n_outdated = sum(1 for r in present if r.outdated)
    n_live = max(len(present) - n_outdated, n_outdated)  # a replica and its successor are one
    slots = mean([s.slots or spec.slots for s in samples if s.at_s > now_s - spec.stable_window_s])

    if spec.deleted:
        return Wish(0, memory, ("the deployment is deleted: no replica is wanted",))
    if spec.suspended_at_s is not None and now_s - spec.suspended_at_s >= spec.suspension_grace_s:
        return Wish(
            0, memory, ("its organization is suspended, and the grace is over: no replica is wanted",)
        )
    ahead, memory = _look_ahead(observation, known, spec, memory, slots)
    if spec.usual_s > 0:
        memory = replace(memory, usual=learn_usual(now_s, known, spec.usual_s, memory.usual))
    n, reason, memory = _from_load(observation, spec, memory, n_live, slots, ahead)
    if n_live == 0 and known > 0:
        n, reason = max(1, _replicas_for(known, spec, slots), n), f"nothing serves {known:g} waiting requests"
    elif n_live == 0 and possible == 0:
        n, reason = 0, "nothing waits and nothing runs"
    if n_live > 0 or n > 0:
        n, reason = _zero_rule(n, reason, observation, spec, memory, n_live, possible)
    bounded = min(max(n, spec.min_replicas), spec.max_replicas)
    if bounded != n:
        reason += f"; bounds {spec.min_replicas} to {spec.max_replicas} make {n} into {bounded}"
    if spec.suspended_at_s is not None:
        bounded = min(n, spec.max_replicas, n_live)
        reason += f"; its organization is suspended: nothing new, {bounded} may go on"
    return Wish(bounded, memory, (reason,))


def _look_ahead(
    observation: Observation, known: float, spec: ScalerSpec, memory: ScalerMemory, slots: float
) -> tuple[Forecast | None, ScalerMemory]:
    if spec.lead_s <= 0:
        return None, memory
    n_ready = sum(1 for r in observation.replicas if r.phase is ReplicaPhase.READY)
    now_s, served = observation.now_s, min(known, slots * n_ready)
    learnt = learn(now_s, known, spec.lead_s, memory.forecast, served)
    return forecast(now_s, spec.lead_s, learnt), replace(memory, forecast=learnt)


def _replicas_for(load: float, spec: ScalerSpec, slots: float) -> int:
    return math.ceil(load / (slots * spec.target_ratio) - 1e-9)


def _from_load(
    observation: Observation,
    spec: ScalerSpec,
    memory: ScalerMemory,
    n_live: int,
    slots: float,
    ahead: Forecast | None,
) -> tuple[int, str, ScalerMemory]:
    """(replicas, reason, memory), at `slots` of one replica. What the delay looks back on is what load wanted, not
    what was kept.
    """
    now_s, samples = observation.now_s, memory.samples
    stable = mean([s.known for s in samples if s.at_s > now_s - spec.stable_window_s])
    short = mean([s.known for s in samples if s.at_s > now_s - spec.panic_window_s])
    possible = mean([s.possible for s in samples if s.at_s > now_s - spec.stable_window_s])
    n_ahead, foretold = 0, ""
    if ahead is not None:
        high = ahead.high(spec.n_deviations)
        n_ahead = math.ceil(high / slots - 1e-9)
        foretold = f"; {high:.1f} at most in {spec.lead_s:g} s ({ahead.rule}) want {n_ahead}"
    n_usual, n_keep, usual = _for_usual(spec, memory, slots)
    foretold += usual
    if ahead is not None or n_usual:
        spec = replace(spec, target_ratio=max(spec.proven_ratio, spec.target_ratio))
    n_stable, n_short = _replicas_for(stable, spec, slots), _replicas_for(short, spec, slots)
    n_stable = max(
        n_stable, n_ahead, n_usual
    )  # what is seen wins upward, and so do what is foretold and usual
    n_ready = sum(1 for r in observation.replicas if r.phase is ReplicaPhase.READY)
    per_replica = f"{slots:.3g} slots x {spec.target_ratio:g}"

    if n_short >= spec.panic_ratio * max(n_ready, 1) and n_short > n_ready:
        memory = replace(memory, panic_until_s=now_s + spec.stable_window_s)
    if memory.panic_until_s is not None and now_s < memory.panic_until_s:
        n = max(n_short, n_stable, memory.panic_wanted)
        memory = _note_wanted(replace(memory, panic_wanted=n), n)
        reason = f"panic: {short:.1f} requests in {spec.panic_window_s:g} s want {n_short} of {per_replica}"
        return max(n, n_live), reason, memory
    enough = max(_replicas_for(possible, spec, slots), n_stable)
    memory = _note_wanted(replace(memory, panic_until_s=None, panic_wanted=0), enough)

    if n_stable > n_live:
        return (
            n_stable,
            f"{stable:.1f} requests on average want {n_stable} of {per_replica}{foretold}",
            memory,
        )
    keep = max(n_keep, *(s.wanted for s in memory.samples if s.at_s > now_s - spec.scale_down_delay_s))
    if keep >= n_live:
        return (
            n_live,
            f"{stable:.1f} requests on average (at most {possible:.1f}): {n_live} stay{foretold}",
            memory,
        )
    reason = (
        f"at most {possible:.1f} requests on average, {spec.scale_down_delay_s:g} s long: {keep} are enough"
    )
    return keep, reason + foretold, memory


def _for_usual(spec: ScalerSpec, memory: ScalerMemory, slots: float) -> tuple[int, int, str]:
    """(replicas for the usual load, replicas not to go below, why): zeros until there is a usual load."""
    usual = level(spec.usual_share, memory.usual, spec.usual_s / 4) if spec.usual_s > 0 else None
    if usual is None:
        return 0, 0, ""
    high = (usual + spec.usual_deviations * math.sqrt(usual)) / slots
    n = math.ceil(high - 1e-9)
    return n, math.ceil(high + spec.spare_ratio - 1e-9), f"; {usual:.1f} are usual and want {n}"


def _note_wanted(memory: ScalerMemory, n: int) -> ScalerMemory:
    last = memory.samples[-1]
    return replace(memory, samples=(*memory.samples[:-1], replace(last, wanted=max(last.wanted, n))))


def _zero_rule(
    n: int,
    reason: str,
    observation: Observation,
    spec: ScalerSpec,
    memory: ScalerMemory,
    n_live: int,
    possible: float,
) -> tuple[int, str]:
    """Idle long enough means zero, whatever the averages say; anything else means one at least."""
    idle_s = observation.now_s - (
        observation.now_s if memory.last_busy_at_s is None else memory.last_busy_at_s
    )
    if possible == 0 and idle_s >= spec.idle_timeout_s:
        return 0, f"nothing queued or running, idle for {idle_s:.0f} of {spec.idle_timeout_s:g} s"
    if n == 0 and n_live > 0:
        if possible > 0:
            return 1, f"up to {possible:.1f} requests may be running: 1 stays"
        return 1, f"idle for {idle_s:.0f} of {spec.idle_timeout_s:g} s: 1 stays"
    return n, reason


def _note_activity(memory: ScalerMemory, observation: Observation, known: float) -> ScalerMemory:
    """When it was last busy: load now, requests counted since, the last arrival, or a replica just born."""
    n_requests = sum(r.n_requests_total for r in observation.replicas)
    instants = [memory.last_busy_at_s, observation.last_request_at_s]
    if known > 0 or n_requests > memory.n_requests_total:
        instants.append(observation.now_s)
    instants += [r.phase_at_s for r in observation.replicas if r.phase is ReplicaPhase.READY]
    if memory.last_busy_at_s is None and observation.replicas:
        instants.append(observation.now_s)  # history unknown: the idle window begins now
    known_instants = [instant for instant in instants if instant is not None]
    last = min(max(known_instants), observation.now_s) if known_instants else None
    return replace(memory, last_busy_at_s=last, n_requests_total=n_requests)
