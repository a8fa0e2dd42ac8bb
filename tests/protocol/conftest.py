"""Worlds on virtual time (world.py), one per test."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.protocol.world import World

MakeWorld = Callable[..., "AbstractContextManager[World]"]


@pytest.fixture
def seed() -> int:
    return int(os.environ.get("CORRAL_PROTOCOL_SEED", "1"))


@pytest.fixture
def make_world(redis_url: str, seed: int) -> MakeWorld:
    """`with make_world() as w:`, on an empty Redis."""
    from tests.protocol.world import world  # Django is set up by now

    def make(**build: Any) -> AbstractContextManager[World]:
        return world(build.pop("seed", seed), redis_url, **build)

    return make


@pytest.fixture
def w(make_world: MakeWorld) -> Iterator[World]:
    """Two machines with a replica each, two gateways, a watcher, an intake, one client."""
    with make_world() as made:
        made.run(made.ready())
        yield made
