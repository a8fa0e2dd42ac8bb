"""`/healthz`, `/readyz` and `/metrics` of the web process.

Answered by the first middleware, before hosts, sessions or tenants are looked at, so that a probe by IP works
and a broken database cannot stop `/healthz`. `/readyz` must answer within about a second whatever is down.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from threading import Lock
from time import monotonic

import redis
from django.conf import settings
from django.db import connection
from django.http import HttpRequest, HttpResponse, JsonResponse
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, generate_latest

READY_WITHIN_S = 1.0
RETRY_AFTER_S = 2

GetResponse = Callable[[HttpRequest], HttpResponse]


def _check_postgres() -> None:
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
    finally:
        connection.close()  # back to the pool: this thread serves probes only


def _check_redis() -> None:
    client = redis.Redis.from_url(settings.ENV.redis_url, socket_connect_timeout=0.8, socket_timeout=0.8)
    with client:
        client.ping()


CHECKS: dict[str, Callable[[], None]] = {"postgres": _check_postgres, "redis": _check_redis}


class Readiness:
    """Runs each check in a thread, one of a kind at a time: a hanging check is reported, never piled up."""

    def __init__(self, checks: dict[str, Callable[[], None]]) -> None:
        self._checks = checks
        self._threads = ThreadPoolExecutor(max_workers=len(checks), thread_name_prefix="readyz")
        self._lock = Lock()
        self._running: dict[str, Future[None]] = {}

    def failing(self) -> dict[str, str]:
        """name -> kind of failure, empty when ready. Takes at most READY_WITHIN_S; probes may overlap."""
        deadline = monotonic() + READY_WITHIN_S
        with self._lock:
            for name, check in self._checks.items():
                if name not in self._running or self._running[name].done():
                    self._running[name] = self._threads.submit(check)
            running = dict(self._running)
        failures: dict[str, str] = {}
        for name, future in running.items():
            try:
                future.result(timeout=max(0.0, deadline - monotonic()))
            except FutureTimeoutError:
                failures[name] = "timeout"  # still running: the next probe waits for this same one
            except Exception as error:  # any failure means "not ready"; its class is what an operator needs
                failures[name] = type(error).__name__
        return failures


class HealthMiddleware:
    """Answers the three paths; everything else passes."""

    def __init__(self, get_response: GetResponse) -> None:
        self._get_response = get_response
        self._readiness = Readiness(CHECKS)

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if request.path == "/healthz":
            return JsonResponse({"status": "ok"})
        if request.path == "/readyz":
            failures = self._readiness.failing()
            if failures:
                body = {"status": "unavailable", "failing": failures}
                response = JsonResponse(body, status=503, headers={"Retry-After": str(RETRY_AFTER_S)})
                # Django would log an error per probe; whoever probes knows already.
                response._has_been_logged = True  # type: ignore[attr-defined]
                return response
            return JsonResponse({"status": "ready"})
        if request.path == "/metrics":
            return HttpResponse(generate_latest(REGISTRY), content_type=CONTENT_TYPE_LATEST)
        return self._get_response(request)
