"""LoRA adapters on real vLLM (CPU, tiny model): they answer as their merged weights do, alone and beside each other."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.workers.adapter_files import TINY_SHAPES, write_adapter
from tests.workers.engine import test_vllm
from tests.workers.engine.test_vllm import Lab
from workers.modelcache.adapter import base_shapes, check_adapter

pytestmark = [pytest.mark.engine, pytest.mark.full, pytest.mark.timeout(400)]

SCENARIOS = "tests.workers.engine.vllm_lora_scenarios"
ATTENTION = {name: shape for name, shape in TINY_SHAPES.items() if "self_attn" in name}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each engine answered: adapters, and both models with the weights merged."""
    lab = Lab(tmp_path_factory.mktemp("lora"))
    before, test_vllm.SCENARIOS = test_vllm.SCENARIOS, SCENARIOS
    try:
        one = write_adapter(lab.directory / "one", TINY_SHAPES, r=8, alpha=16, seed=1, size=0.06)
        two = write_adapter(lab.directory / "two", ATTENTION, r=4, alpha=4, seed=2, size=0.3)
        broken = write_adapter(lab.directory / "broken", ATTENTION, r=4, seed=3)
        (broken / "adapter_model.safetensors").write_bytes(b"nothing")
        shapes = base_shapes(lab.model_dir)
        assert shapes.items() >= TINY_SHAPES.items()
        for adapter in (one, two):
            check_adapter(adapter, base=shapes, max_rank=8)
        found = {"adapters": _run(lab, "adapters", lab.model_dir)}
        for adapter in (one, two):
            found[adapter.name] = _run(lab, "merged", _merge(lab.model_dir, adapter))
        yield found
    finally:
        test_vllm.SCENARIOS = before
        if lab.zygote_pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(lab.zygote_pid, signal.SIGKILL)


def test_each_adapter_answers_as_its_merged_weights(told: dict[str, Any]) -> None:
    lora = told["adapters"]
    assert lora["one"] == told["one"]["answers"]
    assert lora["two"] == told["two"]["answers"]


def test_adapters_differ_from_the_base_and_from_each_other(told: dict[str, Any]) -> None:
    lora = told["adapters"]
    for answers in zip(lora["base"], lora["one"], lora["two"], strict=True):
        assert len({tuple(ids) for ids in answers}) == 3


def test_all_at_once_answer_as_each_alone(told: dict[str, Any]) -> None:
    lora = told["adapters"]
    for name in ("base", "one", "two"):
        assert lora["at_once"][name] == lora[name]


def test_loading_one_changes_nothing_for_those_that_run(told: dict[str, Any]) -> None:
    lora = told["adapters"]
    assert lora["loaded_beside"] == [lora["base"][0], lora["one"][0]]


def test_cached_prefixes_are_kept_apart(told: dict[str, Any]) -> None:
    counts = told["adapters"]["cached"]
    assert [name for name, n in counts if n] == ["one", "two", ""]  # each at its own second time


def test_a_request_resumes_under_its_adapter(told: dict[str, Any]) -> None:
    assert told["adapters"]["resumed"] == told["adapters"]["one"][0]


def test_one_too_many_and_a_broken_one_are_refused_and_hurt_nobody(told: dict[str, Any]) -> None:
    lora = told["adapters"]
    assert "max_loras" in lora["third"]
    assert lora["broken"]
    assert "/lora" not in lora["broken"]
    assert lora["again"] == lora["one"]
    assert lora["two_after"] == lora["two"]
    assert lora["base_after"] == lora["base"]


def _run(lab: Lab, entry: str, model_dir: Path) -> dict[str, Any]:
    ended, log = lab.run(entry, model_dir)
    assert ended.code == 0, log[-5000:]
    found: dict[str, Any] = json.loads((lab.directory / "results").read_text())
    return found


def _merge(base: Path, adapter: Path) -> Path:
    """The model with the adapter's product added to its weights, in float32 so that nothing is rounded away."""
    from safetensors.torch import load_file, save_file

    target = Path(shutil.copytree(base, adapter.with_name(f"{adapter.name}-merged")))
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in {key.rpartition(".lora_")[0] for key in lora}:
        product = lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]
        layer = name.removeprefix("base_model.model.") + ".weight"
        weights[layer] += product * config["lora_alpha"] / config["r"]
    (target / "model.safetensors").unlink()
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
    return target
