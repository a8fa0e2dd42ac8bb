"""The ASGI callable of /v1: paths, CORS, request ids, errors as responses, the log line of each request.

Run by uvicorn, one per gateway process (__main__.py builds it). No framework on the hot path: one dictionary
lookup for the route, one pass over the headers.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import uuid_utils
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from controlplane.gateway import ratelimits
from controlplane.gateway.auth import KeyCache
from controlplane.gateway.config import GatewayConfig
from controlplane.gateway.decisions import Decisions
from controlplane.gateway.errors import ApiError, ClientGone, Headers, bad_request, unavailable
from controlplane.gateway.generate import Generator, Outcome, find_deployment
from controlplane.gateway.http import (
    JSON,
    Receive,
    RequestHeaders,
    Scope,
    Send,
    read_body,
    respond,
    respond_and_drain,
)
from controlplane.gateway.identity import asked, parse_request_id
from controlplane.gateway.keycontext import Deployment, KeyContext
from controlplane.gateway.metrics import GatewayMetrics
from controlplane.gateway.requestlog import RequestLine, RequestLog, timestamp
from controlplane.gateway.stream import Resumed
from controlplane.gateway.surface import Surface, Translated
from controlplane.gateway.writers import error_body
from controlplane.tenants.key_scopes import Route
from workers.contract import Endpoint

log = logging.getLogger(__name__)

_GENERATE: Final[dict[str, Surface]] = {
    "/v1/chat/completions": Endpoint.CHAT,
    "/v1/completions": Endpoint.COMPLETIONS,
    "/v1/messages": Translated.MESSAGES,
    "/v1/messages/count_tokens": Translated.COUNT,
    "/v1/responses": Translated.RESPONSES,
}
_ROUTES: Final[dict[Surface | None, Route]] = {
    Endpoint.CHAT: Route.CHAT,
    Endpoint.COMPLETIONS: Route.COMPLETIONS,
    Translated.MESSAGES: Route.CHAT,
    Translated.COUNT: Route.CHAT,
    Translated.RESPONSES: Route.CHAT,
    None: Route.REQUESTS,
}
_MODEL_PREFIX: Final = "/v1/models/"
_EVENTS: Final = re.compile(r"/v1/requests/([^/]+)/events\Z")
_CORS_METHODS: Final = b"GET, POST, OPTIONS"
_CORS_REQUEST_HEADERS: Final = (
    b"authorization, content-type, x-api-key, last-event-id, idempotency-key, x-corral-slo-class, "
    b"x-corral-end-customer, anthropic-version, anthropic-beta, anthropic-dangerous-direct-browser-access"
)
_CORS_EXPOSED: Final = b", ".join(
    (
        b"x-request-id, retry-after, retry-after-ms, x-corral-limit, x-corral-scope, x-corral-resumed",
        *ratelimits.NAMES,
    )
)
_CORS_MAX_AGE_S: Final = b"600"
_encode = msgspec.json.Encoder().encode

_View = Callable[[Scope, RequestHeaders], Awaitable[tuple[int, bytes, bytes]]]  # status, body, content type


class GatewayApp:
    """One gateway process's /v1. `not_ready` names what is missing, empty when it may get traffic."""

    def __init__(
        self,
        config: GatewayConfig,
        keys: KeyCache,
        generator: Generator,
        metrics: GatewayMetrics,
        request_log: RequestLog,
        not_ready: Callable[[], list[str]],
        decisions: Decisions,
    ) -> None:
        self.n_in_flight = 0
        self._config = config
        self._keys = keys
        self._generator = generator
        self._metrics = metrics
        self._log = request_log
        self._not_ready = not_ready
        self._decisions = decisions
        self._registry = CollectorRegistry()
        self._registry.register(metrics)
        self._origins = frozenset(origin.encode() for origin in config.cors_origins)
        self._views: dict[str, _View] = {
            "/v1/models": self._models,
            "/healthz": self._healthz,
            "/readyz": self._readyz,
            "/metrics": self._show_metrics,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no lifespan; a websocket is refused by the server
        request_id: str = uuid_utils.uuid7().hex
        headers = RequestHeaders(scope["headers"])
        own: Headers = ((b"x-request-id", b"req_" + request_id.encode()),)
        if headers.origin is not None and headers.origin in self._origins:
            own = (
                *own,
                (b"access-control-allow-origin", headers.origin),
                (b"access-control-expose-headers", _CORS_EXPOSED),
                (b"vary", b"origin"),
            )
        path, method = scope["path"], scope["method"]
        endpoint = _GENERATE.get(path)
        if endpoint is not None and method == "POST":
            if isinstance(endpoint, Translated) and endpoint is not Translated.RESPONSES:
                own = (*own, (b"request-id", own[0][1]))  # where Anthropic's SDK looks for it
            await self._generate(endpoint, request_id, scope, headers, receive, send, own)
        elif method == "OPTIONS" and headers.origin is not None and self._allowed(path):
            await self._preflight(send, own)
        elif method == "GET" and (events := _EVENTS.match(path)) is not None:
            await self._generate(None, request_id, scope, headers, receive, send, own, events[1])
        else:
            await self._show(scope, headers, send, own)

    async def _generate(
        self,
        endpoint: Surface | None,
        request_id: str,
        scope: Scope,
        headers: RequestHeaders,
        receive: Receive,
        send: Send,
        own: Headers,
        followed: str = "",
    ) -> None:
        """Answer a call of an endpoint, or, without one, go on with the request named by `followed`."""
        started_at = time.monotonic()
        outcome = Outcome()
        self.n_in_flight += 1
        try:
            if self.n_in_flight > self._config.max_in_flight:
                raise unavailable(
                    "gateway_overloaded", "too many requests are under way here: try again shortly"
                )
            key = outcome.key = await self._keys.authenticate(headers.authorization, headers.api_key)
            if key.bounds is not None:
                key.bounds.check(_ROUTES[endpoint], scope, self._config.trusted_proxies)
            called_before = None
            if headers.last_event_id is not None or headers.idempotency_key is not None:
                called_before = asked(headers.last_event_id, headers.idempotency_key)
            if endpoint is None:
                request = parse_request_id(followed)
                if request is None:
                    raise bad_request("the path must name a request: /v1/requests/req_.../events", "request")
                await self._generator.follow(key, request, called_before, receive, send, own, outcome)
                return
            body = await read_body(headers, receive, self._config.max_body_bytes)
            await self._generator.serve(
                endpoint,
                key,
                request_id,
                body,
                receive,
                send,
                own,
                outcome,
                called_before,
                headers.slo_class,
                headers.end_customer,
            )
        except ApiError as error:
            outcome.status, outcome.code = error.status, error.code
            if outcome.stream is not None:
                own = (*own, *outcome.stream.limits)
            if outcome.key is not None:
                self._decisions.refused(outcome.key, request_id, error, outcome.stream, endpoint)
            if error.status == 413:
                headers_413 = (JSON, *own, *error.response_headers())
                await respond_and_drain(send, receive, 413, error_body(error, endpoint), headers_413)
            else:
                await self._refuse(send, error, own, endpoint)
        except ClientGone:
            self._metrics.n_disconnects += 1
            outcome.status, outcome.code = 499, "client_gone"
        except Exception:
            # Only the kind and place of a defect are logged (no locals), and the client is told nothing of
            # it.
            log.exception("request req_%s failed", request_id)
            begun = outcome.status == 200
            outcome.status, outcome.code = 500, "internal_error"
            if begun:
                raise  # the server closes the connection: a stream that just ended would look complete
            await self._refuse(
                send,
                ApiError(500, "internal_error", "the gateway failed; the error was logged"),
                own,
                endpoint,
            )
        finally:
            self.n_in_flight -= 1
            self._record(endpoint, request_id, outcome, time.monotonic() - started_at)

    async def _show(self, scope: Scope, headers: RequestHeaders, send: Send, own: Headers) -> None:
        """Everything that only reads."""
        path, method = scope["path"], scope["method"]
        try:
            allowed = self._allowed(path)
            if not allowed:
                raise ApiError(
                    404, "unknown_route", f"there is no {path[:200]!r} here; the API lies under /v1"
                )
            if method not in allowed:
                raise ApiError(
                    405,
                    "method_not_allowed",
                    f"{path} takes {', '.join(allowed)}, not {method}",
                    headers=((b"allow", ", ".join(allowed).encode()),),
                )
            if path.startswith(_MODEL_PREFIX):
                status, body, kind = await self._model(scope, headers, path.removeprefix(_MODEL_PREFIX))
            else:
                status, body, kind = await self._views[path](scope, headers)
        except ApiError as error:
            await self._refuse(send, error, own, head_only=method == "HEAD")
            return
        extra = ((b"retry-after", b"2"),) if status == 503 else ()
        await respond(send, status, body, ((b"content-type", kind), *extra, *own), head_only=method == "HEAD")

    def _allowed(self, path: str) -> tuple[str, ...]:
        """Methods of a path; empty where there is none."""
        if path in _GENERATE:
            return ("POST",)
        if _EVENTS.match(path):
            return ("GET",)
        if path in self._views or (path.startswith(_MODEL_PREFIX) and len(path) > len(_MODEL_PREFIX)):
            return ("GET", "HEAD")
        return ()

    async def _models(self, scope: Scope, headers: RequestHeaders) -> tuple[int, bytes, bytes]:
        key = await self._reader(scope, headers)
        models = [_model_object(name, key.deployments[name]) for name in sorted(key.deployments)]
        return 200, _encode({"object": "list", "data": models}), JSON[1]

    async def _model(self, scope: Scope, headers: RequestHeaders, name: str) -> tuple[int, bytes, bytes]:
        key = await self._reader(scope, headers)
        return 200, _encode(_model_object(name, find_deployment(key, name))), JSON[1]

    async def _reader(self, scope: Scope, headers: RequestHeaders) -> KeyContext:
        """Who asks for models."""
        key = await self._keys.authenticate(headers.authorization, headers.api_key)
        if key.bounds is not None:
            key.bounds.check(Route.MODELS, scope, self._config.trusted_proxies)
        return key

    async def _healthz(self, _scope: Scope, _headers: RequestHeaders) -> tuple[int, bytes, bytes]:
        return 200, b'{"status":"ok"}', JSON[1]

    async def _readyz(self, _scope: Scope, _headers: RequestHeaders) -> tuple[int, bytes, bytes]:
        failing = self._not_ready()
        if failing:
            return 503, _encode({"status": "unavailable", "failing": failing}), JSON[1]
        return 200, b'{"status":"ready"}', JSON[1]

    async def _show_metrics(self, _scope: Scope, _headers: RequestHeaders) -> tuple[int, bytes, bytes]:
        return 200, generate_latest(self._registry), CONTENT_TYPE_LATEST.encode()

    @staticmethod
    async def _preflight(send: Send, own: Headers) -> None:
        """Answered for every origin; only an allowed one gets the header that makes a browser go on."""
        headers = [
            *own,
            (b"access-control-allow-methods", _CORS_METHODS),
            (b"access-control-allow-headers", _CORS_REQUEST_HEADERS),
            (b"access-control-max-age", _CORS_MAX_AGE_S),
        ]
        await send({"type": "http.response.start", "status": 204, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    @staticmethod
    async def _refuse(
        send: Send,
        error: ApiError,
        own: Headers,
        endpoint: Surface | None = None,
        *,
        head_only: bool = False,
    ) -> None:
        headers = (JSON, *own, *error.response_headers())
        await respond(send, error.status, error_body(error, endpoint), headers, head_only=head_only)

    def _record(self, endpoint: Surface | None, request_id: str, outcome: Outcome, duration_s: float) -> None:
        metrics = self._metrics
        name = "events" if endpoint is None else endpoint.value
        metrics.requests[(name, outcome.status, outcome.code)] += 1
        metrics.duration_s.add(duration_s)
        stream, key = outcome.stream, outcome.key
        end = stream.end if stream is not None else None
        ttft_s = None
        origin = stream.origin if stream is not None else None
        if stream is not None and stream.first_at is not None and origin is None:
            ttft_s = stream.first_at - stream.admitted_at
            metrics.ttft_s.add(ttft_s)
            if stream.have > 1:
                metrics.itl_s.add((stream.last_at - stream.first_at) / (stream.have - 1))
        is_new = origin is None or origin.how is not Resumed.REPLAYED
        if stream is not None and end is not None and is_new and not stream.is_count:
            n_charged, n_carried = (0, 0) if origin is None else (origin.n_carried_prompt, origin.n_carried)
            metrics.n_prompt += max(0, end.n_prompt - n_charged)
            metrics.n_cached += 0 if n_charged else end.n_cached
            metrics.n_completion += max(0, end.n_completion - n_carried)
        if not self._log.wants(outcome.status):
            return
        line = RequestLine(
            timestamp=timestamp(time.time_ns() // 1_000_000),
            event="request",
            level="error" if outcome.status >= 500 else "info",
            gateway=self._config.name,
            request="req_" + request_id,
            endpoint=name,
            status=outcome.status,
            code=outcome.code,
            duration_ms=int(duration_s * 1000),
        )
        if key is not None:
            line.organization, line.project = "org_" + key.organization, "prj_" + key.project
            line.key = "key_" + key.key
        if stream is not None:
            line.deployment, line.model = "dep_" + stream.deployment.id, stream.deployment.name
            line.replica = "rep_" + stream.replica if stream.replica else ""
            line.stream = stream.streaming
            line.resumes = "" if origin is None else "req_" + origin.request
            line.ttft_ms = None if ttft_s is None else int(ttft_s * 1000)
        if end is not None:
            line.finish, line.attempts = end.reason.value, end.attempts
            line.n_prompt, line.n_cached, line.n_completion = end.n_prompt, end.n_cached, end.n_completion
        self._log.write(line)


def _model_object(name: str, deployment: Deployment) -> dict[str, object]:
    return {
        "id": name,
        "object": "model",
        "created": deployment.created_at_s,
        "owned_by": "corral",
        "max_model_len": deployment.context_tokens,
    }
