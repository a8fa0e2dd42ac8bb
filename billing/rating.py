"""Price versions by id: a request is rated with the one pinned at its admission.

Called by intake. Price versions never change, so those read once are kept; the arithmetic and its one
rounding rule are money.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final
from uuid import UUID

from billing.money import Rates

# A price list has some hundred versions at most; beyond this the oldest read is forgotten and read again.
MAX_KEPT: Final = 4096

# What an endpoint elsewhere answers as a shadow: nobody here is paid for it, and its own price is counted by
# controlplane/upstreams/rollup.py. No row: it is no price that a deployment can have. On the wire, 32 zeros.
FREE: Final = UUID(int=0)

FetchRates = Callable[[set[UUID]], Mapping[UUID, Rates]]


class PriceBook:
    """Rates by price version id. Not shared between threads."""

    def __init__(self, fetch: FetchRates, max_kept: int = MAX_KEPT) -> None:
        self._fetch = fetch
        self._max_kept = max_kept
        self._kept: dict[UUID, Rates] = {}

    def rates(self, version_ids: Iterable[UUID]) -> dict[UUID, Rates]:
        """Rates of those versions that exist; the others are absent. Raises what `fetch` raises."""
        wanted = set(version_ids)
        missing = wanted - self._kept.keys()
        fetched = dict(self._fetch(missing)) if missing else {}
        found = {version: self._kept[version] for version in wanted - missing} | fetched
        self._kept.update(fetched)
        while len(self._kept) > self._max_kept:
            del self._kept[next(iter(self._kept))]
        return found
