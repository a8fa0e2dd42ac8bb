"""How many tokens an attempt may produce for the money held for its request, and the asking for more.

serve.py makes one where the hold covers less than the request may use; answers come from the trusted side through
the control channel. Asks early, so that the answer is usually there before it is needed; where it is not, the
attempt waits here, for a bounded time, and ends at exactly what it was granted. On the engine loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

# Between asks while waiting; the last is repeated. Others return what they do not need within a few engine steps.
_RETRY_S: Final = (0.02, 0.04, 0.08, 0.16, 0.25)


class Allowance:
    """Tokens over all attempts; those `n_carried` over from another request, which paid for them, are unknown to the
    trusted side's count. `allowed` may be produced so far; `granted` is what the trusted side counts, more
    than `allowed` only while a prompt that turned out longer than estimated is unpaid.

    `ask(granted, empty)` sends a question; it must not raise. `patience_s`: how long to wait for an answer once
    nothing is left (0: nobody could answer).
    """

    __slots__ = (
        "_answered",
        "_ask",
        "_asked",
        "_n_carried",
        "_patience_s",
        "allowed",
        "ask_at",
        "final",
        "granted",
    )

    def __init__(
        self,
        *,
        granted: int,
        allowed: int,
        n_done: int,
        n_carried: int = 0,
        ask: Callable[[int, bool], None],
        patience_s: float,
    ) -> None:
        self.granted = granted
        self.allowed = allowed
        self.ask_at = _low_water(allowed, allowed - n_done)
        self.final = False
        self._n_carried = n_carried
        self._ask = ask
        self._asked = patience_s <= 0
        self._patience_s = patience_s
        self._answered = asyncio.Event()

    def answer(self, granted: int, final: bool) -> None:
        """The trusted side has spoken: `granted` tokens in all; `final`: there is no more to be had now."""
        granted += self._n_carried
        self.ask_at = _low_water(granted, granted - self.allowed)
        self.granted = self.allowed = granted
        self.final = final
        self._asked = False
        self._answered.set()

    def reached(self, n_tokens: int) -> None:
        """So many tokens exist now: ask for more when few are left, once."""
        if n_tokens >= self.ask_at and not self._asked:
            self._asked = True
            self._ask(self.granted - self._n_carried, False)

    async def room_for(self, n_tokens: int) -> bool:
        """Wait until `n_tokens` are allowed. False: no money is left, or nobody answered in time."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._patience_s
        n_asks = 0
        self.final = False
        while n_tokens > self.allowed and not self.final:
            left_s = deadline_s - loop.time()
            if left_s <= 0:
                return False
            self._answered.clear()
            self._asked = True
            self._ask(self.granted - self._n_carried, True)
            wait_s = min(_RETRY_S[min(n_asks, len(_RETRY_S) - 1)], left_s)
            n_asks += 1
            try:
                async with asyncio.timeout(wait_s):
                    await self._answered.wait()
            except TimeoutError:
                pass
        return n_tokens <= self.allowed


def _low_water(allowed: int, n_fresh: int) -> int:
    """With how many tokens produced to ask: when half of the latest grant is used."""
    return allowed - max(n_fresh // 2, 1)
