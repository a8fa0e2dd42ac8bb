"""How many replicas a kind of machine holds, and a market of several sizes in one unit. Pure.

A pool may buy machines with one GPU and with eight. Buying policies (spot.py, cover.py) count like with like: prices,
machines held and machines wanted are turned into places of one common unit here, and their orders back into machines.
Where every kind holds the same the unit is a machine, and nothing changes. Called by autoscaler/market.py and pool.py,
and by policy/poolplan.py for the way back.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from autoscaler.policy.spot import Orders
from controlplane.policy.gpus import CAPABILITIES, GPUS


@dataclass(frozen=True, slots=True)
class Need:
    """What one replica runs on: so many of this GPU, or of any that can do what it does. No name: no GPU is asked for,
    and a machine holds what the house says."""

    gpu: str = ""
    n_gpus: int = 1


def serves(need: str, gpu: str) -> bool:
    """Whether a profile made for the GPU `need` runs on `gpu`: as much memory, and every kernel that it may choose."""
    if need == gpu:
        return True
    wanted, found = GPUS.get(need), GPUS.get(gpu)
    if wanted is None or found is None:
        return False
    return found.memory_bytes >= wanted.memory_bytes and CAPABILITIES[gpu] >= CAPABILITIES[need]


def places(need: Need, gpu: str, n_gpus: int, otherwise: int) -> int:
    """Replicas that a machine with these GPUs holds, each on GPUs of its own; 0 where none runs. `otherwise`: of every
    machine, where no GPU is asked for."""
    if not need.gpu:
        return otherwise
    return n_gpus // need.n_gpus if serves(need.gpu, gpu) else 0


@dataclass(frozen=True, slots=True)
class Scale:
    """Places by offer, and the unit: the largest number of places that divides them all.

    An offer that is not listed any more counts as one unit.
    """

    places: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    unit: int = 1

    @classmethod
    def of(cls, places: Mapping[str, int]) -> Scale:
        """Of offers that hold one replica at least."""
        return cls(places, math.gcd(*places.values()) or 1)

    def units(self, offer: str) -> int:
        """Of one machine."""
        return max(self.places.get(offer, self.unit) // self.unit, 1)

    def needed(self, n_replicas: int) -> int:
        """Units that hold so many replicas."""
        return -(-n_replicas // self.unit)

    def useful(self, offer: str, n_wanted: int) -> int:
        """Units of one machine that would be used, were so many wanted: empty places are no bargain."""
        return max(min(self.units(offer), n_wanted), 1)

    @property
    def is_mixed(self) -> bool:
        return len(set(self.places.values())) > 1

    def machines(self, orders: Orders) -> Orders:
        """Spot orders in machines: what is to be bought rounded up, what is to go rounded down."""
        return replace(
            orders,
            launch=self._each(orders.launch, up=True),
            release=self._each(orders.release),
            cancel=self._each(orders.cancel),
        )

    def _each(self, ordered: Iterable[tuple[str, int]], *, up: bool = False) -> tuple[tuple[str, int], ...]:
        counted = ((name, -(-n // self.units(name)) if up else n // self.units(name)) for name, n in ordered)
        return tuple((name, n) for name, n in counted if n)
