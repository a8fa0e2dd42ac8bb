"""What a provider of machines is to the autoscaler: launch, terminate, list. Implemented by local.py.

Calls are made by the control worker, each bounded in time; `launch` with the same client token is one
machine, however often it is called. A provider knows machines, never deployments or tenants, and
imports no Django.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol


class ProviderError(Exception):
    """The provider could not do it now; trying again may help. `code` is stable."""

    code = "provider_error"


class CapacityError(ProviderError):
    """No machine of this kind to be had: ask again later or elsewhere."""

    code = "no_capacity"


class ProviderRefusedError(ProviderError):
    """It will never do this as asked (bad configuration, no right); the message says the remedy."""

    code = "provider_refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """One machine to be. `proof` lets its agent enrol once: never logged, never on a command line."""

    machine_id: str
    cell: str
    enrol_url: str
    engine: str
    model_cache: str = ""
    redis: str = ""  # host:port where it differs from what enrolment says
    proof: str = field(repr=False)


class ProviderState(StrEnum):
    """What the provider says about a machine."""

    RUNNING = "running"
    # It exists, but its agent does not run.
    AGENT_DOWN = "agent_down"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderMachine:
    """One entry of the provider's own list. `ref` is its name for the machine, `machine_id` our tag on it."""

    ref: str
    machine_id: str
    client_token: str
    state: ProviderState
    started_at_s: float


class Provider(Protocol):
    """All methods block (seconds at most) and raise ProviderError."""

    name: str

    def launch(self, spec: LaunchSpec, client_token: str) -> ProviderMachine:
        """The machine of this token, started if it is not there yet. CapacityError when there is none."""

    def restart_agent(self, ref: str) -> bool:
        """Start the agent of a machine whose state is AGENT_DOWN; False where only a new machine helps."""

    def terminate(self, ref: str) -> None:
        """End it and all that runs on it; a machine that is gone is fine."""

    def describe(self) -> list[ProviderMachine]:
        """Every machine of ours that exists, known to the caller or not."""
