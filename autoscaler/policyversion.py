"""Which policy decided: a digest of the sources of the pure policies, stored with every decision.

Equal digests mean that the same inputs give the same decision; a decision of another digest may be decided otherwise
today, and whoever replays it says so. Read once per process.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

_HERE = Path(__file__).resolve().parent
N_CHARS = 16


@cache
def policy_version() -> str:
    """Hex, the same for the same sources wherever they lie."""
    digest = hashlib.sha256()
    for path in [*sorted((_HERE / "policy").glob("*.py")), _HERE / "types.py"]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:N_CHARS]
