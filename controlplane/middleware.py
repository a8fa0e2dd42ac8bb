"""One log line and one metric per web request, with ids, route and time; never query strings or bodies."""

from collections.abc import Callable
from time import perf_counter

import structlog
from django.http import HttpRequest, HttpResponse
from prometheus_client import Histogram
from structlog.contextvars import bind_contextvars, clear_contextvars

from controlplane import ids

log = structlog.get_logger("corral.web")

REQUEST_SECONDS = Histogram(
    "corral_web_request_seconds",
    "Time to answer a request of the console or /api/v1",
    ["route", "status"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)


class RequestLogMiddleware:
    """Names the request (X-Request-Id on the answer), binds the name for every line, measures the time."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self._get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        started = perf_counter()
        request_id = ids.to_text(ids.Prefix.REQUEST, ids.new_id())
        clear_contextvars()
        bind_contextvars(web_request=request_id)
        response = self._get_response(request)
        elapsed_s = perf_counter() - started
        match = request.resolver_match
        route = match.route if match else "unmatched"  # the pattern, not the path: few values, no ids
        REQUEST_SECONDS.labels(route, str(response.status_code)).observe(elapsed_s)
        log.info(
            "web.request",
            method=request.method,
            route=route,
            status=response.status_code,
            duration_ms=round(elapsed_s * 1000, 1),
        )
        response["X-Request-Id"] = request_id
        return response
