"""The agent's options and what a front is handed."""

import json
import logging
from pathlib import Path

import msgspec
import pytest

from tests.workers.agents import spec
from workers.config import AgentConfig, ConfigError, FrontConfig
from workers.logs import JsonLines

ARGS = ["--machine-id", "a1", "--enrol-url", "http://127.0.0.1:1/internal/enrol", "--var", "/tmp/m"]


def test_options_and_environment() -> None:
    config = AgentConfig.from_args(ARGS, {"CORRAL_ENROL_PROOF": "p", "CORRAL_CELL": "c7"})
    assert (config.machine, config.cell, config.proof, config.engine) == ("a1", "c7", "p", "vllm")
    assert config.model_cache == Path("/tmp/m/models")
    assert "proof" not in repr(config)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({0: "--machine-id", 1: ""}, "--machine-id"),
        ({1: "a:b"}, "--machine-id"),
        ({3: "file:///x"}, "--enrol-url"),
        ({5: ""}, "--var"),
    ],
)
def test_wrong_option_is_named(change: dict[int, str], named: str) -> None:
    args = [change.get(i, value) for i, value in enumerate(ARGS)]
    with pytest.raises(ConfigError, match=named):
        AgentConfig.from_args(args, {})


def test_front_config_survives_the_zygote_as_plain_data() -> None:
    config = FrontConfig(cell="c0", machine="m", redis_url="redis://", var_dir="/v", spec=spec())
    plain = json.loads(json.dumps(msgspec.to_builtins(config)))
    assert msgspec.convert(plain, FrontConfig) == config


def test_log_lines_carry_ids_and_never_what_an_exception_quotes() -> None:
    try:
        raise ValueError("the tenant wrote: SECRET TEXT")
    except ValueError as error:
        info = (type(error), error, error.__traceback__)
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "attempt failed", (), info)
    record.request, record.prompt = "r1", "SECRET TEXT"
    line = json.loads(JsonLines(machine="m1").format(record))
    assert (line["request"], line["machine"], line["error"]) == ("r1", "m1", "ValueError")
    assert "SECRET" not in json.dumps(line) and "test_config.py" in line["where"]
