"""What a cell's Redis knows of requests that clients come back to: found, attached, taken over, given back.

Called by resume.py. Every answer is about the asking project only: what another one asks for does not exist here.
Raises ApiErrors that the client is shown.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, Final, NamedTuple

from controlplane.gateway.errors import NO_RETRY, ApiError, from_wire, unavailable
from controlplane.gateway.identity import Note
from controlplane.gateway.keycontext import KeyContext
from controlplane.gateway.stream import Stream
from workers import scripts
from workers.contract import FinishReason, JournalEntry, WireError, decode_error, decode_journal_entry, encode
from workers.keys import CellKeys
from workers.redis_client import Client, RedisError

# A key or continuation whose request has not been admitted for so long belongs to a gateway that died.
ADMISSION_MS: Final = 5_000
# How long a call waits for an admission, or the end of a cancelled request, that is under way: a step or two, usually.
PATIENCE_S: Final = 5.0
_KEY_PATIENCE_S: Final = 1.0
_POLL_S: Final = 0.05


class Found(NamedTuple):
    """What attach.lua answers about a request that exists."""

    verdict: str  # running | queued | ending | done
    request: str  # the latest that continues what was asked for, or that itself
    note: Note
    admitted_ms: int
    machine: str  # '' = it never was on one
    deployment: str
    price_version: str
    created_ms: int
    gateway: str
    stream: int
    n_tokens: int
    error: WireError | None  # why nobody served it
    age_ms: int  # since its admission, by the clock of Redis; while it runs or waits


class Records:
    """Request records of one cell, for one gateway process. `life_ms`: how long a record outlives its admission."""

    def __init__(self, redis: Client, keys: CellKeys, gateway: str, life_ms: int) -> None:
        self._redis = redis
        self._keys = keys
        self._gateway = gateway
        self._life_ms = life_ms

    async def take(self, project: str, digest: str, request_id: str) -> str | None:
        """Take an idempotency key: None when it is ours now, else the request it names."""
        deadline = time.monotonic() + _KEY_PATIENCE_S
        while True:
            args = (self._keys.prefix, now_ms(), project, digest, request_id, self._life_ms, ADMISSION_MS)
            verdict = await self._run(scripts.IDEM, args)
            if verdict[0] == b"taken":
                return None
            if verdict[0] == b"known":
                return str(verdict[1].decode())
            if time.monotonic() >= deadline:
                raise ApiError(
                    409,
                    "request_in_progress",
                    "a request with this Idempotency-Key is just being admitted: send it again shortly",
                    retry_after_s=verdict[1] / 1000,
                )
            await asyncio.sleep(_POLL_S)

    async def check_same(self, project: str, digest: str, first: str) -> None:
        try:
            held = await self._redis.call("GET", self._keys.idempotency(project, digest))
        except RedisError as error:
            raise _cell_away() from error
        if held is not None and held.split()[0].decode() != first:
            raise ApiError(
                409,
                "idempotency_key_reused",
                "Idempotency-Key and Last-Event-ID are of different requests: send one of them",
                param="Idempotency-Key",
                headers=NO_RETRY,
            )

    async def find(self, first: str, key: KeyContext, digest: str, number: int) -> Found:
        """Where the request stands; attached to stream `number` if it runs. Waits while it is just ending."""
        deadline = time.monotonic() + PATIENCE_S
        only = " ".join(d.id for d in key.deployments.values()) or "-" if key.models_bound else ""
        while True:
            args = (
                self._keys.prefix,
                now_ms(),
                first,
                key.project,
                digest,
                self._gateway,
                number,
                ADMISSION_MS,
                only,
            )
            answer = await self._run(scripts.ATTACH, args)
            verdict = answer[0].decode()
            if verdict == "unknown":
                raise ApiError(
                    404,
                    "request_not_found",
                    "there is no such request: requests are kept until 15 minutes after their end, for API keys of the "
                    "project that sent them",
                )
            if verdict == "differs":
                raise ApiError(
                    409,
                    "body_differs",
                    "this Idempotency-Key or Last-Event-ID belongs to a request with another body or endpoint: send "
                    "the same bytes, or leave the header out",
                    headers=NO_RETRY,
                )
            if verdict not in ("busy", "ending"):
                found = _found(answer)
                if found.error is not None and found.error.status not in (503, 504):
                    raise from_wire(found.error)
                return found
            if time.monotonic() >= deadline:
                raise unavailable("request_ending", "the request is just being ended: try again shortly")
            await asyncio.sleep(_POLL_S)

    async def last_entry(self, found: Found) -> tuple[str, JournalEntry | None]:
        """(key of its journal, last entry of it); None where nothing was produced or is kept."""
        places = [self._keys.journal(found.request)]
        if found.machine:
            places.insert(0, self._keys.machine(found.machine).journal(found.request))
        try:
            for journal in places:
                tail = await self._redis.call("LRANGE", journal, -1, -1)
                if tail:
                    return journal, decode_journal_entry(tail[0])
        except RedisError as error:
            raise _cell_away() from error
        except ValueError as error:  # what a machine wrote
            raise unavailable("journal_unreadable", "the answer was lost on its way: try again") from error
        return "", None

    async def inherit(
        self, stream: Stream, first: str, latest: str, journal: str, last: JournalEntry | None
    ) -> None:
        """Copy the journal without its end, and be the one that continues it."""
        rest = b""
        has_end = last is not None and last.end is not None
        if has_end and last is not None and (last.token_ids or last.text):
            rest = encode(
                JournalEntry(last.choice, last.offset, last.token_ids, last.text, None, last.logprobs)
            )
        verdict = await self._run(
            scripts.CONTINUE,
            (
                self._keys.prefix,
                now_ms(),
                first,
                latest,
                stream.request,
                journal,
                int(has_end),
                rest if journal else b"",
                self._life_ms,
                ADMISSION_MS,
            ),
        )
        if verdict == b"gone":
            raise not_kept(stream.key)
        if verdict != b"ok":
            raise unavailable("request_in_progress", "the request is just being continued: try again shortly")

    def retract(self, project: str, request: str, *, key_digest: str, first: str = "") -> None:
        """Give back what a refused request took: its idempotency key ('' = none), and the one it was to continue.

        Sent before the refusal, so that the client's next try finds it done.
        """
        self._redis.fire(
            "EVALSHA", scripts.RETRACT.sha, 0, self._keys.prefix, request, project, key_digest, first
        )

    async def _run(self, script: scripts.Script, args: tuple[Any, ...]) -> Any:
        try:
            return await self._redis.evalsha(script, (), args)
        except RedisError as error:
            raise _cell_away() from error


def _found(answer: list[Any]) -> Found:
    verdict, request, note, admitted_ms, machine, deployment, price, created_ms, gateway, stream, n_tokens = (
        part.decode() for part in answer[:11]
    )
    error = answer[11]
    return Found(
        verdict,
        request,
        Note.decode(note),
        int(admitted_ms),
        machine,
        deployment,
        price,
        int(created_ms),
        gateway,
        int(stream),
        int(n_tokens),
        decode_error(error) if error else None,
        int(answer[12]),
    )


def was_cut_off(last: JournalEntry) -> bool:
    """It ended by a disconnect or a failure of ours, and not as an answer (or a refusal that would come again)."""
    end = last.end
    if end is None or end.reason is FinishReason.ABORT:
        return True
    return end.reason is FinishReason.ERROR and (end.error is None or end.error.status >= 500)


def not_kept(key: KeyContext) -> ApiError:
    if key.zero_retention:
        return ApiError(
            410,
            "answer_not_kept",
            "this project keeps nothing: an answer can be read again only while it runs and for half a minute after",
        )
    return ApiError(410, "answer_expired", "the answer is not kept any more: send the request anew")


def _cell_away() -> ApiError:
    return unavailable("cell_unavailable", "the service is restarting: try again shortly", 1.0)


def now_ms() -> int:
    return time.time_ns() // 1_000_000
