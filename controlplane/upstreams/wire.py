"""What gateways tell of shadows: structures of the cell's stream `shadows`. No Django, no I/O.

Added fields have defaults, so that a gateway of the version before can still be read. Never a prompt or an answer.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

FIELD: Final = "d"


class Skipped(enum.StrEnum):
    """Why a request that was chosen is not copied. Stored, and a metric's label."""

    CROWDED = "crowded"  # too many copies wait in the gateway
    RATE = "rate"  # more than so many a minute
    BUSY = "busy"  # as many are under way as may be, or nobody has a free slot
    BUDGET = "budget"  # the day's money is used up
    LOST = "lost"  # a failure of ours


class Result(msgspec.Struct, omit_defaults=True):
    """One copy beside its request. Ids are bare hex; None: not known, or nothing to compare."""

    organization: str  # whose shadow it is
    upstream: str
    request: str
    at_ms: int
    status: int
    duration_ms: int
    code: str = ""
    finish: str = ""
    first_token_ms: int | None = None
    itl_us: int | None = None
    n_prompt: int = 0
    n_completion: int = 0
    cost_nano: int = 0
    own_finish: str = ""
    own_first_token_ms: int | None = None
    own_itl_us: int | None = None
    own_duration_ms: int | None = None
    own_n_completion: int | None = None
    is_same: bool | None = None
    similarity_ppm: int | None = None


class Skips(msgspec.Struct, array_like=True):
    """So many were not copied."""

    organization: str
    upstream: str
    reason: str
    n: int


class Batch(msgspec.Struct, omit_defaults=True):
    """One entry of the stream."""

    at_ms: int
    results: list[Result] = []
    skips: list[Skips] = []


encode: Final = msgspec.msgpack.Encoder().encode
decode: Final = msgspec.msgpack.Decoder(Batch).decode
