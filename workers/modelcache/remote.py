"""A model version over HTTP: its manifest first, then its files, from siblings and object store alike.

Called by ModelStore.ensure under its lock, so a machine fetches a version once however many replicas want it. Nothing
is believed: the manifest's digest is the version's name, and the manifest vouches for every byte. What came stays in
the staging directory, for the next attempt to go on from.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from workers.modelcache.line import FAR, TransferError
from workers.modelcache.manifest import MANIFEST_NAME, FileEntry, Manifest, ManifestError, decode_manifest
from workers.modelcache.pieces import PIECES_NAME, Pieces, decode_pieces
from workers.modelcache.transfer import Transfer, Tuning

MAX_MANIFEST_BYTES: Final = 4 << 20
# What is loaded by the engine and its tokenizer; nothing that could run code, whatever a manifest lists.
_ENDINGS: Final = (".safetensors", ".json", ".txt", ".model", ".jinja", ".md")
_NAMES: Final = ("LICENSE", "LICENCE", "COPYING", "NOTICE")

Urls = Mapping[str, Sequence[str]]  # file name -> where it is, best first


def fetch_manifest(urls: Urls, digest: str) -> Manifest:
    """The version's manifest from the first source that has it. Raises TransferError."""
    last = TransferError("source_missing", f"no source has {MANIFEST_NAME} of {digest}")
    for url in urls.get(MANIFEST_NAME, ()):
        try:
            manifest = decode_manifest(_read(url))
        except ManifestError as error:
            last = TransferError("bad_weights", str(error))
            continue
        except TransferError as error:
            last = error
            continue
        if manifest.digest != digest:
            last = TransferError(
                "bad_weights", f"a source's {MANIFEST_NAME} is of {manifest.digest}, not of {digest}"
            )
            continue
        return manifest
    raise last


def check_names(manifest: Manifest) -> None:
    """Refuse a version with files that are no weights, tokenizer, template or licence. Raises TransferError."""
    for entry in manifest.files:
        if not entry.name.endswith(_ENDINGS) and entry.name not in _NAMES:
            raise TransferError(
                "bad_weights",
                f"{entry.name} is no weights or tokenizer file: import the model with `import_model`",
            )


def fetch_files(
    urls: Urls,
    manifest: Manifest,
    staging: Path,
    *,
    siblings: Sequence[str] = (),
    tuning: Tuning = Tuning(),  # noqa: B008 - frozen
    progress: Callable[[str, int, int], None] | None = None,
    on_ready: Callable[[str, int], None] = lambda name, n: None,
    on_open: Callable[[], None] = lambda: None,
) -> int:
    """Every file of the manifest into `staging`, verified; how many bytes had to come. Raises TransferError.

    siblings: URLs of the version on other machines, with `{name}` for the file's; asked before `urls`, but only for
    files whose pieces are known, so that a wrong byte is found at once and its source left. on_ready: so many bytes of
    that file may be read. on_open: all but the weights is there, and these lie in full size: loading may begin.
    """
    check_names(manifest)
    faults: dict[str, int] = {}
    n_done = 0

    def on_bytes(n: int) -> None:
        nonlocal n_done
        n_done += n
        if progress is not None:
            progress("fetch", n_done, manifest.size_bytes)

    def transfer_of(entry: FileEntry, pieces: Pieces) -> Transfer:
        known = pieces.of(entry)
        sources = list(urls.get(entry.name, ()))
        if known is not None and sources:
            sources = [sibling.replace("{name}", entry.name) for sibling in siblings] + sources
        return Transfer(
            sources,
            staging / entry.name,
            entry,
            tuning=tuning if known is None else replace(tuning, part_bytes=pieces.piece_bytes),
            pieces=known,
            faults=faults,
            on_bytes=on_bytes,
            on_ready=lambda n: on_ready(entry.name, n),
        )

    pieces = Pieces(piece_bytes=tuning.part_bytes, files={})  # until their list is there
    small, weights = _in_order(manifest)
    n_fetched = 0
    for entry in small:
        transfer = transfer_of(entry, pieces)
        transfer.run()
        n_fetched += transfer.n_fetched_bytes
        if entry.name == PIECES_NAME:
            pieces = _pieces(staging / PIECES_NAME)
    transfers = [transfer_of(entry, pieces) for entry in weights]
    for transfer in transfers:
        transfer.prepare()
    if _names_its_dtype(staging):
        on_open()
    for transfer in transfers:
        transfer.run()
        n_fetched += transfer.n_fetched_bytes
    return n_fetched


def _in_order(manifest: Manifest) -> tuple[list[FileEntry], list[FileEntry]]:
    """What the engine reads first, its pieces' list before all; then the weights in the order it loads them."""
    weights = [e for e in manifest.files if e.name.endswith(".safetensors")]
    rest = [e for e in manifest.files if not e.name.endswith(".safetensors")]
    return sorted(rest, key=lambda e: (e.name != PIECES_NAME, e.name)), sorted(weights, key=lambda e: e.name)


def _pieces(path: Path) -> Pieces:
    try:
        return decode_pieces(path.read_bytes())
    except ValueError as error:
        raise TransferError("bad_weights", str(error)) from None


def _names_its_dtype(staging: Path) -> bool:
    """Without a dtype in config.json the engine looks for one in the weights, at its start: it has to wait for them."""
    try:
        config = json.loads((staging / "config.json").read_bytes())
        return bool({"dtype", "torch_dtype"} & {k for k, v in config.items() if isinstance(v, str)})
    except (OSError, ValueError, AttributeError):
        return False


def _read(url: str) -> bytes:
    where = urlsplit(url)
    connection: http.client.HTTPConnection
    if where.scheme == "https":
        connection = http.client.HTTPSConnection(
            where.netloc, timeout=FAR.connect_s + FAR.read_s, context=ssl.create_default_context()
        )
    elif where.scheme == "http":
        connection = http.client.HTTPConnection(where.netloc, timeout=FAR.connect_s + FAR.read_s)
    else:
        raise TransferError(
            "source_missing", f"{where.scheme}:// is no source of model files: give http or https"
        )
    try:
        connection.request("GET", f"{where.path}?{where.query}" if where.query else where.path)
        answer = connection.getresponse()
        if answer.status in (401, 403):
            raise TransferError("source_expired", f"{MANIFEST_NAME}: the source refused us ({answer.status})")
        if answer.status != 200:
            raise TransferError("source_missing", f"{MANIFEST_NAME}: the source answered {answer.status}")
        data = answer.read(MAX_MANIFEST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise TransferError("source_unreachable", f"{MANIFEST_NAME}: {type(error).__name__}") from None
    finally:
        connection.close()
    if len(data) > MAX_MANIFEST_BYTES:
        raise TransferError("bad_weights", f"{MANIFEST_NAME} is larger than {MAX_MANIFEST_BYTES} bytes")
    return data
