"""Tells the cell's other gateways what this one placed, so that a conversation finds its cache whichever of them it
comes to.

Fed by admission, heard by the route table. Many placements leave in one message; what is lost or dropped costs a prompt
computed twice, so nobody waits for it and nothing is repeated. Holds hashes of prompts, never their text.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import msgspec

from controlplane.gateway.routes import RouteTable
from controlplane.policy.routing import Ask
from workers.keys import CellKeys
from workers.redis_client import Client

log = logging.getLogger(__name__)

_EVERY_S: Final = 0.1
_MAX_PLACED: Final = 500  # of one message; more in a tenth of a second is dropped and counted
_HASH_CHARS: Final = 8

_Placed = tuple[str, str, int, str, tuple[int, ...]]  # deployment, replica, prompt tokens, hashes, ends
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, tuple[_Placed, ...]]).decode


class Placements:
    """What this gateway placed since the last message. Belongs to one event loop."""

    def __init__(self, redis: Client, keys: CellKeys, gateway: str, routes: RouteTable) -> None:
        self.n_dropped = self.n_heard = 0
        self._redis = redis
        self._channel = keys.placed_channel
        self._gateway = gateway
        self._routes = routes
        self._placed: list[_Placed] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(self, deployment: str, replica: str, ask: Ask) -> None:
        """A request took a slot there."""
        if not ask.prefixes:
            return
        if len(self._placed) >= _MAX_PLACED:
            self.n_dropped += 1
            return
        hashes = "".join(map(str, ask.prefixes))
        self._placed.append((deployment, replica, ask.n_prompt, hashes, tuple(ask.ends)))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_EVERY_S, self._send)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def on_placed(self, payload: bytes) -> None:
        """A message of any gateway, this one's own included."""
        try:
            gateway, placed = _decode(payload)
        except ValueError:
            log.warning("undecodable placements")
            return
        if gateway == self._gateway:
            return
        for deployment, replica, n_prompt, hashes, ends in placed:
            prefixes = [hashes[at : at + _HASH_CHARS] for at in range(0, len(hashes), _HASH_CHARS)]
            if len(prefixes) == len(ends):
                self.n_heard += 1
                self._routes.heard(deployment, replica, Ask(n_prompt, prefixes, ends))

    def _send(self) -> None:
        self._timer = None
        placed, self._placed = self._placed, []
        self._redis.fire("PUBLISH", self._channel, _encode((self._gateway, placed)))
