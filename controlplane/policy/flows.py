"""What a fair queue is made of: service and counters, flows, requests and replicas. Pure.

fairness.py and waitingflows.py put them in order; workers/lua/lib_flows.lua holds the same numbers in the cell.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from controlplane.policy.prefix import PrefixIndex

# Counter units of one prompt token at the ordinary weight. An output token costs twice, a cached one a tenth.
TOKEN: Final = 1000
ORDINARY_WEIGHT: Final = 100
FLEX_BAND: Final = 3  # the last of the service classes
ANY_MS: Final = 2**53 - 1  # slot time that nothing exceeds, exact in Lua


def service(n_prompt: int, n_cached: int, n_output: int) -> int:
    """Service in tenths of a prompt token: the prices of VTC, and a tenth for what was cached."""
    return 10 * (n_prompt - n_cached) + n_cached + 20 * n_output


def virtual(tenths: int, weight: int) -> int:
    """What a charge adds to a counter of this weight."""
    return tenths * TOKEN * ORDINARY_WEIGHT // (10 * weight)


@dataclass(frozen=True, slots=True)
class Flow:
    """Whose request it is: band, organization, project, key, and their weights (100 = ordinary)."""

    band: int
    organization: str
    project: str
    key: str
    weights: tuple[int, int, int] = (ORDINARY_WEIGHT,) * 3  # organization, project, key


@dataclass(slots=True)
class Request:
    """A request as the queue sees it. `charged` is in tenths of a prompt token; the queue writes the rest."""

    id: str
    flow: Flow
    order_key: int
    n_prompt: int
    n_expected: int
    prefixes: tuple[str, ...] = ()
    slot_ms: int = 0  # how long it is predicted to keep a slot busy
    admitted_at_ms: int = 0
    charged: int = 0
    replica: str = ""  # '' while it waits


@dataclass(slots=True)
class Replica:
    """A replica's slots. It takes new requests while it is `routed`."""

    slots: int
    routed: bool = True
    running: set[str] = field(default_factory=set)
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)

    @property
    def is_free(self) -> bool:
        return self.routed and len(self.running) < self.slots
