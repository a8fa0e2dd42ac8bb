"""Who is calling: the API key of a request, from a bounded cache in this process, from Postgres on a miss.

Called first for every /v1 request. A key is verified in full once (HMAC under the pepper, constant time);
after that the exact header bytes lead to its context. A context is fresh for `fresh_s`; changes announced on
pub/sub or read from the change feed end that at once. With Postgres away a context may serve for `stale_s`
more, a key never seen gets a 503, and nobody ever gets a 401 for a key that might be good.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from controlplane.gateway.directory import DirectoryUnavailable, KeyDirectory
from controlplane.gateway.errors import ApiError, unavailable
from controlplane.gateway.keycontext import KeyContext, context_of
from controlplane.tenants import api_keys
from controlplane.tenants.api_keys import Presented

log = logging.getLogger(__name__)

_MAX_HEADER = 256  # a key has 63 characters
_UNLEASED_S = 1.0  # how long a cell without a lease does not ask again for the same key
_NO_DIGEST = bytes(32)
_MAX_REFUSED = 4096
_MAX_REHASHES = 16  # under way
# A key that is not known is refused so long after the question was asked, however long the answer took: what Postgres
# touched on the way (11 us more behind a public part that exists) is not told.
_REFUSED_AFTER_S = 0.005
_MAX_LOOKUPS = 256  # questions to Postgres under way; more at once is an attack or an outage


class _Entry:
    """A key as cached. `digest` is what the full text must hash to; times are monotonic seconds."""

    __slots__ = ("context", "digest", "fresh_until", "usable_until")

    def __init__(self, digest: bytes) -> None:
        self.context: KeyContext | None = None
        self.digest = digest
        self.fresh_until = 0.0
        self.usable_until = 0.0


class KeyCache:
    """Keys of one gateway process. Belongs to one event loop."""

    def __init__(
        self,
        directory: KeyDirectory,
        peppers: bytes | api_keys.Peppers,
        *,
        fresh_s: float = 30.0,
        stale_s: float = 900.0,
        unknown_s: float = 5.0,
        max_keys: int = 50_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n_hits = self.n_lookups = self.n_stale = 0
        self._directory = directory
        self._peppers = peppers
        self._fresh_s = fresh_s
        self._stale_s = stale_s
        self._unknown_s = unknown_s
        self._max_keys = max_keys
        self._clock = clock
        # Both bounded; the oldest refresh goes first, so a key in use stays (it is refreshed every fresh_s).
        self._entries: dict[str, _Entry] = {}
        self._verified: dict[bytes, _Entry] = {}
        # Digests of what was asked for and is no key, with when that may have changed; of those being asked for.
        self._refused: dict[bytes, float] = {}
        self._asking: dict[bytes, asyncio.Future[_Entry | None]] = {}
        self._rehashing: set[asyncio.Future[None]] = set()
        self._n_changes = 0  # grows with every announced change: an answer asked for before it is not fresh

    async def authenticate(self, authorization: bytes | None, api_key: bytes | None) -> KeyContext:
        """The key's context. ApiError: 401 (bad key), 403 (suspended), 503 (cannot tell)."""
        header = authorization if authorization is not None else api_key
        if header is None:
            raise _unauthorized(
                "missing_api_key", "no API key: send the header Authorization: Bearer sk-crl-..."
            )
        entry = self._verified.get(header)
        if entry is not None and entry.context is not None and self._clock() < entry.fresh_until:
            self.n_hits += 1
            context = entry.context
        else:
            context = await self._verify(header, _token(header, authorization is not None))
        if context.revoked:
            raise _unauthorized("revoked_api_key", "this API key was revoked: use another one")
        if context.expires_at_ms is not None and context.expires_at_ms <= time.time() * 1000:
            raise _unauthorized("expired_api_key", "this API key has expired: use another one")
        if context.suspended:
            raise ApiError(403, "organization_suspended", "the organization of this API key is suspended")
        if context.unleased:
            raise unavailable(
                "limits_unavailable",
                "this cell has no part of the limits at the moment: try again shortly",
                2.0,
            )
        return context

    def invalidate(self, ref: str) -> None:
        """Something changed: `key:<lookup>`, `prj:<id>`, `org:<id>`, `dep:<id>`, `lim:<organization>` or `all`.

        What may have been taken away (a key, an organization) is not served again before it was read;
        anything else is read again at the next use, and served meanwhile should Postgres be away.
        """
        self._n_changes += 1
        kind, _, name = ref.partition(":")
        if kind in ("key", "all"):
            self._refused.clear()
        if kind == "key":
            entry = self._entries.pop(name, None)
            if entry is not None:
                entry.fresh_until = entry.usable_until = 0.0
            return
        for entry in self._entries.values():
            context = entry.context
            if context is None:
                continue
            if kind == "org" and context.organization == name:
                entry.fresh_until = entry.usable_until = 0.0
            elif (
                kind == "all"
                or (kind == "prj" and context.project == name)
                or (kind == "lim" and context.organization == name)
                or (kind == "dep" and any(d.id == name for d in context.deployments.values()))
            ):
                entry.fresh_until = 0.0

    def doubt_all(self) -> None:
        """Announcements may have been missed: everything is read again at its next use."""
        self._n_changes += 1
        self._refused.clear()
        for entry in self._entries.values():
            entry.fresh_until = 0.0

    async def _verify(self, header: bytes, token: str) -> KeyContext:
        """The context of a header that is not cached. A wrong secret takes the same steps as a key that never was:
        neither its answer nor the time it takes tells whether the lookup part exists.
        """
        keys = api_keys.presented(self._peppers, token)
        if not keys:
            raise _unauthorized("invalid_api_key", "the API key is malformed: it must look like sk-crl-...")
        entry, is_stale = await self._entry(keys[0])
        for key in keys[1:]:  # of an imported key, while the pepper changes
            if entry is None:
                entry, is_stale = await self._entry(key)
        if entry is None or entry.context is None:
            if token.startswith(api_keys.MANAGEMENT):
                raise _unauthorized(
                    "invalid_api_key", "this is a token of the management API (/api/v1): use a key sk-crl-..."
                )
            raise _unauthorized("invalid_api_key", "the API key is not known")
        self._verified.pop(header, None)
        self._verified[header] = entry
        while len(self._verified) > self._max_keys:
            del self._verified[next(iter(self._verified))]
        return replace(entry.context, stale=True) if is_stale else entry.context

    async def _entry(self, key: Presented) -> tuple[_Entry | None, bool]:
        """The entry of a key, None for none, read from Postgres unless it is fresh; whether it could not be read."""
        entry = self._entries.get(key.lookup)
        # Compared in any case, so that it takes as long where there is none.
        if not key.is_behind(_NO_DIGEST if entry is None else entry.digest):
            entry = None  # of another secret: as if there were none
        now = self._clock()
        if entry is not None and now < entry.fresh_until:
            self.n_hits += 1
            return entry, False
        ours = key.identity
        if now < self._refused.get(ours, 0.0):
            return None, False
        asking = self._asking.get(ours)
        if asking is None:
            if len(self._asking) >= _MAX_LOOKUPS:
                raise unavailable("auth_overloaded", "too many unknown API keys at once: try again shortly")
            asking = asyncio.ensure_future(self._read(key))
            self._asking[ours] = asking
            asking.add_done_callback(lambda _: self._asking.pop(ours, None))
        try:
            # Shielded: one client that leaves must not take the answer from the others that wait for it.
            return await asyncio.shield(asking), False
        except DirectoryUnavailable:
            if entry is not None and entry.context is not None and now < entry.usable_until:
                self.n_stale += 1
                return entry, True
            raise unavailable(
                "auth_unavailable", "API keys cannot be checked at the moment: try again shortly", 2.0
            ) from None

    async def _read(self, key: Presented) -> _Entry | None:
        self.n_lookups += 1
        n_changes = self._n_changes
        asked_at = self._clock()
        record = await self._directory.find(key.lookup, key.digests)
        now = self._clock()
        entry = self._entries.get(key.lookup)
        if record is not None and not key.is_behind(bytes.fromhex(record.key.digest)):
            record = None  # the directory compares already; whoever lets a key in has compared as well
        if record is None:
            if key.is_behind(_NO_DIGEST if entry is None else entry.digest):  # it was one
                self._drop(self._entries.pop(key.lookup))
            if n_changes == self._n_changes:
                self._refused[key.identity] = now + self._unknown_s
                while len(self._refused) > _MAX_REFUSED:
                    del self._refused[next(iter(self._refused))]
            await asyncio.sleep(max(asked_at + _REFUSED_AFTER_S - now, 0.0))
            return None
        # The same object where there is one, because headers verified before lead to it, unless it is another
        # key now.
        digest = bytes.fromhex(record.key.digest)
        if entry is not None:
            del self._entries[key.lookup]
        if entry is None or entry.digest != digest:
            if entry is not None:
                self._drop(entry)
            entry = _Entry(digest)
        entry.context = context_of(record)
        entry.fresh_until = now + self._fresh_s
        entry.usable_until = now + self._stale_s
        lease_ms = entry.context.lease_ms
        if lease_ms is not None:  # beyond it the part may be another cell's
            lease_end = asked_at + lease_ms / 1000 if lease_ms > 0 else now + _UNLEASED_S
            entry.fresh_until = min(entry.fresh_until, lease_end)
            entry.usable_until = min(entry.usable_until, lease_end)
        if n_changes != self._n_changes:
            entry.fresh_until = 0.0  # good for who asked; asked again at the next use
        self._entries[key.lookup] = entry
        while len(self._entries) > self._max_keys:
            self._drop(self._entries.pop(next(iter(self._entries))))  # its headers lead nowhere now
        if digest not in key.stays:
            self._rehash(key, digest)
        return entry

    @staticmethod
    def _drop(entry: _Entry) -> None:
        entry.fresh_until = entry.usable_until = 0.0

    def _rehash(self, key: Presented, old: bytes) -> None:
        """An imported key at its first use, or one of the former pepper: from now on it is stored as every other.
        Failing that, at a later use."""
        if len(self._rehashing) >= _MAX_REHASHES:
            return
        task = asyncio.ensure_future(self._directory.rehash(key.lookup, old, *key.target))
        self._rehashing.add(task)
        task.add_done_callback(self._rehashed)

    def _rehashed(self, task: asyncio.Future[None]) -> None:
        self._rehashing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.warning("a key was not re-hashed: %s", type(task.exception()).__name__)


def _token(header: bytes, is_bearer: bool) -> str:
    text = header[:_MAX_HEADER].decode("latin-1")
    if not is_bearer:
        return text.strip()
    scheme, _, token = text.partition(" ")
    if scheme.lower() != "bearer":
        raise _unauthorized("invalid_api_key", "the Authorization header must read: Bearer sk-crl-...")
    return token.strip()


def _unauthorized(code: str, message: str) -> ApiError:
    return ApiError(401, code, message, headers=((b"www-authenticate", b"Bearer"),))
