"""The REST provisioning API: its routers, its OpenAPI document, and errors as problems."""

from __future__ import annotations

import structlog
from django.db import InterfaceError, OperationalError
from django.http import HttpRequest, HttpResponse
from ninja.errors import HttpError, ValidationError

from controlplane.api.document import Api
from controlplane.api.problems import database_away, problem
from controlplane.api.resources import (
    adapters,
    audit,
    budgets,
    data,
    decisions,
    deployments,
    end_customers,
    fleet,
    grants,
    identity_providers,
    invitations,
    keys,
    limits,  # noqa: F401 - adds to the routers of organization, projects and keys
    members,
    operations,
    organization,
    projects,
    quotas,
    rollouts,
    scim_tokens,
    service_accounts,
    shadow_results,  # noqa: F401 - adds to the router of upstreams
    slo,
    upstreams,
    usage,
    webhooks,
)
from controlplane.errors import CorralError

log = structlog.get_logger("corral.api")

DESCRIPTION = """Provision tenants, keys, limits and deployments.

Calls carry a management token (`Authorization: Bearer mt-crl-…`) and work for the token's organization. Lists come in
pages (`limit`, `cursor`). Every write takes an `Idempotency-Key`, changes of one resource an `If-Match`. Refusals are
problem details (RFC 9457) with a stable `code` and the fields at fault. `?plan=true` on a write answers what it
would do and does nothing of it. Money is in nano-dollars, as integers.
"""


api = Api(
    title="Corral provisioning API",
    version="1.0.0",
    description=DESCRIPTION,
    docs_url=None,
    urls_namespace="api",
)
for module in (
    organization,
    projects,
    members,
    invitations,
    identity_providers,
    scim_tokens,
    service_accounts,
    keys,
    deployments,
    rollouts,
    adapters,
    grants,
    fleet,
    operations,
    slo,
    budgets,
    end_customers,
    webhooks,
    quotas,
    upstreams,
    usage,
    decisions,
    audit,
    data,
):
    api.add_router("", module.router)


@api.exception_handler(CorralError)
def refused(request: HttpRequest, error: CorralError) -> HttpResponse:
    errors = [{"field": error.field, "message": error.message}] if error.field else []
    return problem(request, error.status, error.code, error.message, errors=errors)


@api.exception_handler(ValidationError)
def invalid(request: HttpRequest, error: ValidationError) -> HttpResponse:
    """400 naming each field; a malformed id in the path is like one that never was: 404."""
    if any(entry["loc"][0] == "path" for entry in error.errors):
        return problem(request, 404, "not_found", "there is nothing under this id")
    # loc: where it came from, the handler's parameter, then the path of the value.
    found = [
        {
            "field": ".".join(str(part) for part in entry["loc"][2:]) or str(entry["loc"][-1]),
            "message": entry["msg"],
        }
        for entry in error.errors
    ]
    detail = "; ".join(f"{each['field']}: {each['message']}" for each in found[:3])
    return problem(request, 400, "invalid_input", detail, errors=found[:50])


@api.exception_handler(HttpError)
def http_error(request: HttpRequest, error: HttpError) -> HttpResponse:
    return problem(request, error.status_code, "invalid_input", str(error))


@api.exception_handler(Exception)
def failed(request: HttpRequest, error: Exception) -> HttpResponse:
    if isinstance(error, (OperationalError, InterfaceError)):
        return database_away(request, error)
    log.error("api.failed", error=type(error).__name__, exc_info=error)
    return problem(request, 500, "internal_error", "this is our fault and was logged: try again later")
