"""Calls of /api/v1: one connection, a timeout each, a bounded number of tries, problems as errors.

Every write carries an Idempotency-Key, so that trying again has no second effect. The generated client (clientgen) is
for programs; here plain JSON does, because importing models would cost half of a command's time.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from controlplane.cli.config import Context
from controlplane.cli.failures import NotReachable, Refused

PREFIX: Final = "/api/v1"
TIMEOUT_S: Final = 30.0
MAX_TRIES: Final = 4
MAX_WAIT_S: Final = 20.0
MAX_PAGES: Final = 1000
_AGAIN: Final = frozenset({429, 502, 503, 504})


class Api:
    """A caller of the API. `call` answers decoded JSON, None for an empty body."""

    def __init__(self, context: Context, sleep: Callable[[float], None] = time.sleep) -> None:
        import httpx

        self.url = context.url.rstrip("/")
        self._sleep = sleep
        self._errors = (httpx.TransportError, httpx.InvalidURL)
        self._client = httpx.Client(
            base_url=self.url,
            timeout=TIMEOUT_S,
            headers={"Authorization": f"Bearer {context.token}", "User-Agent": "corral-cli"},
        )

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, **params: Any) -> Any:
        return self.call("GET", path, params=params)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        params: Mapping[str, Any] | None = None,
        plan: bool = False,
    ) -> Any:
        """Raises Refused for a problem, NotReachable where nobody answers."""
        headers = {} if method == "GET" else {"Idempotency-Key": uuid.uuid4().hex}
        query = {name: _text(value) for name, value in (params or {}).items() if value is not None}
        if plan:
            query["plan"] = "true"
        for attempt in range(MAX_TRIES):
            last = attempt == MAX_TRIES - 1
            try:
                answer = self._client.request(
                    method,
                    PREFIX + path,
                    params=query,
                    headers=headers,
                    json=body if body is not None else None,
                )
            except self._errors as error:
                if last or ("ConnectError" in type(error).__name__ and attempt >= 1):
                    raise NotReachable(
                        f"{self.url} does not answer ({type(error).__name__}): is the control plane up?"
                    ) from None
                self._sleep(0.3 * 2**attempt)
                continue
            if answer.status_code in _AGAIN and not last:
                self._sleep(min(float(answer.headers.get("Retry-After") or 2**attempt), MAX_WAIT_S))
                continue
            return self._decode(answer)
        raise AssertionError("unreachable")

    def pages(self, path: str, *, limit: int | None = None, **params: Any) -> Iterator[dict[str, Any]]:
        """Every row of a list, page by page, at most `limit`."""
        cursor, n = None, 0
        for _ in range(MAX_PAGES):
            size = None if limit is None else min(limit - n, 200)
            page = self.call("GET", path, params={**params, "limit": size, "cursor": cursor})
            for row in page["data"]:
                yield row
                n += 1
            cursor = page.get("next_cursor")
            if cursor is None or (limit is not None and n >= limit):
                return

    def _decode(self, answer: Any) -> Any:
        if answer.status_code < 400:
            try:
                return answer.json() if answer.content else None
            except ValueError:
                raise NotReachable(
                    f"{self.url} answered something else than JSON: is it the console's address?"
                ) from None
        try:
            problem = answer.json()
            errors = [(each["field"], each["message"]) for each in problem.get("errors", [])]
            code, detail = problem["code"], problem["detail"]
        except (ValueError, KeyError, TypeError):
            code, errors = "unknown", []
            detail = f"{self.url} answered {answer.status_code} {answer.reason_phrase}"
        raise Refused(answer.status_code, code, detail, errors, answer.headers.get("X-Request-Id", ""))


def _text(value: Any) -> Any:
    return ("true" if value else "false") if isinstance(value, bool) else value
