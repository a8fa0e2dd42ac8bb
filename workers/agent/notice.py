"""Word that this machine will be taken away, and when: a file in its data directory.

The local provider writes it as a cloud answers on its metadata address; the agent looks at it a few times a second
and passes it on. What to do about it is control's business.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec


class Notice(msgspec.Struct, frozen=True):
    """Content of the file: when the machine ends, in seconds since the epoch on its own clock."""

    ends_at_s: float

    def ends_in_ms(self, now_s: float) -> int:
        """Milliseconds left, not below zero."""
        return max(0, round((self.ends_at_s - now_s) * 1000))


def read_notice(path: Path) -> Notice | None:
    """None when there is none, or the file makes no sense."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Notice)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if math.isfinite(found.ends_at_s) else None
