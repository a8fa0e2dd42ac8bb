"""Knobs of the pool: read from the environment, checked, named when wrong."""

from pathlib import Path

import pytest

from autoscaler.config import AutoscalerConfig, ConfigError


def _read(**environ: str) -> AutoscalerConfig:
    return AutoscalerConfig.read(environ, console_url="http://127.0.0.1:8401/", var=Path("/data"))


def test_defaults_follow_the_stack() -> None:
    config = _read()
    assert config.enrol_url == "http://127.0.0.1:8401/internal/enrol"
    assert config.model_cache == "/data/models"
    assert (config.provider, config.max_machines) == ("local", 1)


def test_the_environment_wins() -> None:
    config = _read(CORRAL_MAX_MACHINES="3", CORRAL_MACHINE_KEEP_WARM_S="1.5", CORRAL_ENROL_URL="https://x/e")
    assert (config.max_machines, config.machine_keep_warm_s) == (3, 1.5)
    assert config.enrol_url == "https://x/e"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CORRAL_MAX_MACHINES", "0", "CORRAL_MAX_MACHINES=0: set a number from 1 to 10000"),
        ("CORRAL_MAX_MACHINES", "many", "CORRAL_MAX_MACHINES='many': set a number"),
        ("CORRAL_HEARTBEAT_STALE_S", "0.1", "CORRAL_HEARTBEAT_STALE_S=0.1: set a number from 0.5"),
    ],
)
def test_wrong_values_are_named(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _read(**{name: value})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CORRAL_SPOT", "CORRAL_SPOT_RESERVE=2: nothing to stand in for with CORRAL_SPOT=0; set it to 1"),
        (
            "CORRAL_STOPPED_NANO_PER_H",
            "CORRAL_SPOT_RESERVE=2: CORRAL_STOPPED_NANO_PER_H=0 has no machine stopped",
        ),
    ],
)
def test_a_reserve_needs_spot_and_machines_that_stop(name: str, message: str) -> None:
    assert _read(CORRAL_SPOT_RESERVE="2").spot_reserve == 2
    with pytest.raises(ConfigError, match=message):
        _read(CORRAL_SPOT_RESERVE="2", **{name: "0"})
