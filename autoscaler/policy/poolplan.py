"""One turn of a whole pool: what to buy beside what deployments order, and what to give back. Pure.

Puts two policies of the simulator to work on one pool, unchanged: spot.py says how many machines of which offers there
should be, spares included, and when on-demand is not needed any more; disruption.py which machines others or cheaper
ones can stand in for, and how many may go at a time. A machine that is given up counts as under notice: its replicas
move before it goes. Called by autoscaler/pool.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final

from autoscaler.policy.disruption import (
    Budget,
    Buyable,
    DisruptionMemory,
    Held,
    Thrift,
    allowance,
    consolidate,
)
from autoscaler.policy.poolrest import NOTHING, STOPPED, WARM, RestInputs, RestMemory, next_rest
from autoscaler.policy.reserve import ReserveInputs, keep
from autoscaler.policy.sizes import Scale
from autoscaler.policy.spot import FleetView, Orders, SpotMemory, SpotSpec, buy

MAX_BUYS: Final = 16  # machines a turn; the next one comes in seconds
_ON_DEMAND: Final = ""


@dataclass(frozen=True, slots=True)
class PoolMachine:
    """A machine that exists and is not being given up already. is_leaving: its provider takes it away."""

    held: Held
    offering: str
    is_spot: bool


@dataclass(frozen=True, slots=True)
class Stopped:
    """A machine of which only the disk is paid for. can_start: its zone did not refuse to a moment ago."""

    id: str
    for_s: float
    can_start: bool = True


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """What one turn leaves to the next, beside what spot.py learned. n_spares: empty machines that are kept."""

    disruption: DisruptionMemory = field(default_factory=DisruptionMemory)
    n_spares: int = 0
    rest: RestMemory = field(default_factory=RestMemory)


@dataclass(frozen=True, slots=True)
class PoolInputs:
    """All that a turn is given. The view counts units of the scale; `view.n_wanted`: those with work that stay. n_room:
    machines the pool may have more.
    max_spares: machines without work at most. cover: the on-demand offer to buy cover of ('' = none sells). `spot`
    False: nothing is bought that can be taken back.
    """

    view: FleetView
    machines: tuple[PoolMachine, ...]
    offers: tuple[Buyable, ...]
    spec: SpotSpec
    learned: SpotMemory
    budget: Budget
    thrift: Thrift
    memory: PoolMemory
    n_room: int
    max_spares: int = 4
    cover: str = ""
    spot: bool = True
    rest: RestInputs = field(default_factory=RestInputs)
    # Machines that are stopped; those of `machines` that may be; for how long one stays a reserve beside work.
    stopped: tuple[Stopped, ...] = ()
    n_stopping: int = 0  # told to, and not there yet: they can neither serve nor be started
    may_stop: tuple[str, ...] = ()
    stopped_reserve_s: float = 3600.0
    scale: Scale = field(default_factory=Scale)
    # Machines that lie stopped to stand in for spot. None of them is in `stopped` or `may_stop`, in `machines` only
    # those that were started again.
    reserve: ReserveInputs = field(default_factory=ReserveInputs)


@dataclass(frozen=True, slots=True)
class Buy:
    """One machine of this offer; it stands in for the machine `replaces` ('' = for none: a spare), or lies stopped at
    `reserve_place`."""

    offer: str
    replaces: str = ""
    reserve_place: int | None = None


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Move everything off this machine, then give it back."""

    machine_id: str
    why: str


@dataclass(frozen=True, slots=True)
class PoolOrders:
    """buy, give_up; cancel: machines that have not come up and that nobody waits for."""

    buy: tuple[Buy, ...] = ()
    give_up: tuple[GiveUp, ...] = ()
    cancel: tuple[GiveUp, ...] = ()
    # Machines to stop, to start again, and stopped ones to end.
    stop: tuple[GiveUp, ...] = ()
    start: tuple[str, ...] = ()
    end: tuple[GiveUp, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def is_quiet(self) -> bool:
        return not (self.buy or self.give_up or self.cancel or self.stop or self.start or self.end)


def plan_pool(inputs: PoolInputs) -> tuple[PoolOrders, SpotMemory, PoolMemory]:
    """Orders for now, and what to remember. Ties by id."""
    in_units, learned = buy(inputs.view, inputs.spec, inputs.learned)
    wanted = inputs.scale.machines(in_units)
    staying = [m for m in sorted(inputs.machines, key=lambda m: m.held.id) if not m.held.is_leaving]
    buys = _buys(inputs, wanted, staying) if inputs.spot else []

    busy = [m.held for m in staying if m.held.n_replicas or m.held.replaces]
    leaving = [m.held for m in inputs.machines if m.held.is_leaving]
    covered = {b.replaces for b in buys if b.replaces}
    # Whether spot may stand in for a machine is spot.py's question: it knows what a loss costs.
    spot_names = {o.name for o in inputs.view.offers}
    told, disruption = consolidate(
        [replace(h, is_ready=False) if h.id in covered else h for h in busy] + leaving,
        [] if buys else [o for o in inputs.offers if o.name not in spot_names],
        inputs.view.now_s,
        inputs.budget,
        inputs.thrift,
        inputs.memory.disruption,
    )
    reasons = [*told.reasons]
    buys += [Buy(offer, machine) for offer, machine in told.launch]
    give_up = {each: _why(each, told.reasons) for each in told.give_up}
    for name, n in ((_ON_DEMAND, in_units.release_on_demand), *in_units.release):
        released = _to_release(inputs, staying, name, n, disruption, set(give_up))
        give_up |= released
        reasons += [f"{machine}: {why}" for machine, why in released.items()]
        at_s = (inputs.view.now_s,) * len(released)
        disruption = DisruptionMemory((*disruption.given_up_at_s, *at_s))
    cancel = _to_cancel(inputs, staying, in_units) if inputs.view.n_wanted else []
    resting, schedule = next_rest(inputs.rest, inputs.view.now_s, inputs.memory.rest)
    stop, start, end = _at_rest(inputs, resting)
    if schedule is not None and start:
        reasons += [f"rests: {resting.rung}: {start[0]} is started again", schedule.reason]
    elif (
        schedule is not None
        and resting.rung == WARM
        and not (inputs.machines or inputs.n_stopping)
        and inputs.offers
    ):
        best = min(inputs.offers, key=lambda o: (o.usd_per_h, o.name))
        buys.append(Buy(best.name))
        reasons.append(
            f"no work for {inputs.view.now_s - (resting.idle_since_s or 0):.0f} s: a machine is made warm"
        )
        reasons.append(schedule.reason)
    buys = buys[: max(min(inputs.n_room, MAX_BUYS), 0)]
    if buys:
        reasons.insert(0, "; ".join(wanted.reasons))
    kept = keep(inputs.reserve, inputs.view.n_wanted)
    if inputs.cover:  # beside the places of the pool
        buys += [Buy(inputs.cover, reserve_place=place) for place in kept.buy[:MAX_BUYS]]
        reasons += [
            f"reserve: a machine for place {place} of {inputs.reserve.n}" for place in kept.buy[:MAX_BUYS]
        ]
    stop += tuple(GiveUp(*each) for each in kept.stop)
    end += tuple(GiveUp(*each) for each in kept.end)
    reasons += [f"{g.machine_id}: {g.why}" for g in (*stop, *end)]
    orders = PoolOrders(
        tuple(buys),
        tuple(GiveUp(machine, why) for machine, why in sorted(give_up.items())),
        tuple(GiveUp(machine, "what is ready suffices") for machine in cancel),
        stop,
        start,
        end,
        tuple(reasons),
    )
    return (
        orders,
        learned,
        PoolMemory(disruption, _n_spares(inputs, in_units, staying) if inputs.spot else 0, resting),
    )


def _at_rest(
    inputs: PoolInputs, resting: RestMemory
) -> tuple[tuple[GiveUp, ...], tuple[str, ...], tuple[GiveUp, ...]]:
    """(machines to stop, to start again, stopped ones to end): one stays stopped at most, as long as its rung is held;
    beside work it is a reserve for a while, and then not."""
    stopped = sorted(inputs.stopped, key=lambda s: (not s.can_start, s.for_s, s.id))
    if resting.rung == WARM:
        start = [s.id for s in stopped if s.can_start and not inputs.machines][:1]
        return (), tuple(start), tuple(GiveUp(s.id, "one is enough") for s in stopped[1:])
    if resting.rung == NOTHING:
        return (), (), tuple(GiveUp(s.id, f"rests: {NOTHING}") for s in stopped)
    if resting.rung == STOPPED:
        idle = [
            m.held
            for m in inputs.machines
            if m.held.is_ready
            and not m.held.n_replicas
            and not m.held.is_leaving
            and m.held.id in inputs.may_stop
        ]
        best = min(idle, key=lambda h: (h.usd_per_h, h.id), default=None)
        stop = () if best is None or stopped or inputs.n_stopping else (GiveUp(best.id, f"rests: {STOPPED}"),)
        return stop, (), tuple(GiveUp(s.id, "one is enough") for s in stopped[1:])
    if not inputs.rest.rungs:
        return (), (), tuple(GiveUp(s.id, "nobody wants anything of this pool") for s in stopped)
    late = [s for s in stopped if s.for_s > inputs.stopped_reserve_s]
    return (), (), tuple(GiveUp(s.id, f"stopped for {s.for_s:.0f} s beside work") for s in late)


def _buys(inputs: PoolInputs, wanted: Orders, staying: list[PoolMachine]) -> list[Buy]:
    """Machines that are missing: the first spot ones stand in for on-demand machines that have work and whose replicas
    they hold, the others lie ready as spares, as many as are allowed.
    """
    stood_in_for = {m.held.replaces for m in inputs.machines if m.held.replaces}
    dear = [m.held for m in staying if not m.is_spot and m.held.n_replicas and m.held.id not in stood_in_for]
    n_more = inputs.max_spares - sum(1 for m in staying if not m.held.n_replicas and not m.held.replaces)
    holds = {o.name: o.n_places for o in inputs.offers}
    found, spare = [], []
    for name in (name for name, n in wanted.launch for _ in range(n)):
        held = next((h for h in dear if h.n_replicas <= holds.get(name, h.n_places)), None)
        if held is None:
            spare.append(name)
        else:
            dear.remove(held)
            found.append(Buy(name, held.id))
    if inputs.cover:
        spare += [inputs.cover] * -(-wanted.launch_on_demand // inputs.scale.units(inputs.cover))
    return found + [Buy(name) for name in spare[: max(n_more, 0)]]


def _to_release(
    inputs: PoolInputs,
    staying: list[PoolMachine],
    name: str,
    n: int,
    memory: DisruptionMemory,
    gone: set[str],
) -> dict[str, str]:
    """Ready machines with work, of an offer or on-demand ones, `n` units at most, as far as the budget allows and their
    replicas fit on machines that are ready and stay. Empty ones go when they have been so for long (machines.py).
    """
    if n <= 0 or not inputs.view.n_wanted:
        return {}
    left = allowance(
        [replace(m.held, is_leaving=m.held.is_leaving or m.held.id in gone) for m in inputs.machines],
        memory.given_up_at_s,
        inputs.budget,
    )
    ready = [m for m in staying if m.held.is_ready and m.held.id not in gone]
    of_kind = [m for m in ready if (not m.is_spot if name == _ON_DEMAND else m.offering == name)]
    of_name = [m for m in of_kind if m.held.n_replicas]
    units = inputs.scale.units
    n -= sum(units(m.offering) for m in of_kind) - sum(units(m.offering) for m in of_name)
    of_name.sort(key=lambda m: (m.held.n_replicas, -m.held.usd_per_h, m.held.id))
    others = [m.held for m in ready if m not in of_kind]
    n_free = sum(h.n_places - h.n_replicas for h in others)
    found: dict[str, str] = {}
    for machine in of_name:
        held = machine.held
        if len(found) >= left or held.n_replicas > n_free:
            break
        if units(machine.offering) > n:
            continue
        n -= units(machine.offering)
        n_free -= held.n_replicas
        found[held.id] = (
            "spot serves again: on-demand is not needed any more"
            if name == _ON_DEMAND
            else f"{name} holds more than is wanted and spare"
        )
    return found


def _to_cancel(inputs: PoolInputs, staying: list[PoolMachine], wanted: Orders) -> list[str]:
    # Those of the reserve lie down when they are up.
    mine = {m.id for m in inputs.reserve.members if m.place < inputs.reserve.n}
    coming = [m for m in staying if not m.held.is_ready and not m.held.n_replicas and m.held.id not in mine]
    found = _within([m for m in coming if not m.is_spot], wanted.cancel_on_demand, inputs.scale)
    for name, n in wanted.cancel:
        found += _within([m for m in coming if m.offering == name], n, inputs.scale)
    return found


def _within(machines: list[PoolMachine], n: int, scale: Scale) -> list[str]:
    """The first of them that are `n` units together at most."""
    found = []
    for machine in machines:
        if scale.units(machine.offering) <= n:
            n -= scale.units(machine.offering)
            found.append(machine.held.id)
    return found


def _n_spares(inputs: PoolInputs, wanted: Orders, staying: list[PoolMachine]) -> int:
    """Machines beyond those with work once these orders (in units) are carried out: the largest first, as they are kept
    (machines.py)."""
    view = inputs.view
    if not view.n_wanted:
        return 0
    n = sum(o.n_pending + o.n_ready - o.n_leaving for o in view.offers)
    n += view.n_on_demand_pending + view.n_on_demand_ready
    n += sum(n for _, n in wanted.launch) + wanted.launch_on_demand
    n -= sum(n for _, n in (*wanted.release, *wanted.cancel))
    n -= wanted.release_on_demand + wanted.cancel_on_demand
    n -= view.n_wanted
    empty = [inputs.scale.units(m.offering) for m in staying if not m.held.n_replicas]
    empty += [
        inputs.scale.units(name)
        for name, n in wanted.launch
        for _ in range(-(-n // inputs.scale.units(name)))
    ]
    n_machines = 0
    for each in sorted(empty, reverse=True):
        if n <= 0:
            break
        n -= each
        n_machines += 1
    return min(n_machines, inputs.max_spares)


def _why(machine: str, reasons: Iterable[str]) -> str:
    said = next((r for r in reasons if r.startswith(f"{machine}: ")), "")
    return said.removeprefix(f"{machine}: ")
