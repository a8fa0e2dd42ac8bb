"""What a token of an endpoint elsewhere costs to routing: pure.

Called where its replica is enrolled (autoscaler/watch). The measure is what the deployment sells its tokens for: an
endpoint that costs as much as that leaves nothing, and is worth as much crowding of our own as the weight says.
"""

from __future__ import annotations

from typing import Final

# An own replica five times as costly to the next request is still preferred to one sold at cost.
WEIGHT: Final = 4.0
MOST: Final = 16.0


def price_factor(cost_nano: int, sale_nano: int) -> float:
    """By how much a placement there is dearer than on a replica of ours; rates per million output tokens.

    1 where it costs nothing; MOST where it costs what nobody pays for.
    """
    if cost_nano <= 0:
        return 1.0
    if sale_nano <= 0:
        return MOST
    return min(1.0 + WEIGHT * cost_nano / sale_nano, MOST)
