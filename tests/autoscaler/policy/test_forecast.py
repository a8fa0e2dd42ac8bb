"""What a forecast says: nothing before it has proven itself, then what the best of its rules says."""

from __future__ import annotations

import math
import random

from autoscaler.codec import from_json, to_json
from autoscaler.policy.forecast import DAY_S, N_PENDING, Forecast, ForecastMemory, forecast, learn
from autoscaler.policy.replicas import wish
from autoscaler.types import Observation, ReplicaPhase, ReplicaView, ScalerMemory, ScalerSpec

LEAD_S = 120.0


def walk(loads: list[float], step_s: float = 15.0, memory: ForecastMemory | None = None) -> ForecastMemory:
    at_s = memory.at_s + step_s if memory is not None else 0.0
    for load in loads:
        memory = learn(at_s, load, LEAD_S, memory)
        at_s += step_s
    assert memory is not None
    return memory


def ahead(memory: ForecastMemory) -> Forecast:
    found = forecast(memory.at_s, LEAD_S, memory)
    assert found is not None
    return found


def test_it_cannot_tell_before_twenty_of_its_forecasts_came_due() -> None:
    assert forecast(0.0, LEAD_S, learn(0.0, 5.0, LEAD_S, None)) is None
    early = walk([10.0] * 20)
    assert forecast(early.at_s, LEAD_S, early) is None
    assert ahead(walk([10.0] * 20, memory=early)).load == 10.0


def test_a_steady_load_stays_and_needs_no_reserve() -> None:
    found = ahead(walk([40.0] * 100))
    assert (found.rule, round(found.load, 6), found.deviation) == ("stays", 40.0, 0.0)
    assert found.high(2) == found.load


def test_a_ramp_goes_on() -> None:
    found = ahead(walk([10 + i / 4 for i in range(400)]))
    assert found.rule == "goes on"
    assert abs(found.load - (10 + (399 + LEAD_S / 15) / 4)) < 2


def test_a_daily_season_is_learnt_and_foretold_before_it_is_seen() -> None:
    def load(at_s: float) -> float:
        return 50 - 45 * math.cos(2 * math.pi * at_s / DAY_S * 8)  # eight swings a day

    memory = walk([load(60.0 * i) for i in range(4 * 1440)], step_s=60.0)
    found = ahead(memory)
    now, then = load(memory.at_s), load(memory.at_s + LEAD_S)
    assert found.rule in ("time of day", "goes on", "hour of week")
    assert abs(found.load - then) < abs(now - then) + 1
    assert all(value > 0 for value in memory.day)


def test_a_season_that_does_not_exist_is_not_believed() -> None:
    chance = random.Random(1)
    memory = walk([chance.gauss(100, 10) for _ in range(6000)], step_s=60.0)
    assert ahead(memory).rule == "stays"


def test_the_deviation_is_what_the_forecast_misses_by() -> None:
    chance = random.Random(2)
    for mean in (25, 400):
        loads = [float(max(round(chance.gauss(mean, math.sqrt(mean))), 0)) for _ in range(1500)]
        found = ahead(walk(loads))
        # The scatter of what comes and, in part, of what the level was taken from.
        assert math.sqrt(mean) * 0.9 < found.deviation < math.sqrt(mean) * 1.7
        above = sum(load > found.high(2) for load in loads)
        assert above / len(loads) < 0.08


def test_a_backlog_is_no_demand_and_one_jump_does_not_set_the_reserve() -> None:
    steady = walk([40.0] * 300)
    queued = steady
    for i in range(200):
        queued = learn(steady.at_s + 15 * (i + 1), 40.0 + 20 * i, LEAD_S, queued, 48.0)
    assert 0 < max(queued.day) <= 48.0
    jumped = ahead(walk([40.0] * 300, memory=walk([40.0] * 300 + [400.0] * 8)))
    assert jumped.deviation < 0.3 * 40


def test_memory_is_bounded_repeats_itself_and_is_stored_exactly() -> None:
    chance = random.Random(3)
    loads = [chance.random() * 30 for _ in range(3000)]
    memory = walk(loads)
    assert len(memory.pending) <= N_PENDING
    assert memory == walk(loads)
    assert from_json(ForecastMemory, to_json(memory)) == memory
    assert learn(memory.at_s - 5, 99.0, LEAD_S, memory) is memory  # a clock that went back


def test_what_is_foretold_wins_upward_and_what_is_seen_does_too() -> None:
    spec = ScalerSpec(0, 1, 100, 1e9, 10, lead_s=LEAD_S, beat_stale_s=1e9, n_deviations=2.0)
    chance = random.Random(4)
    memory = ScalerMemory(forecast=walk([chance.gauss(50, 10) for _ in range(600)]))
    assert memory.forecast is not None
    now_s = memory.forecast.at_s + 15

    def at(n: int, used: int) -> Observation:
        views = tuple(
            ReplicaView(f"{i:02}", "m", ReplicaPhase.READY, 0, 0, 10, used, beat_seq=1) for i in range(n)
        )
        return Observation(now_s, "d", 0, views)

    calm = wish(at(5, 10), spec, memory)
    assert 7 <= calm.n <= 9  # 50 are 5 at 10 slots; two deviations of what came so far are two to four more
    assert "at most in 120 s" in calm.reasons[0]
    busy = wish(Observation(now_s, "d", 200, at(5, 10).replicas), spec, memory)
    assert busy.n >= 25
    without = wish(at(5, 10), ScalerSpec(0, 1, 100, 1e9, 10, beat_stale_s=1e9), ScalerMemory())
    assert without.memory.forecast is None
