"""Small files only their owner may read: passwords, states, pid records.

Written whole or not at all (temporary file, then rename), mode 600 from the first byte on. Called by every
module of infra/local; must never widen the mode of a file that is already there.
"""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_private_text(path: Path, text: str) -> None:
    """Replace `path` by `text` atomically; readers see the old content or the new, never a part."""
    make_traversable(path.parent)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mkstemp: mode 600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(temporary).unlink()
        raise


def write_private_json(path: Path, value: Any) -> None:
    """As `write_private_text`, for a JSON value."""
    write_private_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`, or None when the file does not exist.

    Raises ValueError naming the file when it is not JSON: these files are ours, so that is damage, not input.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to have it written anew") from error


def make_traversable(directory: Path) -> None:
    """Create `directory`, and missing parents, as 711 (enter, not list). What exists keeps its mode."""
    for path in [*reversed(directory.parents), directory]:
        if not path.exists():
            path.mkdir(mode=0o711)
            path.chmod(0o711)  # whatever the umask: this directory is ours from birth
