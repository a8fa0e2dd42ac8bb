"""Decisions survive JSON and Postgres exactly, and rows of other versions can be read."""

import json
from dataclasses import dataclass

import pytest

from autoscaler.codec import CodecError, from_json, to_json, union_from_json
from autoscaler.policy.decide import decide
from autoscaler.types import COMMANDS, Observation, ScalerMemory, ScalerSpec
from tests.autoscaler.policy.test_replicas import SEEDS, _situation


@pytest.mark.parametrize("seed", SEEDS)
def test_round_trip_is_exact_and_replays(seed: int) -> None:
    observation, spec, memory = _situation(seed)
    stored = json.loads(json.dumps([to_json(observation), to_json(spec), to_json(memory)]))
    again = (
        from_json(Observation, stored[0]),
        from_json(ScalerSpec, stored[1]),
        from_json(ScalerMemory, stored[2]),
    )
    assert again == (observation, spec, memory)
    decision = decide(observation, spec, memory)
    commands = json.loads(json.dumps([to_json(command) for command in decision.commands]))
    assert tuple(union_from_json(COMMANDS, value) for value in commands) == decide(*again).commands


@dataclass(frozen=True)
class Newer:
    n: int
    x: float = 0.5
    names: tuple[str, ...] = ()
    maybe: int | None = None


def test_absent_fields_take_their_default_and_unknown_ones_are_ignored() -> None:
    assert from_json(Newer, {"n": 1, "was_there_once": True}) == Newer(1)


def test_whole_numbers_become_floats_where_floats_are_wanted() -> None:
    assert isinstance(from_json(Newer, {"n": 1, "x": 2}).x, float)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "Newer.n: missing"),
        ({"n": "1"}, "Newer.n: expected int"),
        ({"n": True}, "Newer.n: expected int"),
        ({"n": 1, "names": "ab"}, "Newer.names: expected a list"),
        ({"n": 1, "names": [1]}, r"Newer.names\[0\]: expected str"),
        ([], "Newer: expected an object"),
    ],
)
def test_wrong_values_are_named(value: object, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        from_json(Newer, value)


def test_unknown_commands_are_refused() -> None:
    with pytest.raises(CodecError, match="unknown kind 'buy_island'"):
        union_from_json(COMMANDS, {"kind": "buy_island"})
