"""What gateways tell of their decisions: structures of the cell's stream `decisions`. No Django, no I/O.

Added fields have defaults, so that a gateway of the version before can still be read. Never a prompt, answer or key.
"""

from __future__ import annotations

from typing import Final

import msgspec

FIELD: Final = "d"
MAX_CANDIDATES: Final = 8
MAX_TEXT: Final = 400


class Candidate(msgspec.Struct, array_like=True):
    """A replica that was considered, as the gateway saw it."""

    replica: str
    used: int
    slots: int
    cost: float  # of placing the request there, in prompt tokens; the least goes first
    n_prefill: int = 0  # prompt tokens given to it whose first token is awaited
    n_cached: int = 0  # prompt tokens that its cache probably holds


class Prediction(msgspec.Struct, omit_defaults=True):
    """What was expected of it. Seconds; `attainment`: the probability of meeting the target."""

    ttft_p50_s: float
    ttft_p90_s: float
    target_s: float
    attainment: float
    slot_s: float = 0.0  # how long it would keep a slot
    ahead_s: float = 0.0  # slot time that waits before it in its fair order
    most_ahead_s: float | None = None  # the most that the target allows; None: nobody asked
    slots: int = 0  # of all ready replicas


class Facts(msgspec.Struct, omit_defaults=True):
    """Inputs and alternatives of one decision. Ids are bare hex."""

    gateway: str = ""
    endpoint: str = ""
    n_prompt: int = 0  # estimate
    n_output_max: int = 0  # held
    n_output_expected: int = 0
    band: int = 0
    order: str = ""  # of the requests of one key
    admission: str = ""  # predicted | bounded
    message: str = ""  # the refusal's sentence
    retry_after_s: float | None = None
    limit: str = ""  # the limit that refused
    scope: str = ""  # key, prj or org
    limits: dict[str, str] = {}  # what the limits stood at, as in the rate-limit headers
    prediction: Prediction | None = None
    replica: str = ""  # where it went
    waits_for_replica: bool = False
    candidates: list[Candidate] = []


class Decision(msgspec.Struct, omit_defaults=True):
    """One decision about one request."""

    request: str
    organization: str
    project: str
    key: str
    at_ms: int
    outcome: str
    deployment: str = ""
    model: str = ""
    code: str = ""
    status: int = 0
    slo_class: str = ""
    facts: Facts = msgspec.field(default_factory=Facts)


class Refusals(msgspec.Struct, array_like=True):
    """How many requests were refused for want of capacity: all of them, also those that are not told one by one."""

    organization: str
    project: str
    deployment: str
    slo_class: str
    objective_ppm: int
    n: int


class Batch(msgspec.Struct, omit_defaults=True):
    """One entry of the stream."""

    at_ms: int
    decisions: list[Decision] = []
    refusals: list[Refusals] = []


encode: Final = msgspec.msgpack.Encoder().encode
decode: Final = msgspec.msgpack.Decoder(Batch).decode
