"""Ends the control worker between two side effects: the n-th write to Postgres, provider or Redis never happens, or
happens and nothing after it does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from django.db.models.query import QuerySet

from autoscaler.cell import Cell
from tests.autoscaler.fakes import FakeProvider

EFFECTS = (
    *((QuerySet, name) for name in ("create", "update", "delete", "get_or_create", "bulk_create")),
    *((FakeProvider, name) for name in ("launch", "terminate", "restart_agent", "stop", "start")),
    *(
        (Cell, name)
        for name in (
            "set_desired",
            "drop_desired",
            "set_user",
            "delete_machine",
            "withdraw_dead",
            "drain",
            "put_to_sleep",
            "publish_stage",
        )
    ),
)


class Crash(BaseException):
    """As SIGKILL: nobody may catch it."""


class Effects:
    """Counts side effects; raises Crash around the one that it is told to."""

    def __init__(self, at: int | str = 0, *, before: bool = False) -> None:
        """at: number of the effect, or its name; 0: none."""
        self.at, self.before, self.seen = at, before, 0
        self.names: list[str] = []

    def wrap(self, name: str, original: Any) -> Any:
        def effect(*args: Any, **kwargs: Any) -> Any:
            self.seen = mine = self.seen + 1  # an effect may have others inside
            self.names.append(name)
            strikes = self.at in (mine, name)
            if strikes and self.before:
                raise Crash(name)
            done = original(*args, **kwargs)
            if strikes:
                raise Crash(name)
            return done

        return effect


@contextmanager
def crashing(effects: Effects) -> Iterator[Effects]:
    """While it lasts, `effects` counts and strikes."""
    patches = [
        patch.object(owner, name, effects.wrap(f"{owner.__name__}.{name}", getattr(owner, name)))
        for owner, name in EFFECTS
    ]
    for each in patches:
        each.start()
    try:
        yield effects
    finally:
        for each in patches:
            each.stop()
