"""What a client is told when a limit refuses its request: whose limit, which, and when to try again.

Called by dispatch.py with the admission script's verdict. Budgets with windows and those of end customers have words of
their own (windows.py, endlimits.py). It never decides anything, and says of a tenant only what its own key may know.
"""

from __future__ import annotations

from typing import Final

from controlplane.gateway import endlimits
from controlplane.gateway.errors import ApiError, Headers
from controlplane.gateway.keycontext import KeyContext

_SCOPE_NAMES: Final = {"end": "end customer", "key": "API key", "prj": "project", "org": "organization"}


def refusal(key: KeyContext, scope: bytes, limit: bytes, retry_ms: int, value: int, left: int) -> ApiError:
    """A limit as a 429 in OpenAI's terms: a budget is `insufficient_quota`, which no client should retry."""
    who = _SCOPE_NAMES[scope.decode()]
    name = limit.decode()
    if name.startswith("budget "):
        named = name.removeprefix("budget ")
        return next(b for b in key.budgets if b.id == named).refusal(retry_ms, value)
    if name == "budget" and who is _SCOPE_NAMES["end"]:
        return endlimits.refusal(limit, scope, retry_ms)
    if name == "budget":
        return ApiError(
            429,
            "insufficient_quota",
            f"the budget of this {who} is used up: an owner, admin or billing member can raise it",
            type_="insufficient_quota",
            headers=((b"x-should-retry", b"false"), (b"x-corral-limit", limit), (b"x-corral-scope", scope)),
        )
    own: Headers = ((b"x-corral-limit", limit), (b"x-corral-scope", scope))
    if name == "concurrency":  # the one limit that no standard header tells
        own = (
            *own,
            (b"x-ratelimit-limit-concurrency", b"%d" % value),
            (b"x-ratelimit-remaining-concurrency", b"%d" % max(0, left)),
            (b"x-ratelimit-reset-concurrency", b"%dms" % retry_ms),
        )
    return ApiError(
        429,
        "rate_limit_exceeded",
        f"the {name.replace('_', ' ')} limit of this {who} ({value}) is reached: "
        f"try again in {retry_ms / 1000:.3g} s",
        retry_after_s=retry_ms / 1000,
        headers=own,
    )
