"""What a provider of machines is to the autoscaler: launch, terminate, list. Implemented by local.py and aws/.

Calls are made by the control worker, each bounded in time; `launch` with the same client token is one
machine, however often it is called. A provider knows machines, never deployments or tenants, and
imports no Django.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class ProviderError(Exception):
    """The provider could not do it now; trying again may help. `code` is stable."""

    code = "provider_error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One offering that gave no machine, and the provider's own code for why."""

    offering: str
    code: str


class CapacityError(ProviderError):
    """No machine of this kind to be had: ask again later or elsewhere. `refusals`: which offerings said so."""

    code = "no_capacity"

    def __init__(self, message: str, refusals: tuple[Refusal, ...] = ()) -> None:
        super().__init__(message)
        self.refusals = refusals


class OutcomeUnknownError(ProviderError):
    """The answer was lost: there may be a machine. Asking again with the same client token tells."""

    code = "outcome_unknown"


class ProviderRefusedError(ProviderError):
    """It will never do this as asked (bad configuration, no right); the message says the remedy."""

    code = "provider_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offering:
    """A kind of machine that can be bought: its type, where, and whether it may be taken back (spot)."""

    instance_type: str
    zone: str
    is_spot: bool
    price_nano_per_h: int  # nano-dollars per hour, as the provider last said
    gpu: str = ""  # name in controlplane/policy/gpus.py; empty: none, or one we do not know
    n_gpus: int = 0

    @property
    def name(self) -> str:
        """`spot/us-east-1a/g6.xlarge`: unique within a provider, and what rows and decisions call it."""
        return f"{'spot' if self.is_spot else 'on-demand'}/{self.zone}/{self.instance_type}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One machine to be. `proof` lets its agent enrol once: never logged, never on a command line.

    offerings: the kinds it may be, best first; the same for every call with one client token. Empty where the provider
    has one kind only.
    """

    machine_id: str
    cell: str
    enrol_url: str
    engine: str
    model_cache: str = ""
    redis: str = ""  # host:port where it differs from what enrolment says
    offerings: tuple[Offering, ...] = ()
    proof: str = field(repr=False)


class ProviderState(StrEnum):
    """What the provider says about a machine."""

    RUNNING = "running"
    # It exists, but its agent does not run.
    AGENT_DOWN = "agent_down"
    STOPPING = "stopping"
    STOPPED = "stopped"  # its disk is kept
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderMachine:
    """One entry of the provider's own list. `ref` is its name for the machine, `machine_id` our tag on it."""

    ref: str
    machine_id: str
    client_token: str
    state: ProviderState
    started_at_s: float
    offering: str = ""  # name of the Offering it was bought as; empty where there is one kind only
    # Those that were asked before it and had none.
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class CentralNotice:
    """A machine will be taken away, or (`is_advice`) should be left before it is. Seconds since the epoch.

    receipt: what `heeded` is told by.
    """

    ref: str
    ends_at_s: float
    is_advice: bool
    receipt: str


class Provider(Protocol):
    """All methods block (seconds at most) and raise ProviderError."""

    name: str
    # How long after a launch its own list may not show the machine yet.
    lists_after_s: float
    # Whether machines can be stopped and started again.
    stops: bool

    def launch(self, spec: LaunchSpec, client_token: str) -> ProviderMachine:
        """The machine of this token, started if it is not there yet. CapacityError when there is none."""

    def restart_agent(self, ref: str) -> bool:
        """Start the agent of a machine whose state is AGENT_DOWN; False where only a new machine helps."""

    def terminate(self, ref: str) -> None:
        """End it and all that runs on it; a machine that is gone is fine."""

    def stop(self, ref: str) -> None:
        """It keeps its disk and costs storage only; one that is stopped is fine. Only where `stops`."""

    def start(self, ref: str) -> None:
        """Start a stopped machine; one that runs is fine. CapacityError when there is no room for it now."""

    def leaving(self, ref: str, in_s: float) -> None:
        """We move everything off it, within `in_s`. Where machines share a computer, its successor takes its place."""

    def staying(self, ref: str) -> None:
        """It stays after all: takes `leaving` back, and nothing that the provider itself announced. May be repeated."""

    def describe(self) -> list[ProviderMachine]:
        """Every machine of ours that exists, known to the caller or not."""

    def offerings(self) -> list[Offering]:
        """What can be bought, at the prices of now. Empty where there is one kind only, and it costs nothing."""

    def notices(self) -> Iterable[CentralNotice]:
        """Machines about to go, as the provider says it centrally; each comes again until it is `heeded`."""

    def heeded(self, notice: CentralNotice) -> None:
        """It was dealt with."""
