"""The bundle `corral` is what runs in the house: its objects, its figures, and what gateways tell each other."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from autoscaler import specs
from autoscaler.sim import beginnings, policies, routers
from autoscaler.sim.enginemodel import EngineSpec
from autoscaler.sim.gateways import Gateways
from autoscaler.sim.job import Job
from autoscaler.sim.policies import policy
from autoscaler.sim.prefixcache import BLOCK
from autoscaler.sim.queues import Fair
from autoscaler.sim.routers import Affinity
from autoscaler.sim.scalers import Production
from autoscaler.sim.scenario import Setting, run
from autoscaler.types import ScalerSpec
from controlplane.deployments.models import Deployment
from controlplane.gateway import placements, routes
from controlplane.policy import prefix
from controlplane.policy.flows import TOKEN
from controlplane.policy.perfmodel import StepModel
from controlplane.policy.routing import Ask, Board, Placed

STEP = StepModel(base_s=0.001, weights_s=0.009, token_s=1e-5, seq_s=0.0, context_s=1e-9, pair_s=0.0)
SPEC = EngineSpec(STEP, kv_tokens=80 * BLOCK, max_seqs=32, prefix_caching=True)
SETTING = Setting(SPEC, 32, 4, ttft_target_s=1.0)


def test_corral_is_the_production_queue_and_two_of_the_gateways_boards() -> None:
    router = policies.CORRAL.router(SETTING)
    assert isinstance(router, Gateways)
    boards = router._routers
    assert len(boards) == 2
    assert all(isinstance(board, Affinity) and type(board.board) is Board for board in boards)
    queue = policies.CORRAL.queue(SETTING)
    assert isinstance(queue, Fair)
    assert queue.queue.flows.window == Deployment._meta.get_field("locality_window_tokens").default * TOKEN
    assert policies.BOARDS_AGE_S == routes._POLL_S
    assert policies.USUAL_LEADS == specs.USUAL_LEADS
    assert routers.TELLS_AFTER_S == placements._EVERY_S


@pytest.mark.parametrize("n_tokens", [1, 63, 64, 700, 4_000, 40_000])
def test_beginnings_are_those_that_a_gateway_would_hash(n_tokens: int) -> None:
    """At the same lengths; one that ends in a block the recording does not share is not known."""
    blocks = -(-n_tokens // BLOCK)
    keys, ends = beginnings.fine(Job(0, 0.0, n_tokens, 1, prefix=tuple(range(blocks))))
    text = bytes(4 * n_tokens)
    hashed = prefix.fine_hashes("o", text)
    assert len(keys) == len(set(keys)) == len(hashed)
    assert tuple(ends) == prefix.ends(hashed, len(text), n_tokens)
    names = beginnings.names(Job(0, 0.0, n_tokens, 1, prefix=tuple(range(blocks))))
    assert len(names) == len(prefix.hashes("o", text))
    assert beginnings.fine(Job(0, 0.0, n_tokens, 1)) == ([], [])


def test_prompts_share_the_beginnings_of_the_blocks_they_share() -> None:
    one = beginnings.names(Job(0, 0.0, 4 * BLOCK, 1, prefix=(1, 2, 3, 4)))
    other = beginnings.names(Job(0, 0.0, 4 * BLOCK, 1, prefix=(1, 2, 8, 9)))
    shared = [a for a, b in zip(one, other, strict=True) if a == b]
    assert shared == list(one[: len(shared)])
    assert [64 << n for n in range(len(shared))] == [64, 128, 256, 512, 1024]


def test_gateways_find_each_others_conversations_because_they_tell() -> None:
    """Conversations of many turns, each turn through another gateway; one that is not told computes them again."""
    chance = random.Random(3)
    turns = [(talk, depth) for talk in range(40) for depth in (4, 8, 12)]
    chance.shuffle(turns)
    asked = sorted(turns, key=lambda t: t[1])  # turns in order; between them all the others
    hits = {}
    for shares in (1, 0):
        jobs = (
            Job(n, n * 0.5, depth * BLOCK, 20, prefix=tuple(talk * 1000 + k for k in range(depth)))
            for n, (talk, depth) in enumerate(asked)
        )
        name = f"affinity:gateways=3:age_s=1:shares={shares}"
        hits[shares] = run(Setting(SPEC, 32, 4, ttft_target_s=1.0), policy(name), jobs).hit_ratio
    assert hits[1] > 1.2 * hits[0]


def test_the_scaler_s_knobs_are_the_policy_s_defaults() -> None:
    """But for the load of an instant, which the simulated tick sees exactly, and the delay that a start takes."""
    scaler = policies.CORRAL.scaler(SETTING)
    assert isinstance(scaler, Production)
    house = ScalerSpec(0, 1, 10, 1e9, 32)
    for knob in (
        "n_deviations",
        "proven_ratio",
        "usual_share",
        "usual_deviations",
        "spare_ratio",
        "panic_ratio",
    ):
        assert getattr(scaler.spec, knob) == getattr(house, knob), knob


def test_requests_that_waited_are_bound_past_the_board() -> None:
    """The cell binds them from its queue and tells no gateway: its book has the direct ones only."""
    router = policies.boards(gateways=1, age_s=1.0)(SETTING)
    assert isinstance(router, Affinity)
    bound: list[Ask] = []

    class Watched(Board):
        def bound(self, replica: str, ask: Ask, now_s: float) -> Placed:
            bound.append(ask)
            return super().bound(replica, ask, now_s)

    router.board = Watched(SPEC.kv_tokens)
    one = Setting(SPEC, 2, 1, ttft_target_s=1.0)
    jobs = (Job(n, 0.0, 100 + n, 20) for n in range(5))
    result = run(one, replace(policies.CORRAL, router=lambda s: router), jobs)
    assert result.n_requests == 5
    assert [ask.n_prompt for ask in bound] == [100, 101]
