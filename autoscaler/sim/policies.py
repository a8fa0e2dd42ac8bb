"""Named policies of the simulator: bundles of queue, router, scaler and buyer, and the knobs of each.

`corral` is the production bundle: the queue with the window and the learned lengths that a deployment has by default,
two gateways that route by their boards and tell each other what they placed, the scaler, the buyer. Every other name
replaces one part of it, so that a table of all is at once the comparison and the ablation. A name may carry knobs:
`hpa:target_ratio=0.8:stabilisation_s=60`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from autoscaler.policy.spot import SpotSpec
from autoscaler.sim.buyers import AnyZoneElseOnDemand, Corral, Heeding, OnDemandOnly, SpotHedge, SpotOnly
from autoscaler.sim.buyers_plan import Planned
from autoscaler.sim.fleet import Buyer
from autoscaler.sim.gateways import Gateways, behind
from autoscaler.sim.hpa import HpaSpec
from autoscaler.sim.kpa import KpaSpec
from autoscaler.sim.orders import DlpmOrder, MlfqOrder, VtcOrder
from autoscaler.sim.queues import Fair, earliest_deadline, fcfs, priority, shortest_predicted
from autoscaler.sim.routers import Affinity, LeastLoad, PowerOfTwo, Random, ResidentFirst, RoundRobin
from autoscaler.sim.routers_dynamo import Dynamo
from autoscaler.sim.routers_llumnix import Llumnix
from autoscaler.sim.routers_sglang import Sglang, SglangKnobs
from autoscaler.sim.scalers import HpaScaler, KpaScaler, Production, Scaler, Static
from autoscaler.sim.scenario import Policy, Setting
from autoscaler.sim.world import Router
from autoscaler.types import ScalerSpec
from controlplane.policy.flows import TOKEN
from controlplane.policy.ordering import GAMMA, QueueOrder
from controlplane.policy.routing import RouteWeights

USUAL_LEADS = 5  # autoscaler/specs.py
BOARDS_AGE_S = 1.0  # a gateway reads the loads so often (gateway/routes.py)
WINDOW_TOKENS = 2_000  # Deployment.locality_window_tokens


def production(
    forecast: int = 1,
    n_deviations: float = 0.0,
    proven_ratio: float = 0.95,
    scale_down_delay_s: float = 60.0,
    panic_ratio: float = 2.0,
    target_ratio: float = 0.0,
    stable_window_s: float = 15.0,
    usual_s: float = -1.0,
    usual_share: float = 0.8,
    usual_deviations: float = 1.6,
    spare_ratio: float = 0.6,
) -> Callable[[Setting], Scaler]:
    """The production scaler: looks as far ahead as a machine takes to come, and keeps room for what was usual during
    five such times (`usual_s` below 0). The load of an instant counts: what is averaged away comes too late where a
    start takes minutes."""

    def scaler(s: Setting) -> Scaler:
        spec = ScalerSpec(
            0,
            1,
            s.max_machines,
            1e9,
            s.slots,
            target_ratio=target_ratio or s.target_ratio,
            panic_ratio=panic_ratio,
            stable_window_s=stable_window_s,
            scale_down_delay_s=scale_down_delay_s,
            usual_s=USUAL_LEADS * s.terms.boot_s if usual_s < 0 else usual_s,
            usual_share=usual_share,
            usual_deviations=usual_deviations,
            spare_ratio=spare_ratio,
            lead_s=s.terms.boot_s if forecast else 0.0,
            n_deviations=n_deviations,
            proven_ratio=proven_ratio,
            beat_stale_s=1e9,
        )
        return Production(spec, s.begins_at_s, s.past)

    return scaler


def boards(
    gateways: int = 2, age_s: float = BOARDS_AGE_S, every_block: int = 0, shares: int = 1
) -> Callable[[Setting], Router]:
    """The gateways' boards. Production polls loads once a second and tells other gateways what it placed (`shares`);
    `make up` runs two. One gateway with `age_s` 0 sees everything at once."""
    if gateways < 1 or age_s < 0:
        raise ValueError(f"gateways = {gateways}, age_s = {age_s}: at least 1, and not negative")

    def router(s: Setting) -> Router:
        def make(number: int) -> Router:
            return Affinity(
                s.engine.kv_tokens,
                _weights(s),
                every_block=bool(every_block),
                age_s=age_s or math.inf,
                first_s=number * age_s / gateways,
            )

        return make(0) if gateways == 1 else Gateways(gateways, make, share=bool(shares))

    return router


def _weights(setting: Setting) -> RouteWeights:
    """Where adapters are loaded, a load delays this request, and later the one whose adapter has to go."""
    if setting.adapters is None:
        return RouteWeights()
    return RouteWeights(adapter_tokens=2 * setting.adapters.typical_s / setting.engine.step.token_s)


CORRAL = Policy(
    queue=lambda s: Fair(window=WINDOW_TOKENS * TOKEN, learn=True),
    router=boards(),
    scaler=production(),
    buyer=lambda s: Corral(s.terms.spot_spec()),
)


@wraps(production)  # its knobs are the scaler's
def corral(**knobs: Any) -> Policy:
    return replace(CORRAL, scaler=production(**knobs))


def hpa(target_ratio: float = 0.0, stabilisation_s: float = 300.0, tolerance: float = 0.1) -> Policy:
    def scaler(s: Setting) -> Scaler:
        target = s.slots * (target_ratio or s.target_ratio)
        return HpaScaler(
            HpaSpec(target, tolerance, stabilisation_s, period_s=15.0, n_min=1, n_max=s.max_machines)
        )

    return replace(CORRAL, scaler=scaler)


def kpa(
    target_ratio: float = 0.0,
    stable_window_s: float = 60.0,
    panic_share: float = 0.1,
    panic_threshold: float = 2.0,
    scale_down_delay_s: float = 0.0,
) -> Policy:
    def scaler(s: Setting) -> Scaler:
        return KpaScaler(
            KpaSpec(
                s.slots * (target_ratio or s.target_ratio),
                stable_window_s,
                panic_share,
                panic_threshold,
                scale_down_delay_s=scale_down_delay_s,
                n_min=1,
                n_max=s.max_machines,
            )
        )

    return replace(CORRAL, scaler=scaler)


def static(n: int = 0) -> Policy:
    return replace(CORRAL, scaler=lambda s: Static(n or s.replicas))


def spothedge(n_extra: int = 1, heeds_notice: int = 0) -> Policy:
    return replace(CORRAL, buyer=lambda s: _heeding(SpotHedge(n_extra), heeds_notice))


def any_zone(n_extra: int = 0, retry_s: float = 60.0, heeds_notice: int = 0) -> Policy:
    return replace(CORRAL, buyer=lambda s: _heeding(AnyZoneElseOnDemand(n_extra, retry_s), heeds_notice))


def planned(limit_s: float = 0.0, availability: float = 0.999) -> Policy:
    """Purchase plans with a bounded tail; `limit_s` above 0: by the mixed-integer programme."""

    def buyer(s: Setting) -> Buyer:
        return Planned(SpotSpec(s.terms.boot_s, s.terms.notice_s, availability), limit_s)

    return replace(CORRAL, buyer=buyer)


def _heeding(buyer: Buyer, heeds_notice: int) -> Buyer:
    return Heeding(buyer) if heeds_notice else buyer


def shortest(gamma: float = GAMMA) -> Policy:
    return replace(CORRAL, queue=lambda s: shortest_predicted(gamma))


def fair_shortest(
    gamma: float = GAMMA, window_tokens: int = 100_000, age_s: float = 30.0, learn: int = 0
) -> Policy:
    """A deployment with queue_order sjf. `learn` 1: answers are predicted from the tenant's earlier ones; 0: from the
    file's `predicted_tokens`, or known."""
    return replace(
        CORRAL,
        queue=lambda s: Fair(
            order=QueueOrder.SJF, gamma=gamma, window=window_tokens * TOKEN, age_s=age_s, learn=bool(learn)
        ),
    )


def mlfq(quantum: float = 64.0, starve_s: float = 60.0, n_levels: int = 5) -> Policy:
    return replace(CORRAL, queue=lambda s: MlfqOrder(quantum, starve_s, n_levels))


def dlpm(quantum: float = 4096.0) -> Policy:
    return replace(CORRAL, queue=lambda s: DlpmOrder(quantum))


def affinity(
    every_block: int = 0, gateways: int = 1, age_s: float = 0.0, by_worth: int = 1, shares: int = 1
) -> Policy:
    """The production board with another number of gateways (`boards`). Prefixes known at the lengths that a gateway
    hashes; or, to see what that costs, at every block. `by_worth`: adapters that are asked for often and load slowly
    stay, instead of those used last."""
    return replace(
        CORRAL, router=boards(gateways, age_s, every_block, shares), adapters_by_worth=bool(by_worth)
    )


def least_load(gateways: int = 1, age_s: float = 0.0, by_worth: int = 0) -> Policy:
    """Several `gateways` see loads as they were up to `age_s` ago."""
    return replace(
        CORRAL,
        router=lambda s: behind(gateways, age_s, lambda number: LeastLoad()),
        adapters_by_worth=bool(by_worth),
    )


def resident_first(by_worth: int = 0) -> Policy:
    return replace(
        CORRAL,
        router=lambda s: ResidentFirst(s.adapters.limit if s.adapters is not None else 1),
        adapters_by_worth=bool(by_worth),
    )


def power_of_two(seed: int = 0, gateways: int = 1, age_s: float = 0.0) -> Policy:
    return replace(
        CORRAL, router=lambda s: behind(gateways, age_s, lambda number: PowerOfTwo(1000 * seed + number))
    )


def round_robin(gateways: int = 1) -> Policy:
    return replace(CORRAL, router=lambda s: behind(gateways, 0.0, lambda number: RoundRobin()))


def random_router(seed: int = 0, by_worth: int = 0) -> Policy:
    return replace(CORRAL, router=lambda s: Random(seed), adapters_by_worth=bool(by_worth))


def sglang(
    cache_threshold: float = 0.3,
    balance_abs_threshold: int = 64,
    balance_rel_threshold: float = 1.5,
    miss_by_load: int = 0,
) -> Policy:
    knobs = SglangKnobs(
        cache_threshold, balance_abs_threshold, balance_rel_threshold, miss_by_load=bool(miss_by_load)
    )
    return replace(CORRAL, router=lambda s: Sglang(knobs))


def dynamo(overlap_weight: float = 1.0, temperature: float = 0.0, seed: int = 0) -> Policy:
    return replace(CORRAL, router=lambda s: Dynamo(overlap_weight, temperature, seed))


# Makers with their knobs' defaults.
MAKERS: dict[str, Callable[..., Policy]] = {
    "corral": corral,
    "fcfs": lambda: replace(CORRAL, queue=lambda s: fcfs()),
    "priority": lambda: replace(CORRAL, queue=lambda s: priority()),
    "edf": lambda: replace(CORRAL, queue=lambda s: earliest_deadline(lambda job: s.ttft_target_s)),
    "shortest-predicted": shortest,
    "fair-shortest": fair_shortest,
    "mlfq": mlfq,
    "vtc": lambda: replace(CORRAL, queue=lambda s: VtcOrder()),
    "dlpm": dlpm,
    "affinity": affinity,
    "least-load": least_load,
    "round-robin": round_robin,
    "random": random_router,
    "resident-first": resident_first,
    "p2c": power_of_two,
    "sglang": sglang,
    "dynamo": dynamo,
    "llumnix": lambda: replace(CORRAL, router=lambda s: Llumnix()),
    "static": static,
    "hpa": hpa,
    "kpa": kpa,
    "spothedge": spothedge,
    "on-demand": lambda: replace(CORRAL, buyer=lambda s: OnDemandOnly()),
    "spot-only": lambda: replace(CORRAL, buyer=lambda s: SpotOnly()),
    "any-zone": any_zone,
    "planned": planned,
    "planned-milp": lambda: planned(limit_s=0.5),
}
# Parts that only matter where machines are bought.
NEEDS_MARKET = frozenset(
    {"static", "hpa", "kpa", "spothedge", "on-demand", "spot-only", "any-zone", "planned", "planned-milp"}
)


def policy(text: str) -> Policy:
    """The policy of a name with its knobs; ValueError names what is unknown and what is known."""
    name, *pairs = text.split(":")
    maker = MAKERS.get(name)
    if maker is None:
        raise ValueError(f"{name!r} is unknown; known: {', '.join(MAKERS)}")
    known = inspect.signature(maker).parameters
    knobs: dict[str, float | int] = {}
    for pair in pairs:
        knob, _, value = pair.partition("=")
        if knob not in known:
            raise ValueError(f"{name}: no knob {knob!r}; it has {', '.join(known) or 'none'}")
        try:
            knobs[knob] = type(known[knob].default)(value)
        except ValueError:
            raise ValueError(f"{name}: {knob} = {value!r}: give a number") from None
    return maker(**knobs)


POLICIES: dict[str, Policy] = {name: policy(name) for name in MAKERS}
