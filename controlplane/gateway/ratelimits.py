"""The standard rate-limit headers of an answer, from what the admission script says the limits stand at.

Called once per request, so it must stay at a few microseconds: names are built once, numbers are formatted as bytes.
The figures are those of the tightest of key, project and organization, right after this request was admitted (or as
they stand where it was refused). A kind that nothing limits has no header, as with OpenAI.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from controlplane.gateway.errors import Headers

NAMES: Final = (
    *(f"x-ratelimit-{what}-requests".encode() for what in ("limit", "remaining", "reset")),
    *(f"x-ratelimit-{what}-tokens".encode() for what in ("limit", "remaining", "reset")),
    *(f"x-ratelimit-{what}-input-tokens".encode() for what in ("limit", "remaining", "reset")),
    *(f"x-ratelimit-{what}-output-tokens".encode() for what in ("limit", "remaining", "reset")),
)
_RQ_LIMIT, _RQ_LEFT, _RQ_RESET, _LIMIT, _LEFT, _RESET = NAMES[:6]
_IN_LIMIT, _IN_LEFT, _IN_RESET, _OUT_LIMIT, _OUT_LEFT, _OUT_RESET = NAMES[6:]


def headers(stands: Sequence[int]) -> Headers:
    """Of the script's nine numbers: (cap, remaining, ms until full) for requests, input and output tokens, -1 where
    nothing limits; or of none. `…-tokens` is whichever of input and output has fewer left.
    """
    if not stands:
        return ()
    rq, rq_left, rq_reset, inp, in_left, in_reset, out, out_left, out_reset = stands
    found: Headers = ()
    if rq >= 0:
        found = ((_RQ_LIMIT, b"%d" % rq), (_RQ_LEFT, b"%d" % rq_left), (_RQ_RESET, b"%dms" % rq_reset))
    if inp >= 0 or out >= 0:
        of_input = out < 0 or 0 <= in_left <= out_left
        cap, left, reset = (inp, in_left, in_reset) if of_input else (out, out_left, out_reset)
        found = (*found, (_LIMIT, b"%d" % cap), (_LEFT, b"%d" % left), (_RESET, b"%dms" % reset))
    if inp >= 0:
        found = (
            *found, (_IN_LIMIT, b"%d" % inp), (_IN_LEFT, b"%d" % in_left), (_IN_RESET, b"%dms" % in_reset)
        )  # fmt: skip
    if out >= 0:
        found = (
            *found, (_OUT_LIMIT, b"%d" % out), (_OUT_LEFT, b"%d" % out_left), (_OUT_RESET, b"%dms" % out_reset)
        )  # fmt: skip
    return found
