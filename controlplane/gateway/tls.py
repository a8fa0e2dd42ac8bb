"""TLS that the gateway speaks itself: certificate and key, loaded again when their files change.

Started by __main__ where CORRAL_GATEWAY_TLS_CERT is set. A new pair counts for new connections; those that are open
stay as they are, so that no stream notices. A pair that does not fit is logged and the old one stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)

_LOOK_S = 1.0


class Certificate:
    """One pair of files and the context that new connections get."""

    def __init__(self, context: ssl.SSLContext, cert: Path, key: Path, *, look_s: float = _LOOK_S) -> None:
        self.n_loaded = 0
        self._context, self._cert, self._key = context, cert, key
        self._look_s = look_s
        self._seen = self._state()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch(), name="tls")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def look(self) -> bool:
        """Load the pair if it changed; whether a new one counts now."""
        state = self._state()
        if state == self._seen or state is None:
            return False
        try:
            # Into a context of its own first: a pair that does not fit would leave half of it in ours.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
            self._context.load_cert_chain(self._cert, self._key)
        except (ssl.SSLError, OSError) as error:
            log.warning("the new certificate is not used: %s", error)
            return False
        self._seen = state
        self.n_loaded += 1
        log.info("a new certificate counts for new connections")
        return True

    def _state(self) -> tuple[tuple[int, int], ...] | None:
        try:
            found = [path.stat() for path in (self._cert, self._key)]
        except OSError:
            return None
        return tuple((each.st_mtime_ns, each.st_ino) for each in found)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._look_s)
            self.look()
