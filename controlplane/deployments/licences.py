"""Whether a model under this licence may be served here. Pure; asked when a version is registered.

A model's licence is what its maker stated (SPDX identifier, Hugging Face's short name, or "see LICENSE"), recorded in
its manifest and so in its digest. Serving tenants for money is commercial use: what forbids that is refused unless the
house names it. With a list of its own (CORRAL_MODEL_LICENCES) the house takes what it names and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

ENTRY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,63}")
# Creative Commons' NC, and the names that non-commercial and research licences of models go by.
_NOT_FOR_MONEY: Final = re.compile(r"(^|[-_ .])(nc|non-?commercial|research(-only)?)([-_ .]|$)")


def refusal(licence: str, allowed: Sequence[str]) -> str | None:
    """Why it may not be served, with the remedy; None if it may. Case and surrounding space do not count."""
    name = licence.strip().lower()
    if name and name in {each.strip().lower() for each in allowed}:
        return None
    if allowed:
        return (
            f"licence {licence or 'not stated'!r} is not among those served here ({', '.join(allowed)}): "
            "the house may add it to CORRAL_MODEL_LICENCES"
        )
    if _NOT_FOR_MONEY.search(name):
        return (
            f"licence {licence!r} does not allow commercial use: the house may list it in CORRAL_MODEL_LICENCES "
            "if it has leave"
        )
    return None
