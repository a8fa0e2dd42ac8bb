"""Which adapters come into the store: whole safetensors of a rank and shape that the model and its engine take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.workers.adapter_files import SMALL, write_adapter, write_safetensors
from workers.modelcache.adapter import FILES, base_shapes, check_adapter, import_adapter
from workers.modelcache.importers import ImportRefused
from workers.modelcache.store import ModelStore


def refused(directory: Path, *, max_rank: int = 16, **options: Any) -> tuple[str, str]:
    with pytest.raises(ImportRefused) as error:
        check_adapter(directory, base=SMALL, max_rank=max_rank, **options)
    return error.value.code, str(error.value)


def test_two_files_come_into_the_store_and_nothing_else(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "a", r=4)
    (made / "README.md").write_text("mine")
    (made / "tokenizer.json").write_text("{}")
    store = ModelStore(tmp_path / "store")
    imported = import_adapter(made, store, base=SMALL, max_rank=16)
    assert sorted(p.name for p in imported.path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert imported.facts.rank == 4
    assert imported.facts.modules == ("q_proj", "v_proj")
    assert imported.facts.n_params == 2 * (4 * 8 + 8 * 4)
    store.verify(imported.digest)
    again = import_adapter(write_adapter(tmp_path / "b", r=4), store, base=SMALL, max_rank=16)
    assert again.digest == imported.digest
    other = import_adapter(write_adapter(tmp_path / "c", seed=1), store, base=SMALL, max_rank=16)
    assert other.digest != imported.digest


def test_the_base_is_read_from_its_weights(tmp_path: Path) -> None:
    write_safetensors(
        tmp_path / "model.safetensors",
        {
            "model.layers.0.self_attn.q_proj.weight": ((2, 3), bytes(24)),
            "model.norm.weight": ((2,), bytes(8)),
        },
    )
    assert base_shapes(tmp_path) == {"model.layers.0.self_attn.q_proj": (2, 3)}


@pytest.mark.parametrize(
    ("change", "code", "word"),
    [
        ({"peft_type": "IA3"}, "not_lora", "peft_type"),
        ({"task_type": "SEQ_CLS"}, "not_lora", "task_type"),
        ({"r": 0}, "bad_config", "r is 0"),
        ({"r": 8}, "bad_weights", "rank 4"),
        ({"lora_alpha": -1}, "bad_config", "lora_alpha"),
        ({"lora_alpha": True}, "bad_config", "lora_alpha"),
        ({"use_dora": True}, "unsupported", "use_dora"),
        ({"bias": "all"}, "unsupported", "bias"),
        ({"modules_to_save": ["lm_head"]}, "unsupported", "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "unsupported", "pissa"),
        ({"target_modules": "all-linear"}, "bad_config", "target_modules"),
        ({"target_modules": ["q_proj"]}, "bad_config", "v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "up_proj"]}, "unknown_module", "up_proj"),
        ({"rank_pattern": {"q_proj": "8"}}, "bad_config", "rank_pattern"),
    ],
)
def test_a_configuration_that_the_engine_would_not_follow_is_refused(
    tmp_path: Path, change: dict[str, Any], code: str, word: str
) -> None:
    made = write_adapter(tmp_path / "a")
    path = made / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    found, message = refused(made)
    assert (found, word in message) == (code, True), message


def test_another_models_adapter_is_refused(tmp_path: Path) -> None:
    deeper = {"model.layers.7.self_attn.q_proj": (8, 8)}
    assert refused(write_adapter(tmp_path / "deeper", deeper))[0] == "unknown_module"
    wider = {"model.layers.0.self_attn.q_proj": (8, 16)}
    assert refused(write_adapter(tmp_path / "wider", wider))[0] == "wrong_base"


def test_rank_and_size_are_bounded(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "a", r=8)
    code, message = refused(made, max_rank=4)
    assert (code, "max_lora_rank 4" in message) == ("rank_too_high", True)
    assert refused(made, max_bytes=1000)[0] == "too_large"


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda d: (d / "adapter_model.safetensors").unlink(), "no_weights"),
        (lambda d: (d / "adapter_config.json").unlink(), "no_config"),
        (lambda d: (d / "adapter_config.json").write_text("["), "bad_config"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "bad_config"),
        (lambda d: (d / "adapter_model.bin").write_bytes(b"\x80"), "pickle"),
        (lambda d: _cut(d / "adapter_model.safetensors"), "bad_weights"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "bad_weights"),
    ],
)
def test_what_is_not_whole_or_could_run_code_is_refused(tmp_path: Path, spoil: Any, code: str) -> None:
    made = write_adapter(tmp_path / "a")
    spoil(made)
    assert refused(made)[0] == code


def test_half_a_pair_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    made = write_adapter(tmp_path / "a", {"model.layers.0.self_attn.q_proj": (8, 8)})
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_safetensors(made / "adapter_model.safetensors", {name: ((4, 8), bytes(128))})
    assert "lora_A only" in refused(made)[1]
    write_safetensors(made / "adapter_model.safetensors", {"model.norm.weight": ((8, 8), bytes(256))})
    assert refused(made)[0] == "unknown_tensor"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])
