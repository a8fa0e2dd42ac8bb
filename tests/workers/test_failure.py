"""Stable codes for what kept a replica from starting."""

import json
from pathlib import Path

import pytest

from workers.engine.base import EngineDead, ProfileError
from workers.failure import (
    ReplicaFailure,
    check_model_dir,
    classify,
    read_outcome,
    write_outcome,
)
from workers.modelcache.tiny import make_tiny_model

CORE = "Engine core initialization failed. See root cause above."  # what vLLM's front end gets to see

WHILE_LOADING = """(EngineCore) ERROR Traceback (most recent call last):
(EngineCore) ERROR   File "model_loader/default_loader.py", line 9, in load_weights
(EngineCore) ERROR RuntimeError: start (0) + length (1024) exceeds dimension size (512).
"""
ELSEWHERE = """(EngineCore) ERROR Traceback (most recent call last):
(EngineCore) ERROR   File "core.py", line 1, in run
(EngineCore) ERROR RuntimeError: something else
"""


@pytest.mark.parametrize(
    ("error", "log", "code"),
    [
        (ProfileError("engine profile: dtype"), "", "invalid_profile"),
        (ImportError("No module named 'vllm'"), "", "engine_missing"),
        (EngineDead("gone"), "", "engine_died"),
        (MemoryError(), "", "out_of_memory"),
        (RuntimeError(CORE), "x\nRuntimeError: not enough memory: you tried to allocate 9\n", "out_of_memory"),
        (RuntimeError(CORE), "(EngineCore) ERROR s_rust.SafetensorError: incomplete metadata\n", "bad_weights"),
        (ValueError("Model architectures ['Foo'] are not supported"), "", "bad_weights"),
        (RuntimeError("The size of tensor a (512) must match the size of tensor b (256)"), "", "bad_weights"),
        (ValueError("Available memory is less than requested memory for kv (4096 GiB)"), "", "out_of_memory"),
        (RuntimeError("something else"), "", "start_failed"),
        (RuntimeError(CORE), WHILE_LOADING, "bad_weights"),
        (RuntimeError(CORE), WHILE_LOADING + ELSEWHERE, "start_failed"),
        (ReplicaFailure("bad_weights", "as it says"), "", "bad_weights"),
    ],
)  # fmt: skip
def test_classification(tmp_path: Path, error: BaseException, log: str, code: str) -> None:
    path = tmp_path / "log"
    path.write_text(log)
    assert classify(error, path).code == code


def test_outcome_survives_the_process(tmp_path: Path) -> None:
    path = tmp_path / "r1.outcome"
    assert read_outcome(path) is None
    write_outcome(path, ReplicaFailure("bad_weights", "x" * 10_000))
    outcome = read_outcome(path)
    assert outcome is not None and outcome.code == "bad_weights" and len(outcome.message) == 500
    path.write_text("{")
    assert read_outcome(path) is None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def fault(model: Path) -> str:
    with pytest.raises(ReplicaFailure) as caught:
        check_model_dir(model)
    assert caught.value.code == "bad_weights"
    return caught.value.message


def test_whole_model_passes(model: Path) -> None:
    assert check_model_dir(model) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file_is_named(model: Path, name: str) -> None:
    (model / name).unlink()
    assert name in fault(model) or ".safetensors" in fault(model)


def test_truncated_shard_is_named(model: Path) -> None:
    shard = model / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "model.safetensors is damaged" in fault(model)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, (5).to_bytes(8, "little") + b"[1,2]", (2).to_bytes(8, "little") + b"xx"]
)
def test_nonsense_shard_is_named(model: Path, data: bytes) -> None:
    (model / "model.safetensors").write_bytes(data)
    assert "model.safetensors is damaged" in fault(model)


def test_damaged_config_is_named(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({})[:-1])
    assert "config.json" in fault(model)
