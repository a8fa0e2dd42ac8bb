"""var/quickstart.json: the facts of the local stack that a person or a script needs to use it (mode 600).

Written by `manage.py quickstart`, read by `manage.py ask`, the browser test and the benchmarks.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE_NAME = "quickstart.json"


@dataclass(frozen=True, slots=True)
class Quickstart:
    """How to reach and enter the local stack. `base_url` ends in /v1, as OpenAI clients want it."""

    base_url: str
    api_key: str
    console_url: str
    admin_email: str
    admin_password: str
    project: str
    deployment: str


class NoQuickstartError(RuntimeError):
    """The file is missing or of another version; the message says what to do."""


def read(var: Path) -> Quickstart:
    """The facts; NoQuickstartError when no stack has been started from this data directory."""
    path = var / FILE_NAME
    try:
        raw = json.loads(path.read_text())
        return Quickstart(**{field.name: raw[field.name] for field in fields(Quickstart)})
    except FileNotFoundError:
        raise NoQuickstartError(f"{FILE_NAME} is not in {var}: start the stack with `make up`") from None
    except (KeyError, TypeError, ValueError) as error:
        raise NoQuickstartError(
            f"{path} cannot be used ({error}): run `manage.py quickstart` again"
        ) from error


def write(var: Path, facts: Quickstart) -> Path:
    """Replace the file atomically; only its owner may read it."""
    path = var / FILE_NAME
    descriptor, temporary = tempfile.mkstemp(dir=var, prefix=f".{FILE_NAME}.")
    with os.fdopen(descriptor, "w") as file:  # mkstemp: mode 600 from the start
        json.dump(asdict(facts), file, indent=2)
        file.write("\n")
    Path(temporary).replace(path)
    return path
