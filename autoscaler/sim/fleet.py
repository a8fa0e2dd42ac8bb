"""Machines on a recorded spot market: bought, booting, ready, told to go, gone; and what they cost.

A buyer (the production policy or a baseline) is asked every `tick_s`, and at once on a notice, a loss or a refusal. The
world, if there is one, is told when a machine becomes ready or goes, and serves requests with them.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from autoscaler.policy.spot import FleetView, OfferView, Orders, SpotSpec
from autoscaler.sim.kernel import Kernel
from autoscaler.sim.market import Steps, Zone

GRACE_S: Final = 60.0  # beyond a start, before a machine that is wanted counts as missing: the longest tick


class Buyer(Protocol):
    """Decides what to buy; keeps its own memory."""

    def buy(self, view: FleetView) -> Orders: ...


@dataclass(slots=True)
class Machine:
    """`zone` None: on-demand. Instants in virtual seconds."""

    id: int
    zone: Zone | None
    bought_s: float
    is_ready: bool = False
    is_leaving: bool = False
    is_released: bool = False  # nobody's any more, but it still finishes and is paid for what it runs
    is_gone: bool = False
    is_reserve: bool = False  # lies stopped again when it is given back

    @property
    def serves(self) -> bool:
        return self.is_ready and not self.is_released


@dataclass(frozen=True, slots=True)
class Terms:
    """The market's assumptions: seconds to boot (order to serving), of warning, between looks; USD an hour. `n_reserve`
    on-demand machines lie stopped from the beginning on, are paid for as such, and serve `resume_s` after an order."""

    boot_s: float
    notice_s: float
    on_demand_usd_per_h: float
    tick_s: float = 60.0
    n_reserve: int = 0
    resume_s: float = 0.0
    stopped_usd_per_h: float = 0.0

    def spot_spec(self, availability: float = 0.999) -> SpotSpec:
        """The house's way of buying under them."""
        return SpotSpec(
            self.boot_s, self.notice_s, availability, resume_s=self.resume_s if self.n_reserve else None
        )


class Fleet:
    """Machines of one pool. `wanted(now_s)` says how many should be ready; it is asked once per instant, in order."""

    def __init__(
        self,
        kernel: Kernel,
        zones: tuple[Zone, ...],
        terms: Terms,
        buyer: Buyer,
        wanted: Callable[[float], int],
        until_s: float,
        *,
        on_ready: Callable[[Machine], None] = lambda machine: None,
        on_leaving: Callable[[Machine], None] = lambda machine: None,
        on_gone: Callable[[Machine], None] = lambda machine: None,
        on_release: Callable[[Machine], None] | None = None,
        count_from_s: float = 0.0,
    ) -> None:
        self.kernel = kernel
        self.zones = zones
        self.terms = terms
        self.buyer = buyer
        self.wanted = wanted
        self.until_s = until_s
        self.machines: list[Machine] = []
        self.usd_spot = self.usd_on_demand = self.usd_stopped = 0.0
        self.n_stopped = terms.n_reserve
        self.n_bought = self.n_refused = self.n_lost = 0
        # Seconds with enough machines ready, in shortage, and machine seconds missing then.
        self.ok_s = self.short_s = self.missing_machine_s = self.wanted_machine_s = 0.0
        self._on_ready, self._on_leaving, self._on_gone = on_ready, on_leaving, on_gone
        # Whoever it tells calls `finish`; None: a machine given back is gone at once.
        self._on_release = on_release
        self._refused: dict[str, float] = {}
        self._closing: dict[
            str, float
        ] = {}  # zone -> until when it gives nothing, because it is about to drop
        self._n_machines = 0
        # Since when so many were wanted, and when that was last asked.
        self._wish_s, self._wishes, self._asked_at_s = [-1.0], [0], -1.0
        self._counted_s = 0.0
        # The very first start is nobody's shortage, and what came before `count_from_s` nobody's cost.
        self._count_from_s = max(count_from_s, terms.boot_s + GRACE_S)
        self._usd_before = 0.0
        self._is_due = False
        self._asked_s, self._n_asked = -1.0, 0
        for zone in zones:
            for at_s, capacity in zone.drops():
                if at_s < until_s:
                    kernel.at(max(at_s - terms.notice_s, kernel.now_s), self._announce, zone, at_s, capacity)
                    kernel.at(at_s, self._drop, zone, capacity)
        kernel.at(kernel.now_s, self._tick)
        if count_from_s > 0:
            kernel.at(count_from_s, self._begin_counting)

    # -- the market

    def _announce(self, zone: Zone, drop_s: float, capacity: int) -> None:
        self._closing[zone.name] = max(drop_s, self._closing.get(zone.name, 0.0))
        if self.terms.notice_s > 0:
            for machine in self._in_zone(zone)[capacity:]:
                self._tell(machine)

    def _drop(self, zone: Zone, capacity: int) -> None:
        for machine in self._in_zone(zone)[capacity:]:
            self._tell(machine)
            self.n_lost += not machine.is_released
            self._end(machine)
            self._refused[zone.name] = self.kernel.now_s
        self._soon()

    def _tell(self, machine: Machine) -> None:
        if not machine.is_leaving:
            machine.is_leaving = True
            self._on_leaving(machine)
            self._soon()

    def _in_zone(self, zone: Zone) -> list[Machine]:
        """Oldest first: the newest go first."""
        return [m for m in self.machines if m.zone is zone]

    # -- the buyer

    def _tick(self) -> None:
        self._decide()
        if self.kernel.now_s + self.terms.tick_s < self.until_s:
            self.kernel.after(self.terms.tick_s, self._tick)

    def _soon(self) -> None:
        """Ask the buyer after everything that happens at this instant."""
        if not self._is_due:
            self._is_due = True
            self.kernel.after(0.0, self._decide)

    def _decide(self) -> None:
        self._is_due = False
        self._account()
        orders = self.buyer.buy(self.view())
        for name, n in orders.release:
            for machine in [m for m in self.machines if m.zone and m.zone.name == name and m.serves][::-1][
                :n
            ]:
                self._release(machine)
        ready = [m for m in self.machines if m.zone is None and m.serves]
        for machine in ready[::-1][: orders.release_on_demand]:
            self._release(machine)
        starting = [m for m in self.machines if m.zone is None and not m.is_ready]
        for machine in starting[::-1][: orders.cancel_on_demand]:
            self._end(machine)
        for name, n in orders.cancel:
            starting = [m for m in self.machines if m.zone and m.zone.name == name and not m.is_ready]
            for machine in starting[::-1][:n]:
                self._end(machine)
        was_refused = False
        for name, n in orders.launch:
            zone = next(z for z in self.zones if z.name == name)
            for _ in range(n):
                if not self._launch(zone):
                    was_refused = True
                    break
        for _ in range(orders.launch_on_demand):
            self._launch(None)
        # A refusal is answered at once with the next offer, as often as there are offers; then time must pass.
        self._n_asked = self._n_asked + 1 if self._asked_s == self.kernel.now_s else 1
        self._asked_s = self.kernel.now_s
        if was_refused and self._n_asked <= len(self.zones):
            self._soon()

    def _launch(self, zone: Zone | None) -> bool:
        now_s = self.kernel.now_s
        if zone is not None:
            closing = self._closing.get(zone.name, -1.0) > now_s
            if closing or len(self._in_zone(zone)) >= zone.at(now_s):
                self.n_refused += 1
                self._refused[zone.name] = now_s
                return False
        is_reserve = zone is None and self.n_stopped > 0
        self.n_stopped -= is_reserve
        self._n_machines += 1
        self.n_bought += not is_reserve
        machine = Machine(self._n_machines, zone, now_s, is_reserve=is_reserve)
        self.machines.append(machine)
        self.kernel.after(self.terms.resume_s if is_reserve else self.terms.boot_s, self._booted, machine)
        return True

    def _booted(self, machine: Machine) -> None:
        if not machine.is_gone:
            self._account()
            machine.is_ready = True
            self._on_ready(machine)
            self._soon()

    def _release(self, machine: Machine) -> None:
        """It is wanted no more: it gets nothing new and goes when it is empty."""
        if self._on_release is None:
            self._end(machine)
            return
        self._account()
        machine.is_released = True
        self._on_release(machine)

    def finish(self, machine: Machine) -> None:
        """A released machine is empty, or has had its time."""
        if not machine.is_gone:
            self._end(machine)

    def _end(self, machine: Machine) -> None:
        self._account()
        machine.is_gone = True
        self.machines.remove(machine)
        self.n_stopped += machine.is_reserve
        hours = (self.kernel.now_s - machine.bought_s) / 3600
        if machine.zone is None:
            self.usd_on_demand += hours * self.terms.on_demand_usd_per_h
        else:
            self.usd_spot += hours * machine.zone.usd_per_h
        if machine.is_ready:
            self._on_gone(machine)

    # -- books

    def view(self) -> FleetView:
        now_s = self.kernel.now_s
        pending: dict[str, int] = {}
        ready: dict[str, int] = {}
        leaving: dict[str, int] = {}
        n_pending = n_ready = 0
        for m in self.machines:
            if m.is_released:
                continue
            if m.zone is None:
                n_ready += m.is_ready
                n_pending += not m.is_ready
            else:
                name = m.zone.name
                counts = ready if m.is_ready else pending
                if m.is_leaving and not m.is_ready:
                    continue  # it will not be there in time
                counts[name] = counts.get(name, 0) + 1
                leaving[name] = leaving.get(name, 0) + m.is_leaving
        offers = tuple(
            OfferView(
                z.name,
                z.usd_per_h,
                pending.get(z.name, 0),
                ready.get(z.name, 0),
                leaving.get(z.name, 0),
                self._refused.get(z.name),
            )
            for z in self.zones
        )
        return FleetView(
            now_s,
            self._wanted_now(),
            offers,
            self.terms.on_demand_usd_per_h,
            n_pending,
            n_ready,
            self.n_stopped,
        )

    def _account(self) -> None:
        """Book the time since the last change under what was ready then."""
        now_s = self.kernel.now_s
        passed_s = now_s - self._counted_s
        if passed_s <= 0:
            return
        wanted = self._due(self._counted_s)
        n_ready = sum(m.serves for m in self.machines)
        self._counted_s = now_s
        self.usd_stopped += self.n_stopped * passed_s / 3600 * self.terms.stopped_usd_per_h
        if now_s <= self._count_from_s:
            return
        self.wanted_machine_s += wanted * passed_s
        if n_ready >= wanted:
            self.ok_s += passed_s
        else:
            self.short_s += passed_s
            self.missing_machine_s += (wanted - n_ready) * passed_s

    def _begin_counting(self) -> None:
        self._account()
        self._usd_before = self.usd_now

    def _wanted_now(self) -> int:
        now_s = self.kernel.now_s
        if self._asked_at_s < now_s:
            self._asked_at_s = now_s
            n = self.wanted(now_s)
            if n != self._wishes[-1]:
                self._wish_s.append(now_s)
                self._wishes.append(n)
        return self._wishes[-1]

    def _due(self, at_s: float) -> int:
        """Machines that could be there then: what was wanted ever since a machine had to be ordered for it."""
        first = max(bisect.bisect_right(self._wish_s, at_s - self.terms.boot_s - GRACE_S) - 1, 0)
        last = max(bisect.bisect_right(self._wish_s, at_s), first + 1)
        return min(self._wishes[first:last])

    def close(self) -> None:
        """The end: what still runs is paid for."""
        self._account()
        for machine in list(self.machines):
            self._end(machine)

    @property
    def n_wanted(self) -> int:
        return self._wishes[-1]

    @property
    def demand(self) -> Steps:
        """What was wanted, from the first instant on."""
        return Steps(tuple(self._wish_s), tuple(self._wishes))

    @property
    def usd_now(self) -> float:
        """Paid so far, with what running machines have cost until now."""
        running = 0.0
        for machine in self.machines:
            price = self.terms.on_demand_usd_per_h if machine.zone is None else machine.zone.usd_per_h
            running += (self.kernel.now_s - machine.bought_s) / 3600 * price
        return self.usd + running

    @property
    def usd_counted(self) -> float:
        """Paid since counting began. After `close`."""
        return self.usd - self._usd_before

    @property
    def usd(self) -> float:
        return self.usd_spot + self.usd_on_demand + self.usd_stopped

    @property
    def availability(self) -> float:
        return self.ok_s / max(self.ok_s + self.short_s, 1e-9)
