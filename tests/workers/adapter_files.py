"""LoRA adapters as PEFT saves them, made on the spot with the standard library."""

from __future__ import annotations

import array
import json
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workers.modelcache.tiny import N_HEADS, N_HIDDEN, N_INNER, N_KV_HEADS, N_LAYERS

_N_KV = N_HIDDEN // N_HEADS * N_KV_HEADS
# (outputs, inputs) of the tiny model's layers (workers/modelcache/tiny.py).
TINY_SHAPES = {
    f"model.layers.{i}.{name}": shape
    for i in range(N_LAYERS)
    for name, shape in (
        ("self_attn.q_proj", (N_HIDDEN, N_HIDDEN)),
        ("self_attn.k_proj", (_N_KV, N_HIDDEN)),
        ("self_attn.v_proj", (_N_KV, N_HIDDEN)),
        ("self_attn.o_proj", (N_HIDDEN, N_HIDDEN)),
        ("mlp.gate_proj", (N_INNER, N_HIDDEN)),
        ("mlp.up_proj", (N_INNER, N_HIDDEN)),
        ("mlp.down_proj", (N_HIDDEN, N_INNER)),
    )
}
SMALL = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.self_attn.v_proj": (8, 8)}


def write_adapter(
    directory: Path,
    shapes: Mapping[str, tuple[int, int]] = SMALL,
    *,
    r: int = 4,
    alpha: float = 8.0,
    seed: int = 0,
    size: float = 0.1,
    **config: Any,
) -> Path:
    """`size`: standard deviation of every number; both matrices are random, so the adapter does something."""
    chance = random.Random(seed)
    tensors: dict[str, tuple[tuple[int, int], bytes]] = {}
    for module, (n_out, n_in) in shapes.items():
        for side, shape in (("A", (r, n_in)), ("B", (n_out, r))):
            numbers = array.array("f", (chance.gauss(0, size) for _ in range(shape[0] * shape[1])))
            tensors[f"base_model.model.{module}.lora_{side}.weight"] = (shape, numbers.tobytes())
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "adapter_model.safetensors", tensors)
    said = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none", "base_model_name_or_path": "tiny", "init_lora_weights": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        **config,
    }  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(said))
    return directory


def write_safetensors(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> None:
    header, at = {}, 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    encoded = json.dumps(header).encode()
    path.write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + b"".join(data for _, data in tensors.values())
    )
