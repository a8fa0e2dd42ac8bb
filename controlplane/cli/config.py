"""Where the control plane is and with which token: contexts in $XDG_CONFIG_HOME/corral/config.yaml, mode 0600.

CORRAL_API_URL and CORRAL_API_TOKEN come before the file, so that a pipeline needs none.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from controlplane.cli.failures import Failure, NotSignedIn

DEFAULT_URL: Final = "http://127.0.0.1:8401"


@dataclass(frozen=True, slots=True)
class Context:
    """One control plane as one caller."""

    url: str
    token: str = field(repr=False)
    name: str = "environment"


def path() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "corral" / "config.yaml"


def read() -> dict[str, Any]:
    """{"current": name, "contexts": {name: {"url", "token"}}}; empty where nobody signed in yet."""
    import yaml

    try:
        found = yaml.safe_load(path().read_text()) or {}
    except FileNotFoundError:
        found = {}
    except (OSError, yaml.YAMLError) as error:
        raise Failure(f"{path()}: cannot be read ({error}); `corral login` writes it anew") from None
    if not isinstance(found, dict) or not isinstance(found.get("contexts", {}), dict):
        raise Failure(f"{path()}: is no configuration of ours; move it away and `corral login` again")
    return {"current": found.get("current", ""), "contexts": found.get("contexts") or {}}


def write(config: dict[str, Any]) -> None:
    """Whole or not at all, readable for its owner only."""
    import yaml

    target = path()
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    beside = target.with_suffix(".new")
    beside.unlink(missing_ok=True)
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        yaml.safe_dump(config, file, sort_keys=False)
    beside.replace(target)


def context(name: str = "", url: str = "") -> Context:
    """The one asked for, else the environment's, else the current one. Raises NotSignedIn, Failure."""
    token = os.environ.get("CORRAL_API_TOKEN", "")
    if token and not name:
        return Context(url or os.environ.get("CORRAL_API_URL", DEFAULT_URL), token)
    config = read()
    chosen = name or os.environ.get("CORRAL_CONTEXT", "") or config["current"]
    if not chosen:
        raise NotSignedIn("not signed in: run `corral login`, or set CORRAL_API_URL and CORRAL_API_TOKEN")
    found = config["contexts"].get(chosen)
    if not isinstance(found, dict) or not found.get("token"):
        known = ", ".join(config["contexts"]) or "none"
        raise NotSignedIn(
            f"there is no context {chosen!r} (known: {known}): run `corral login --context {chosen}`"
        )
    return Context(url or found.get("url", DEFAULT_URL), found["token"], chosen)
