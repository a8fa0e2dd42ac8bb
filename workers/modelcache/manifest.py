"""What a model version is made of: every file with its size and SHA-256, and the facts others plan with.

A version's digest is the SHA-256 of its manifest's canonical bytes, so the directory name vouches for the
manifest and the manifest for every byte. Pure, save for `hash_file`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

MANIFEST_NAME: Final = "manifest.json"
FORMAT: Final = 1
_CHUNK_BYTES: Final = 1 << 20


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file, by its name inside the version's directory (no subdirectories)."""

    name: str
    size_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`files` are sorted by name. `max_model_len` is what the model was made for, 0 if it does not say."""

    format: int = FORMAT
    files: tuple[FileEntry, ...]
    architecture: str
    licence: str
    n_params: int
    max_model_len: int

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)

    def to_bytes(self) -> bytes:
        """Canonical: members and files in order, so equal contents give equal bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=1) + b"\n"

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


class ManifestError(ValueError):
    """The bytes are not a manifest this version understands."""


def decode_manifest(data: bytes) -> Manifest:
    """Raises ManifestError; among other things for names that would leave the directory."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ManifestError(f"{MANIFEST_NAME}: {error}") from None
    if manifest.format != FORMAT:
        raise ManifestError(
            f"{MANIFEST_NAME}: format {manifest.format} is not {FORMAT}; import the model again"
        )
    for entry in manifest.files:
        if not is_plain_name(entry.name) or entry.name == MANIFEST_NAME:
            raise ManifestError(f"{MANIFEST_NAME}: {entry.name!r} is not a plain file name")
    return manifest


def is_plain_name(name: str) -> bool:
    return bool(name) and name not in (".", "..") and "/" not in name and "\0" not in name


def is_digest(text: str) -> bool:
    return len(text) == 64 and not set(text) - set("0123456789abcdef")


def hash_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 in hex; about 1.4 GB/s. `on_bytes` hears of every megabyte read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))
    return digest.hexdigest()
