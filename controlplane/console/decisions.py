"""Decisions of the autoscaler in words: what was ordered, and why. Pure.

Reads the stored JSON leniently: a decision of an older version must still show.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from autoscaler.models import Decision

_ORDERS: Final = {
    "launch_machine": "Launch a machine",
    "start_replica": "Start a replica",
    "drain_replica": "Drain replica",
    "stop_replica": "Stop replica",
    "sleep_replica": "Put replica to sleep",
    "wake_replica": "Wake replica",
    "start_machine": "Start stopped machine",
    "stop_machine": "Stop machine",
    "terminate_machine": "Terminate machine",
}


@dataclass(frozen=True, slots=True)
class Told:
    """One decision for people, and how many equal ones came right before it (`since` is the first of them)."""

    id: str
    at: datetime
    since: datetime
    orders: tuple[str, ...]
    reasons: tuple[str, ...]
    n_equal: int = 1


def told(decisions: Iterable[Decision], limit: int) -> list[Told]:
    """Newest first, at most `limit`; runs of decisions with the same orders and reasons become one."""
    found: list[Told] = []
    for decision in decisions:
        orders = tuple(_order(command) for command in _items(decision.commands))
        reasons = tuple(str(reason) for reason in _items(decision.reasons))
        if found and (found[-1].orders, found[-1].reasons) == (orders, reasons):
            found[-1] = replace(found[-1], since=decision.at, n_equal=found[-1].n_equal + 1)
        elif len(found) == limit:
            break
        else:
            found.append(Told(str(decision), decision.at, decision.at, orders, reasons))
    return found


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _order(command: Any) -> str:
    if not isinstance(command, Mapping):
        return str(command)
    kind = str(command.get("kind", "command"))
    subject = str(
        command.get("replica_id") or (command.get("machine_id") if kind.endswith("machine") else "") or ""
    )
    words = _ORDERS.get(kind, kind.replace("_", " ").capitalize())
    return f"{words} …{subject[-6:]}" if subject else words
