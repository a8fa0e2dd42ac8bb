"""A replica's sleep: on its agent's order it finishes what it runs, and frees the accelerator's memory until woken.

Level-triggered: the agent repeats its order until the beat says that it is so. A request that was bound before the
order is served all the same: it wakes the engine, and when the last of them has ended it sleeps again. Used by
replica.py on the engine loop, for engines that can sleep only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final

from workers.engine.base import EngineDead, Sleeper

SLEEP_STAGE: Final = "sleep"
WAKE_STAGE: Final = "wake"
PATIENCE_S: Final = 300.0  # as long as a replica may take to start


class Rest:
    """`async with rest:` around every request; `order` at any time; `run` as a task."""

    def __init__(
        self,
        engine: Sleeper,
        say: Callable[[bool], None],
        stages_ms: dict[str, int],
        patience_s: float = PATIENCE_S,
    ) -> None:
        """say: whether it sleeps now. stages_ms: gets how long the last sleep and the last waking took. An engine that
        needs longer than `patience_s` for either is dead: requests wait for it."""
        self._patience_s = patience_s
        self._engine, self._say, self._stages_ms = engine, say, stages_ms
        self._ordered = False
        self._n_guests = 0
        self._changed = asyncio.Event()
        self._awake = asyncio.Event()
        self._awake.set()

    @property
    def is_asleep(self) -> bool:
        """Or on the way into or out of it."""
        return not self._awake.is_set()

    def order(self, asleep: bool) -> None:
        """What the agent wants. Safe to repeat."""
        if asleep is not self._ordered:
            self._ordered = asleep
            self._changed.set()

    async def run(self) -> None:
        """Until cancelled. Raises what the engine raises: EngineDead."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = self._ordered and not self._n_guests
            if wanted and not self.is_asleep:
                self._awake.clear()
                await self._timed(SLEEP_STAGE, self._engine.sleep)
                self._say(True)
            elif not wanted and self.is_asleep:
                await self._timed(WAKE_STAGE, self._engine.wake)
                self._awake.set()
                self._say(False)

    async def _timed(self, stage: str, call: Callable[[], Awaitable[None]]) -> None:
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self._patience_s):
                await call()
        except TimeoutError:
            raise EngineDead(f"{stage}: not done in {self._patience_s:g} s") from None
        self._stages_ms[stage] = round((time.monotonic() - began_s) * 1000)

    async def __aenter__(self) -> None:
        self._n_guests += 1
        if self._ordered or self.is_asleep:
            self._changed.set()
            try:
                await self._awake.wait()
            except asyncio.CancelledError:  # its client left before it was awake
                self._leave()
                raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._n_guests -= 1
        if self._ordered and not self._n_guests:
            self._changed.set()
