"""LoRA adapters in the model store: what may come in, checked against the model it was trained for, from headers alone.

Called at registration, before anything is reserved or loaded, and by replicas for the file names. An adapter is two
files as PEFT writes them, `adapter_config.json` and `adapter_model.safetensors`; nothing else of a directory is kept.
No tensor is read: shapes and types are in the safetensors header, so a check costs milliseconds at any size.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from workers.modelcache.importers import ImportRefused
from workers.modelcache.manifest import FileEntry, Manifest, hash_file
from workers.modelcache.store import ModelStore

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
FILES: Final = (CONFIG, WEIGHTS)
ARCHITECTURE: Final = "LoraAdapter"  # of its manifest, where a model version names its network
MAX_BYTES: Final = 1 << 30  # of the weights: rank 64 on every layer of a 70B model takes 0.8 GB
MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_HEADER_BYTES: Final = 16 << 20
_MAX_TENSORS: Final = 100_000
_DTYPES: Final = {"F32": 4, "F16": 2, "BF16": 2}
_TENSOR: Final = re.compile(
    r"base_model\.model\.(?P<module>[A-Za-z0-9_.]{1,200})\.lora_(?P<side>[AB])\.weight"
)
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
# Members of PEFT's configuration that change what an adapter means and that the engine does not do (vLLM 0.32,
# lora/peft_helper.py): with anything but these values it would answer wrongly or not at all.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
}
_PLAIN_INITS: Final = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

Shapes = Mapping[str, tuple[int, int]]  # module -> (outputs, inputs)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a checked adapter is. `rank`: the largest; `modules`: kinds of layers it changes, e.g. q_proj."""

    rank: int
    modules: tuple[str, ...]
    n_params: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ImportedAdapter:
    """An adapter in the store."""

    digest: str
    path: Path
    manifest: Manifest
    facts: AdapterFacts


def import_adapter(
    directory: Path, store: ModelStore, *, base: Shapes | None, max_rank: int, max_bytes: int = MAX_BYTES
) -> ImportedAdapter:
    """Check a PEFT directory and copy its two files into the store.

    `base`: the layers of the model it is for (`base_shapes`), None where it has none (the toy engine). `max_rank`: what
    the engine was set up for. Raises ImportRefused with a stable code, the file and the remedy.
    """
    check_adapter(directory, base=base, max_rank=max_rank, max_bytes=max_bytes)
    with store.incoming("adapter") as staging:
        entries = []
        for name in FILES:
            shutil.copyfile(directory / name, staging / name)
            target = staging / name
            entries.append(FileEntry(name=name, size_bytes=target.stat().st_size, sha256=hash_file(target)))
        # Once more, on the copy: the directory is somebody else's and may change under us.
        facts = check_adapter(staging, base=base, max_rank=max_rank, max_bytes=max_bytes)
        manifest = Manifest(
            files=tuple(entries),
            architecture=ARCHITECTURE,
            licence="",
            n_params=facts.n_params,
            max_model_len=0,
        )
        path = store.adopt(staging, manifest)
    return ImportedAdapter(manifest.digest, path, manifest, facts)


def check_adapter(
    directory: Path, *, base: Shapes | None, max_rank: int, max_bytes: int = MAX_BYTES
) -> AdapterFacts:
    """What the adapter is, or ImportRefused."""
    if not directory.is_dir():
        raise ImportRefused("not_a_directory", f"{directory} is not a directory")
    pickles = sorted(p.name for p in directory.iterdir() if p.name.endswith(_PICKLES))
    if pickles:
        raise ImportRefused(
            "pickle",
            f"{pickles[0]}: pickled files can run code when loaded; save with safe_serialization=True and remove it",
        )
    config = _config(directory / CONFIG)
    alpha, r, use_rslora = config.get("lora_alpha"), config.get("r"), config.get("use_rslora")
    if not isinstance(r, int) or not _is_count(r):
        raise ImportRefused("bad_config", f"{CONFIG}: r is {r!r}; it must be a whole number from 1 up")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise ImportRefused("bad_config", f"{CONFIG}: lora_alpha is {alpha!r}; it must be a number above 0")
    if use_rslora not in (None, False, True):
        raise ImportRefused("bad_config", f"{CONFIG}: use_rslora is {use_rslora!r}; it must be true or false")
    ranks = _ranks(r, config.get("rank_pattern"))
    _refuse_unsupported(config)
    sides, n_params = _sides(directory / WEIGHTS, max_bytes)
    kinds, ranks_there = set[str](), set[int]()
    for module, (a, b) in sorted(sides.items()):
        if a is None or b is None:
            raise ImportRefused(
                "bad_weights", f"{WEIGHTS}: {module} has lora_{'B' if a is None else 'A'} only"
            )
        rank, n_in = a
        if b[1] != rank:
            raise ImportRefused("bad_weights", f"{WEIGHTS}: {module}: lora_A has rank {rank}, lora_B {b[1]}")
        if rank not in ranks:
            raise ImportRefused(
                "bad_weights", f"{WEIGHTS}: {module} has rank {rank}, {CONFIG} says {sorted(ranks)}"
            )
        if base is not None:
            _check_layer(module, (b[0], n_in), base)
        kinds.add(module.rpartition(".")[2])
        ranks_there.add(rank)
    rank = max(ranks_there)
    if rank > max_rank:
        raise ImportRefused(
            "rank_too_high",
            f"{WEIGHTS}: rank {rank} is above this deployment's max_lora_rank {max_rank}: raise it in the engine "
            "profile, or train with a lower rank",
        )
    targets = config.get("target_modules")
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ImportRefused(
            "bad_config", f"{CONFIG}: target_modules must list the layers that were trained, by name"
        )
    named = {target.rpartition(".")[2] for target in targets}
    if strange := sorted(kinds - named):
        raise ImportRefused(
            "bad_config", f"{CONFIG}: target_modules does not name {strange[0]}, which {WEIGHTS} has"
        )
    if missing := sorted(named - kinds):
        raise ImportRefused(
            "unknown_module",
            f"{CONFIG}: target_modules names {missing[0]}, of which {WEIGHTS} has nothing: save the adapter again",
        )
    return AdapterFacts(rank, tuple(sorted(kinds)), n_params, (directory / WEIGHTS).stat().st_size)


def base_shapes(directory: Path) -> dict[str, tuple[int, int]]:
    """Layers of a model version that an adapter may change, from its weights' headers. Raises ImportRefused."""
    found: dict[str, tuple[int, int]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        for name, tensor in _header(path).items():
            shape: list[int] = tensor.get("shape") or []
            if name.endswith(".weight") and len(shape) == 2:
                found[name.removesuffix(".weight")] = (shape[0], shape[1])
    if not found:
        raise ImportRefused(
            "no_base", "the model's weights are not here: import the model on this host first"
        )
    return found


def _check_layer(module: str, shape: tuple[int, int], base: Shapes) -> None:
    known = base.get(module)
    kind = module.rpartition(".")[2]
    if known is None or kind in ("embed_tokens", "wte"):
        raise ImportRefused(
            "unknown_module",
            f"{WEIGHTS}: the model has no layer {module!r} that an adapter could change: was it trained on another "
            "model?",
        )
    if shape != known:
        raise ImportRefused(
            "wrong_base",
            f"{WEIGHTS}: {module} maps {shape[1]} inputs to {shape[0]} outputs, in the model {known[1]} to "
            f"{known[0]}: the adapter was trained on another model",
        )


def _config(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ImportRefused("bad_config", f"{CONFIG} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ImportRefused("no_config", f"{CONFIG} is missing: this is no PEFT adapter") from None
    except (ValueError, RecursionError):
        raise ImportRefused("bad_config", f"{CONFIG} is not JSON") from None
    if not isinstance(value, dict):
        raise ImportRefused("bad_config", f"{CONFIG} must be a JSON object")
    if value.get("peft_type") != "LORA":
        raise ImportRefused(
            "not_lora", f"{CONFIG}: peft_type is {value.get('peft_type')!r}; only LORA adapters are served"
        )
    if value.get("task_type") not in (None, "CAUSAL_LM"):
        raise ImportRefused(
            "not_lora", f"{CONFIG}: task_type must be CAUSAL_LM, this is {value['task_type']!r}"
        )
    return value


def _ranks(r: int, pattern: Any) -> set[int]:
    if pattern in (None, {}):
        return {r}
    if not isinstance(pattern, dict) or not all(_is_count(rank) for rank in pattern.values()):
        raise ImportRefused("bad_config", f"{CONFIG}: rank_pattern must map names of layers to ranks")
    return {r, *pattern.values()}


def _refuse_unsupported(config: dict[str, Any]) -> None:
    for name, neutral in _NEUTRAL.items():
        if config.get(name) not in neutral:
            raise ImportRefused(
                "unsupported", f"{CONFIG}: {name} is {str(config[name])[:60]!r}, which the engine does not do"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
        raise ImportRefused(
            "unsupported",
            f"{CONFIG}: init_lora_weights={init[:40]!r} changes the base model; convert it with PEFT's "
            "path_initial_model_for_weight_conversion",
        )
    pattern = config.get("alpha_pattern")
    if pattern not in (None, {}) and not (
        isinstance(pattern, dict) and all(isinstance(a, (int, float)) and a > 0 for a in pattern.values())
    ):
        raise ImportRefused("bad_config", f"{CONFIG}: alpha_pattern must map names of layers to numbers")


_Side = tuple[int, int] | None


def _sides(path: Path, max_bytes: int) -> tuple[dict[str, tuple[_Side, _Side]], int]:
    """module -> (shape of lora_A, shape of lora_B), and how many numbers there are in all."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ImportRefused(
            "no_weights", f"{WEIGHTS} is missing: save the adapter with safe_serialization=True"
        ) from None
    if size > max_bytes:
        raise ImportRefused(
            "too_large", f"{WEIGHTS} has {size >> 20} MiB; at most {max_bytes >> 20} are allowed"
        )
    header = _header(path)
    if not 0 < len(header) <= _MAX_TENSORS:
        raise ImportRefused("bad_weights", f"{WEIGHTS} holds {len(header)} tensors: from 2 to {_MAX_TENSORS}")
    sides: dict[str, tuple[_Side, _Side]] = {}
    n_params = 0
    for name, tensor in header.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ImportRefused(
                "unknown_tensor",
                f"{WEIGHTS}: {name[:120]!r} is no base_model.model.<layer>.lora_A.weight or lora_B.weight",
            )
        shape, dtype = tensor.get("shape"), tensor.get("dtype")
        if dtype not in _DTYPES:
            raise ImportRefused(
                "bad_weights", f"{WEIGHTS}: {name} is {dtype}; use one of {', '.join(_DTYPES)}"
            )
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_count, shape)):
            raise ImportRefused("bad_weights", f"{WEIGHTS}: {name} is not a matrix")
        start, end = tensor["data_offsets"]
        if end - start != math.prod(shape) * _DTYPES[dtype]:
            raise ImportRefused("bad_weights", f"{WEIGHTS}: {name} has another size than its shape says")
        n_params += math.prod(shape)
        a, b = sides.get(match["module"], (None, None))
        here = (shape[0], shape[1])
        sides[match["module"]] = (here, b) if match["side"] == "A" else (a, here)
    return sides, n_params


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Of a whole safetensors file; ImportRefused for anything else."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (n_header,) = struct.unpack("<Q", file.read(8))
            if n_header > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(n_header))
        header.pop("__metadata__", None)
        at = 0
        for start, end in sorted(tensor["data_offsets"] for tensor in header.values()):
            if start != at or end < start:
                raise ValueError("its tensors overlap or leave gaps")
            at = end
        if 8 + n_header + at != size:
            raise ValueError(f"it has {size} bytes, its header says {8 + n_header + at}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ImportRefused(
            "bad_weights", f"{path.name} is not a whole safetensors file ({error}): fetch it again"
        ) from None
    found: dict[str, dict[str, Any]] = header
    return found


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
