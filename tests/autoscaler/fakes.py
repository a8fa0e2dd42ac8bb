"""A provider of machines that exist in memory only, with the failures that real ones have."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

from infra.providers.base import (
    CapacityError,
    CentralNotice,
    LaunchSpec,
    Offering,
    ProviderError,
    ProviderMachine,
    ProviderState,
    Refusal,
)


class FakeProvider:
    """Keeps the Provider protocol. `lose_reply`: the next launch happens, but its answer never arrives."""

    name = "fake"
    lists_after_s = 0.0
    stops = True
    no_room = False  # for a stopped machine
    stops_slowly = False  # it is `stopping` until the test says more

    def __init__(self) -> None:
        self.machines: dict[str, ProviderMachine] = {}
        self.proofs: dict[str, str] = {}
        self.n_launch_calls = 0
        self.restarted: list[str] = []
        self.terminated: list[str] = []
        self.lose_reply = False
        self.refuse = False
        self.can_restart = True
        self._numbers = itertools.count(1)
        self.n_blind = 0  # so many lists do not show anything yet
        self.waiting_notices: list[CentralNotice] = []
        self.left: list[str] = []  # refs we said we move everything off
        self.kinds: list[Offering] = []
        self.exhausted: dict[str, str] = {}  # offering -> code

    def launch(self, spec: LaunchSpec, client_token: str) -> ProviderMachine:
        self.n_launch_calls += 1
        if self.refuse:
            raise CapacityError("none left")
        known = next((m for m in self.machines.values() if m.client_token == client_token), None)
        if known is None:
            refusals = []
            for offering in spec.offerings:
                if offering.name not in self.exhausted:
                    break
                refusals.append(Refusal(offering.name, self.exhausted[offering.name]))
            else:
                offering = None
            if spec.offerings and offering is None:
                raise CapacityError("no offering has any", tuple(refusals))
            known = self.add(spec.machine_id, client_token)
            if offering is not None:
                known = replace(known, offering=offering.name, refusals=tuple(refusals))
                self.machines[known.ref] = known
            self.proofs[spec.machine_id] = spec.proof
        if self.lose_reply:
            self.lose_reply = False
            raise TimeoutError("the provider's answer was lost")
        return known

    def add(self, machine_id: str, client_token: str = "nobody's") -> ProviderMachine:
        machine = ProviderMachine(
            ref=f"ref-{next(self._numbers)}",
            machine_id=machine_id,
            client_token=client_token,
            state=ProviderState.RUNNING,
            started_at_s=time.time(),
        )
        self.machines[machine.ref] = machine
        return machine

    def set_state(self, ref: str, state: ProviderState) -> None:
        old = self.machines[ref]
        self.machines[ref] = replace(old, state=state)

    def restart_agent(self, ref: str) -> bool:
        if self.can_restart:
            self.restarted.append(ref)
            self.set_state(ref, ProviderState.RUNNING)
        return self.can_restart

    def terminate(self, ref: str) -> None:
        self.terminated.append(ref)
        self.machines.pop(ref, None)

    def stop(self, ref: str) -> None:
        if ref in self.machines:
            self.set_state(ref, ProviderState.STOPPING if self.stops_slowly else ProviderState.STOPPED)

    def start(self, ref: str) -> None:
        if self.no_room:
            raise CapacityError("no room to start it")
        if self.machines[ref].state is ProviderState.STOPPING:
            raise ProviderError("it is still being stopped")
        self.set_state(ref, ProviderState.RUNNING)

    def leaving(self, ref: str, in_s: float) -> None:
        self.left.append(ref)

    def staying(self, ref: str) -> None:
        self.left.remove(ref)

    def describe(self) -> list[ProviderMachine]:
        if self.n_blind:
            self.n_blind -= 1
            return []
        return list(self.machines.values())

    def offerings(self) -> list[Offering]:
        return self.kinds

    def notices(self) -> list[CentralNotice]:
        return list(self.waiting_notices)

    def heeded(self, notice: CentralNotice) -> None:
        self.waiting_notices.remove(notice)
