"""The digests of a large file's pieces, so that a range can be verified before the rest of the file is there.

A version with files larger than one piece brings `pieces.json`, which its manifest vouches for like for any other file:
machines that do not know it take it for one more file. Written by importers.py, read by remote.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from workers.modelcache.manifest import FileEntry

PIECES_NAME: Final = "pieces.json"
PIECE_BYTES: Final = 16 << 20
MIN_PIECE_BYTES: Final = 1 << 10
_BLOCK_BYTES: Final = 1 << 20


class Pieces(msgspec.Struct, frozen=True, kw_only=True):
    """`files`: SHA-256 of each piece of `piece_bytes`, in order, by file name."""

    piece_bytes: int
    files: dict[str, tuple[str, ...]]

    def to_bytes(self) -> bytes:
        return msgspec.json.encode(self, order="sorted") + b"\n"

    def of(self, entry: FileEntry) -> tuple[str, ...] | None:
        """A file's pieces; one that is no longer than a piece is its own. None: not known."""
        if 0 < entry.size_bytes <= self.piece_bytes:
            return (entry.sha256,)
        return self.files.get(entry.name)


def decode_pieces(data: bytes) -> Pieces:
    """Raises ValueError."""
    try:
        pieces = msgspec.json.decode(data, type=Pieces)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{PIECES_NAME}: {error}") from None
    if pieces.piece_bytes < MIN_PIECE_BYTES:
        raise ValueError(f"{PIECES_NAME}: piece_bytes {pieces.piece_bytes} is less than {MIN_PIECE_BYTES}")
    return pieces


def pieces_of(paths: Iterable[Path], piece_bytes: int = PIECE_BYTES) -> Pieces | None:
    """The pieces of those files that have more than one; None when no file has. Reads them whole."""
    files = {p.name: _digests(p, piece_bytes) for p in paths if p.stat().st_size > piece_bytes}
    return Pieces(piece_bytes=piece_bytes, files=files) if files else None


def _digests(path: Path, piece_bytes: int) -> tuple[str, ...]:
    found: list[str] = []
    with path.open("rb") as file:
        while True:
            digest, n_left = hashlib.sha256(), piece_bytes
            while n_left and (block := file.read(min(_BLOCK_BYTES, n_left))):
                digest.update(block)
                n_left -= len(block)
            if n_left == piece_bytes:
                return tuple(found)
            found.append(digest.hexdigest())
            if n_left:
                return tuple(found)
