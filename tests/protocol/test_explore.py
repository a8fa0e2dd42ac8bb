"""Stories drawn at random: any faults at any instants, and every promise holds at the end of each.

A failing story prints its seed; CORRAL_PROTOCOL_SEED=<seed> tells that one again.
"""

from __future__ import annotations

import os
import random

import pytest

from tests.protocol.conftest import MakeWorld
from tests.protocol.faults import GENTLE, HARSH, Fault, unfold

ONLY = os.environ.get("CORRAL_PROTOCOL_SEED")
FIRST = int(ONLY or "0")


def tell(make_world: MakeWorld, seed: int, faults: tuple[Fault, ...]) -> int:
    """How many answers its clients asked for; every promise is checked at the end (checks.everything)."""
    with make_world(seed=seed, machines=2, replicas=2 + seed % 3) as w:
        rng = random.Random(seed)
        for host in [*w.machines, *(door.process.host for door in w.doors)]:
            if rng.random() < 0.3:
                w.set_clock(host, rng.uniform(-600, 600))
        w.run(w.ready())
        w.run(unfold(w, rng, faults))
        w.run(w.rest())
        return len(w.answers)


KINDS = pytest.mark.parametrize("faults", [GENTLE, HARSH], ids=["gentle", "harsh"])


@KINDS
@pytest.mark.parametrize("block", range(0, 60, 10))
def test_stories(make_world: MakeWorld, block: int, faults: tuple[Fault, ...]) -> None:
    seeds = range(block, block + 10) if ONLY is None else [FIRST] if not block else []
    assert all(tell(make_world, seed, faults) for seed in seeds)


@KINDS
@pytest.mark.full
@pytest.mark.timeout(900)  # 50 stories, 15 s alone, minutes beside other work
@pytest.mark.parametrize("block", range(1000, 3000, 50))
def test_many_stories(make_world: MakeWorld, block: int, faults: tuple[Fault, ...]) -> None:
    assert all(tell(make_world, seed, faults) for seed in range(block, block + 50))
