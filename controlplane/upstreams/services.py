"""Writes about endpoints elsewhere: attaching, changing, detaching, and an organization's leave to send prompts out.

The replica of an endpoint follows within seconds (autoscaler/external.py). Key and headers are sealed as they come and
never read back but for the machine that calls (`secret_of`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import msgspec
import structlog
from django.conf import settings
from django.db.models import Q
from django.utils import timezone

from controlplane import outbound, secretbox
from controlplane.deployments import selectors as deployments
from controlplane.deployments.models import Deployment, Grant
from controlplane.errors import ConflictError, InvalidInputError
from controlplane.saving import check_fields, insert
from controlplane.tenants.context import tenant
from controlplane.tenants.models import Organization
from controlplane.upstreams import selectors
from controlplane.upstreams.models import (
    MAX_SLOTS,
    OutsideConsent,
    TokenLimitField,
    Upstream,
    UpstreamReplica,
    UpstreamRole,
    UpstreamSecrets,
)
from workers.contract import UpstreamSecret
from workers.sealed import seal_for

log = structlog.get_logger("corral.upstreams")

PURPOSE: Final = "upstream secret"
MAX_UPSTREAMS: Final = 32  # of an organization
MAX_HEADERS: Final = 16
MAX_RATE: Final = 10**15
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}\Z")
_HEADER_VALUE: Final = re.compile(r"[\x20-\x7e]{0,4096}\Z")
_KEY: Final = re.compile(r"[\x21-\x7e]{1,4096}\Z")
# Ours to set, or what would change where a request ends.
_OURS: Final = frozenset(
    {
        *(
            "host",
            "content-length",
            "transfer-encoding",
            "connection",
            "content-type",
            "accept",
            "accept-encoding",
        ),
        *("user-agent", "te", "trailer", "upgrade", "expect", "keep-alive"),
        *("proxy-authorization", "proxy-connection"),
    }
)
# name -> (least, most)
RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "slots": (1, MAX_SLOTS),
    "overflow_after_ms": (0, 600_000),
    "shadow_ppm": (1, 1_000_000),
    "shadow_rpm": (1, 600),
    "shadow_budget_nano": (0, MAX_RATE),
    "connect_ms": (100, 60_000),
    "first_token_ms": (100, 600_000),
    "between_tokens_ms": (100, 600_000),
    "n_retries": (0, 5),
    "breaker_failures": (1, 100),
    "breaker_pause_ms": (100, 300_000),
    "input_nano_per_million": (0, MAX_RATE),
    "cached_nano_per_million": (0, MAX_RATE),
    "output_nano_per_million": (0, MAX_RATE),
}
_RATES: Final = ("input_nano_per_million", "cached_nano_per_million", "output_nano_per_million")


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What to set of an endpoint; None leaves a value as it is. `api_key` "" and `headers` {} take them away."""

    role: str | None = None
    base_url: str | None = None
    model: str | None = None
    slots: int | None = None
    overflow_after_ms: int | None = None
    shadow_ppm: int | None = None
    shadow_rpm: int | None = None
    shadow_budget_nano: int | None = None
    connect_ms: int | None = None
    first_token_ms: int | None = None
    between_tokens_ms: int | None = None
    n_retries: int | None = None
    breaker_failures: int | None = None
    breaker_pause_ms: int | None = None
    extensions: bool | None = None
    stream_usage: bool | None = None
    max_tokens_field: str | None = None
    input_nano_per_million: int | None = None
    cached_nano_per_million: int | None = None
    output_nano_per_million: int | None = None
    api_key: str | None = None
    headers: Mapping[str, str] | None = None
    enabled: bool | None = None

    def __repr__(self) -> str:
        return "Change(…)"  # it holds secrets


def attach(
    *,
    organization_id: UUID,
    deployment_id: UUID,
    name: str,
    role: str,
    change: Change,
    base_url: str = "",
    model: str = "",
    target_deployment_id: UUID | None = None,
) -> Upstream:
    """A new endpoint for a deployment; a shadow may be another deployment in place of an address. Raises NotFoundError,
    InvalidInputError, and ConflictError (the name is taken, too many, or prompts of a tenant that did not agree would
    go there)."""
    with tenant(organization_id):
        deployment = deployments.deployment(organization_id=organization_id, deployment_id=deployment_id)
        target = None
        if target_deployment_id is not None:
            target = deployments.deployment(
                organization_id=organization_id, deployment_id=target_deployment_id
            )
        Organization.objects.select_for_update(no_key=True).get(id=organization_id)
        if selectors.upstreams(organization_id=organization_id).count() >= MAX_UPSTREAMS:
            raise ConflictError(f"there are {MAX_UPSTREAMS} upstreams already: delete one first")
        made = Upstream(
            organization_id=organization_id,
            deployment=deployment,
            name=name,
            base_url=base_url,
            model=model,
            role=role,
            target=target,
            slots=16,
        )
        secret = _apply(made, change, UpstreamSecret())
        _check(made)
        _check_sharing(made)
        insert(made, taken={"upstream_name_unique": ("name", f"another upstream is called {name!r}")})
        UpstreamSecrets.objects.create(
            upstream=made, organization_id=organization_id, sealed_secret=_seal(secret)
        )
    log.info("upstream.attached", organization=organization_id.hex, upstream=made.id.hex, role=made.role)
    return made


def change_upstream(*, organization_id: UUID, upstream_id: UUID, change: Change) -> Upstream:
    """Set what is given. Its replica is replaced where it is called differently from now on. Raises as `attach`."""
    with tenant(organization_id):
        found = selectors.upstream(organization_id=organization_id, upstream_id=upstream_id)
        kept = UpstreamSecrets.objects.select_for_update().get(upstream=found)
        before = secret_of(kept)
        secret = _apply(found, change, before)
        _check(found)
        check_fields(found)
        _check_sharing(found)
        if secret != before:
            found.secrets_version += 1
            kept.sealed_secret = _seal(secret)
            kept.save(update_fields=["sealed_secret"])
        found.save()
        UpstreamReplica.objects.filter(organization_id=organization_id, upstream_id=upstream_id).update(
            **{name: getattr(found, name) for name in _RATES}
        )
    log.info("upstream.changed", organization=organization_id.hex, upstream=upstream_id.hex)
    return found


def detach(*, organization_id: UUID, upstream_id: UUID) -> None:
    """Gone; what it answers now may end. Raises NotFoundError."""
    with tenant(organization_id):
        selectors.upstream(organization_id=organization_id, upstream_id=upstream_id).delete()
    log.info("upstream.detached", organization=organization_id.hex, upstream=upstream_id.hex)


def detach_all(*, organization_id: UUID, deployment_id: UUID) -> None:
    """Of a deployment that is deleted: what is attached to it, and shadows that it was."""
    own = selectors.upstreams(organization_id=organization_id)
    for each in own.filter(Q(deployment_id=deployment_id) | Q(target_id=deployment_id)):
        detach(organization_id=organization_id, upstream_id=each.id)


def set_consent(*, organization_id: UUID, agreed: bool) -> None:
    """Whether requests of this organization may be copied to shadows, and prompts go to endpoints that others attached.
    Where that ends, gateways make no more copies within a second. Raises
    ConflictError while it uses a shared deployment that such an endpoint serves."""
    with tenant(organization_id):
        if agreed:
            OutsideConsent.objects.get_or_create(organization_id=organization_id)
            return
        names = held_outside(organization_id)
        if names:
            raise ConflictError(
                f"these models are shared with you and served elsewhere: {', '.join(names[:5])}; have their owner "
                "take your leave to call them back first"
            )
        OutsideConsent.objects.filter(organization_id=organization_id).delete()


def held_outside(organization_id: UUID) -> list[str]:
    """Names of models shared with this organization that are served by others' endpoints."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM corral_held_outside(%s)", [organization_id])
        return [row[0] for row in cursor.fetchall()]


def check_grant(deployment: Deployment, grantee_id: UUID) -> None:
    """Before a deployment is shared: raises ConflictError where an endpoint elsewhere serves it, and the other side has
    not agreed to that."""
    if (
        grantee_id == deployment.organization_id
        or not selectors.serving(deployment_id=deployment.id).exists()
    ):
        return
    if grantee_id not in selectors.that_agreed([grantee_id]):
        raise ConflictError(
            "an endpoint elsewhere serves this deployment, and they have not agreed that their prompts leave: have "
            "them agree (PUT /api/v1/outside-consent)",
            field="grantee",
        )


def secret_of(kept: UpstreamSecrets) -> UpstreamSecret:
    """What an endpoint is called with. For its machine only. Raises SealError."""
    plain = secretbox.unseal(bytes(kept.sealed_secret), purpose=PURPOSE)
    return msgspec.json.decode(plain, type=UpstreamSecret)


def sealed_for(upstream_id: UUID, public_hex: str) -> str:
    """The credentials of an endpoint in a box for the machine with this public key; empty where there are none (any
    more). Needs the operator role. Raises SealError and BoxError."""
    kept = UpstreamSecrets.objects.filter(upstream_id=upstream_id).first()
    secret = UpstreamSecret() if kept is None else secret_of(kept)
    if not secret.api_key and not secret.headers:
        return ""
    return seal_for(public_hex, msgspec.json.encode(secret))


def _seal(secret: UpstreamSecret) -> bytes:
    return secretbox.seal(msgspec.json.encode(secret).decode(), purpose=PURPOSE)


def _apply(upstream: Upstream, change: Change, secret: UpstreamSecret) -> UpstreamSecret:
    """Set what is given; the secret as it is then."""
    for name in Change.__dataclass_fields__:
        value: Any = getattr(change, name)
        if value is not None and name not in ("api_key", "headers", "enabled"):
            setattr(upstream, name, value)
    if change.enabled is True:
        upstream.disabled_at = None
    elif change.enabled is False and upstream.disabled_at is None:
        upstream.disabled_at = timezone.now()
    api_key = secret.api_key if change.api_key is None else change.api_key
    headers = secret.headers if change.headers is None else dict(change.headers)
    if api_key and not _KEY.match(api_key):
        raise InvalidInputError("api_key: send up to 4,096 visible ASCII characters", field="api_key")
    _check_headers(headers, has_key=bool(api_key))
    upstream.has_api_key, upstream.header_names = bool(api_key), sorted(headers)
    return UpstreamSecret(api_key, headers)


def _check_headers(headers: Mapping[str, str], *, has_key: bool) -> None:
    if len(headers) > MAX_HEADERS:
        raise InvalidInputError(f"headers: at most {MAX_HEADERS}", field="headers")
    for name, value in headers.items():
        if not _HEADER_NAME.match(name) or not _HEADER_VALUE.match(value):
            raise InvalidInputError(
                f"headers: {name[:40]!r} is no header with a value of visible ASCII", field="headers"
            )
        if name.lower() in _OURS or (has_key and name.lower() == "authorization"):
            raise InvalidInputError(f"headers: {name[:40]} is set by Corral: leave it out", field="headers")


def _check(upstream: Upstream) -> None:
    if upstream.role not in UpstreamRole.values:
        raise InvalidInputError(f"role: choose one of {', '.join(UpstreamRole.values)}", field="role")
    if upstream.max_tokens_field not in TokenLimitField.values:
        raise InvalidInputError(
            f"max_tokens_field: choose one of {', '.join(TokenLimitField.values)}", field="max_tokens_field"
        )
    for name, (least, most) in RANGES.items():
        value = getattr(upstream, name)
        if not least <= value <= most:
            raise InvalidInputError(f"{name}={value}: must be from {least} to {most}", field=name)
    if upstream.target is not None:
        _check_target(upstream, upstream.target)
        return
    if not upstream.model:
        raise InvalidInputError("model: say what the endpoint calls it", field="model")
    check_url(upstream.base_url)


def _check_target(upstream: Upstream, target: Deployment) -> None:
    """A deployment that is a shadow: charged to the project whose requests are copied, so it must be that project's."""
    field = "target_deployment_id"
    if upstream.role != UpstreamRole.SHADOW:
        raise InvalidInputError("role: another deployment can only be a shadow", field="role")
    if upstream.base_url or upstream.model:
        raise InvalidInputError(f"{field}: send it, or base_url and model, not both", field=field)
    if upstream.has_api_key or upstream.header_names:
        raise InvalidInputError(
            "api_key, headers: a deployment of your own is called without", field="api_key"
        )
    own = upstream.deployment
    if target.id == own.id:
        raise InvalidInputError(f"{field}: a deployment cannot be its own shadow", field=field)
    if (target.project_id, target.cell) != (own.project_id, own.cell):
        raise InvalidInputError(
            f"{field}: it must be of the same project and cell as the deployment that is copied", field=field
        )


def check_url(url: str) -> None:
    """Shape, and an address that stands in the URL itself. What its name leads to is judged at each connection."""
    try:
        to = outbound.target(url)
    except outbound.RefusedAddressError as error:
        raise InvalidInputError(f"base_url: {error}", field="base_url") from error
    if "?" in to.path or "#" in url:
        raise InvalidInputError("base_url: send it without a query, up to and with /v1", field="base_url")
    allowed = settings.ENV.outbound_allow
    try:
        reason = outbound.why_not(to.host, allowed)
    except ValueError:
        reason = None  # a name
    if to.host == "localhost" and not allowed:
        reason = "localhost is not a public address"
    if reason is not None:
        raise InvalidInputError(
            f"base_url: {reason}; an operator can allow it with CORRAL_OUTBOUND_ALLOW", field="base_url"
        )


def _check_sharing(upstream: Upstream) -> None:
    """Nobody's prompts go elsewhere for another's decision. Of whose requests a shadow gets copies gateways ask of each
    organization; without its owner's own leave it would get none of theirs."""
    if upstream.role == UpstreamRole.SHADOW:
        if not selectors.has_agreed(organization_id=upstream.organization_id):
            raise ConflictError(
                "requests are copied to a shadow where their organization agrees to that, and yours has not: agree "
                "first (PUT /api/v1/outside-consent)",
                field="role",
            )
        return
    grants = Grant.objects.filter(deployment_id=upstream.deployment_id).exclude(
        grantee_id=upstream.organization_id
    )
    grantees = set(grants.values_list("grantee_id", flat=True))
    if grantees and grantees - selectors.that_agreed(grantees):
        raise ConflictError(
            "this deployment is shared with an organization that has not agreed that its prompts go elsewhere: have "
            "them agree (PUT /api/v1/outside-consent), or take their leave back",
            field="deployment_id",
        )
