"""A running gateway and a machine for the tests of this folder."""

from collections.abc import AsyncIterator

import pytest

from tests.controlplane.gateway.harness import Machine, Running, running


@pytest.fixture
async def gw(redis_url: str) -> AsyncIterator[Running]:
    """A gateway; no machine is enrolled."""
    async with running(redis_url) as it:
        yield it


@pytest.fixture
async def machine(gw: Running, redis_url: str) -> AsyncIterator[Machine]:
    """A ready replica with four slots."""
    it = Machine(redis_url)
    await it.start()
    yield it
    await it.stop()
