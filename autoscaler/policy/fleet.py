"""One pass over all deployments of a cell: each is decided as its own tick would, on the room the others left.

Called by `manage.py bench autoscaler` and by planners that see the whole cell; the live loop ticks deployment by
deployment and calls decide() on the same observation. Pure.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from autoscaler.policy.decide import decide
from autoscaler.policy.pool import Pool
from autoscaler.policy.ration import Caps, Demand, Purse, Rationed, ration
from autoscaler.types import Decision, MachineView, Observation, ScalerMemory, ScalerSpec


@dataclass(frozen=True, slots=True)
class Seen:
    """One deployment as the pass finds it. `observation` without machines: those come from the pool."""

    observation: Observation
    spec: ScalerSpec
    memory: ScalerMemory


def decide_all(deployments: Iterable[Seen], machines: Iterable[MachineView]) -> tuple[Decision, ...]:
    """Decisions in the order of deployment ids, whatever order they are given in."""
    pool = Pool(machines)
    decisions = []
    for seen in sorted(deployments, key=lambda s: s.observation.deployment_id):
        decision = decide(with_machines(seen.observation, seen.spec, pool), seen.spec, seen.memory)
        pool.book(decision.commands)
        decisions.append(decision)
    return tuple(decisions)


def decide_within(
    deployments: Iterable[Seen],
    machines: Iterable[MachineView],
    worth: Mapping[str, Demand],
    purses: Iterable[Purse],
    caps: Caps,
) -> tuple[tuple[Decision, ...], Rationed]:
    """decide_all() under tenants' money and the cell's caps.

    worth: by deployment, its tenant, class, value and price; what it wants comes from the decisions. Deployments that
    are granted less than they want are decided again with that as their bound, and so shrink or stop growing as they
    always do, drain first.
    """
    seen, pool = tuple(deployments), tuple(machines)
    decisions = decide_all(seen, pool)
    ordered = sorted(seen, key=lambda s: s.observation.deployment_id)
    demands = [
        replace(
            worth[s.observation.deployment_id], n_wanted=d.wanted, n_least=min(s.spec.min_replicas, d.wanted)
        )
        for s, d in zip(ordered, decisions, strict=True)
    ]
    granted = ration(demands, purses, caps)
    if not granted.reasons:
        return decisions, granted
    limited = [
        s
        if granted.n[d.deployment] == d.n_wanted
        else replace(s, spec=at_most(s.spec, granted.n[d.deployment]))
        for s, d in zip(ordered, demands, strict=True)
    ]
    return decide_all(limited, pool), granted


def at_most(spec: ScalerSpec, n: int) -> ScalerSpec:
    """The specification of a deployment that is granted less than it wants."""
    return replace(spec, max_replicas=n, min_replicas=min(spec.min_replicas, n))


def with_machines(observation: Observation, spec: ScalerSpec, pool: Pool) -> Observation:
    """The observation with the machines that matter to it."""
    return Observation(
        now_s=observation.now_s,
        deployment_id=observation.deployment_id,
        n_queued=observation.n_queued,
        replicas=observation.replicas,
        machines=pool.view(observation.replicas, spec.max_replicas),
        n_machines=pool.n_machines,
        failures=observation.failures,
        last_good_at_s=observation.last_good_at_s,
        machine_failures=observation.machine_failures,
        last_machine_good_at_s=observation.last_machine_good_at_s,
        last_request_at_s=observation.last_request_at_s,
    )
