"""A model version over HTTP: its manifest first, then its files, from siblings and object store alike.

Called by ModelStore.ensure under its lock, so a machine fetches a version once however many replicas want it. Nothing
is believed: the manifest's digest is the version's name, and the manifest vouches for every byte. What came stays in
the staging directory, for the next attempt to go on from.
"""

from __future__ import annotations

import http.client
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from workers.modelcache.manifest import MANIFEST_NAME, Manifest, ManifestError, decode_manifest
from workers.modelcache.transfer import CONNECT_S, READ_S, Transfer, TransferError, Tuning

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
    tuning: Tuning = Tuning(),  # noqa: B008 - frozen
    progress: Callable[[str, int, int], None] | None = None,
) -> int:
    """Every file of the manifest into `staging`, verified; how many bytes had to come. Raises TransferError."""
    check_names(manifest)
    n_done = n_fetched = 0

    def on_bytes(n: int) -> None:
        nonlocal n_done
        n_done += n
        if progress is not None:
            progress("fetch", n_done, manifest.size_bytes)

    for entry in sorted(manifest.files, key=lambda e: -e.size_bytes):
        transfer = Transfer(
            urls.get(entry.name, ()), staging / entry.name, entry, tuning=tuning, on_bytes=on_bytes
        )
        transfer.run()
        n_fetched += transfer.n_fetched_bytes
    return n_fetched


def _read(url: str) -> bytes:
    where = urlsplit(url)
    connection: http.client.HTTPConnection
    if where.scheme == "https":
        connection = http.client.HTTPSConnection(
            where.netloc, timeout=CONNECT_S + READ_S, context=ssl.create_default_context()
        )
    elif where.scheme == "http":
        connection = http.client.HTTPConnection(where.netloc, timeout=CONNECT_S + READ_S)
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
