"""Calls of the API with a timeout each, a bounded number of tries, and problems as errors, in both colours.

This file is copied into the generated client as it stands: it imports httpx and pydantic only. Every write carries an
Idempotency-Key, made here if the caller gives none, so that trying again has no second effect.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Final, TypeVar

import httpx
from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)

TIMEOUT_S: Final = 30.0
MAX_TRIES: Final = 4
MAX_WAIT_S: Final = 30.0
_AGAIN: Final = frozenset({429, 502, 503, 504})


@dataclass(frozen=True)
class FieldError:
    """One field at fault."""

    field: str
    message: str


class ApiError(Exception):
    """A refusal (RFC 9457): `code` is for programs, `detail` for people, `errors` name the fields at fault."""

    def __init__(
        self, status: int, code: str, detail: str, errors: tuple[FieldError, ...] = (), request_id: str = ""
    ) -> None:
        super().__init__(f"{status} {code}: {detail}")
        self.status, self.code, self.detail = status, code, detail
        self.errors, self.request_id = errors, request_id


@dataclass(frozen=True)
class Call:
    """One call as it is sent, each time it is."""

    method: str
    path: str
    params: Mapping[str, str]
    headers: Mapping[str, str]
    content: bytes | None


def prepare(
    method: str,
    path: str,
    *,
    params: Mapping[str, Any] | None = None,
    body: BaseModel | None = None,
    if_match: str | None = None,
    idempotency_key: str | None = None,
) -> Call:
    """None is left out of the query; of a body what was not set is left out, and what was set to None is sent."""
    headers = {"Accept": "application/json, application/vnd.corral.plan+json, application/problem+json"}
    if method != "GET":
        headers["Idempotency-Key"] = idempotency_key or uuid.uuid4().hex
    if if_match is not None:
        headers["If-Match"] = if_match
    content = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        content = body.model_dump_json(exclude_unset=True, by_alias=True).encode()
    query = {name: _text(value) for name, value in (params or {}).items() if value is not None}
    return Call(method, path, query, headers, content)


def error_of(response: httpx.Response) -> ApiError:
    """The problem in an answer, whatever stands before us made of it."""
    request_id = response.headers.get("X-Request-Id", "")
    try:
        problem = response.json()
        errors = tuple(FieldError(each["field"], each["message"]) for each in problem.get("errors", ()))
        return ApiError(response.status_code, problem["code"], problem["detail"], errors, request_id)
    except (ValueError, KeyError, TypeError, AttributeError):
        return ApiError(response.status_code, "unknown", response.reason_phrase, (), request_id)


def wait_s(attempt: int, response: httpx.Response | None) -> float | None:
    """Before the next try; None: there is none. `response` None: nobody answered."""
    if attempt + 1 >= MAX_TRIES or (response is not None and response.status_code not in _AGAIN):
        return None
    told = response.headers.get("Retry-After", "") if response is not None else ""
    if told.isdigit():
        return min(float(told), MAX_WAIT_S)
    return min(0.25 * 2.0**attempt * random.uniform(0.5, 1.5), MAX_WAIT_S)


class Transport:
    """Of the blocking client. `http`: an httpx.Client of one's own (proxies, certificates)."""

    def __init__(self, base_url: str, token: str, *, http: httpx.Client | None = None) -> None:
        self._http = http or httpx.Client(timeout=TIMEOUT_S)
        self._base_url, self._headers = base_url.rstrip("/"), {"Authorization": f"Bearer {token}"}

    def send(self, call: Call) -> httpx.Response:
        """The answer of success. Raises ApiError, httpx.TransportError."""
        attempt = 0
        while True:
            try:
                response = self._http.request(
                    call.method,
                    self._base_url + call.path,
                    params=call.params,
                    headers={**self._headers, **call.headers},
                    content=call.content,
                )
            except httpx.TransportError:
                pause_s = wait_s(attempt, None)
                if pause_s is None:
                    raise
            else:
                if response.status_code < 400:
                    return response
                pause_s = wait_s(attempt, response)
                if pause_s is None:
                    raise error_of(response)
            time.sleep(pause_s)
            attempt += 1

    def model(self, answer: type[M], call: Call) -> M:
        return answer.model_validate_json(self.send(call).content)

    def nothing(self, call: Call) -> None:
        self.send(call)

    def pages(self, item: type[M], path: str, params: Mapping[str, Any]) -> Iterator[M]:
        """Every item of a list, a page at a time."""
        cursor: str | None = None
        while True:
            page = self.send(prepare("GET", path, params={**params, "cursor": cursor})).json()
            for row in page["data"]:
                yield item.model_validate(row)
            cursor = page.get("next_cursor")
            if cursor is None:
                return

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncTransport:
    """Of the asynchronous client. `http`: an httpx.AsyncClient of one's own."""

    def __init__(self, base_url: str, token: str, *, http: httpx.AsyncClient | None = None) -> None:
        self._http = http or httpx.AsyncClient(timeout=TIMEOUT_S)
        self._base_url, self._headers = base_url.rstrip("/"), {"Authorization": f"Bearer {token}"}

    async def send(self, call: Call) -> httpx.Response:
        """The answer of success. Raises ApiError, httpx.TransportError."""
        attempt = 0
        while True:
            try:
                response = await self._http.request(
                    call.method,
                    self._base_url + call.path,
                    params=call.params,
                    headers={**self._headers, **call.headers},
                    content=call.content,
                )
            except httpx.TransportError:
                pause_s = wait_s(attempt, None)
                if pause_s is None:
                    raise
            else:
                if response.status_code < 400:
                    return response
                pause_s = wait_s(attempt, response)
                if pause_s is None:
                    raise error_of(response)
            await asyncio.sleep(pause_s)
            attempt += 1

    async def model(self, answer: type[M], call: Call) -> M:
        return answer.model_validate_json((await self.send(call)).content)

    async def nothing(self, call: Call) -> None:
        await self.send(call)

    async def pages(self, item: type[M], path: str, params: Mapping[str, Any]) -> AsyncIterator[M]:
        """Every item of a list, a page at a time."""
        cursor: str | None = None
        while True:
            page = (await self.send(prepare("GET", path, params={**params, "cursor": cursor}))).json()
            for row in page["data"]:
                yield item.model_validate(row)
            cursor = page.get("next_cursor")
            if cursor is None:
                return

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> AsyncTransport:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime):
        return value.isoformat()
    return str(getattr(value, "value", value))
