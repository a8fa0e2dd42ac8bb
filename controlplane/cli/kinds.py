"""The kinds of resource that `get` shows: their path, their columns, and by what people call one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from controlplane.cli.failures import Failure
from controlplane.cli.output import ago, money
from controlplane.cli.transport import Api

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """`called`: fields besides the id by which one is found. `single`: there is one only, without an id."""

    path: str
    columns: Mapping[str, str | Callable[[Row], Any]]
    called: tuple[str, ...] = ()
    single: bool = False
    paged: bool = True
    one: bool = True  # has a page of its own: GET path/id


def _key_state(row: Row) -> str:
    return "revoked" if row["revoked_at"] else "active"


def _percent(row: Row) -> str:
    return f"{row['progress']}%"


def _scale(row: Row) -> str:
    return f"{row['min_replicas']}-{row['max_replicas']}"


def _age(row: Row) -> str:
    return ago(row["created_at"])


KINDS: Final[Mapping[str, Kind]] = {
    "organization": Kind("/organization", {}, single=True),
    "projects": Kind(
        "/projects",
        {
            "ID": "id",
            "SLUG": "slug",
            "NAME": "name",
            "WEIGHT": "weight",
            "ZERO-RETENTION": "zero_retention",
            "AGE": _age,
        },
        called=("slug",),
    ),
    "members": Kind(
        "/members", {"ID": "id", "E-MAIL": "email", "NAME": "name", "ROLE": "role", "AGE": _age}, ("email",)
    ),
    "invitations": Kind(
        "/invitations",
        {"ID": "id", "E-MAIL": "email", "ROLE": "role", "STATUS": "status", "AGE": _age},
        ("email",),
    ),
    "service-accounts": Kind(
        "/service-accounts", {"ID": "id", "NAME": "name", "ROLE": "role", "AGE": _age}, ("name",)
    ),
    "keys": Kind(
        "/keys",
        {
            "ID": "id",
            "NAME": "name",
            "ENDS WITH": lambda row: f"…{row['last4']}",
            "STATE": _key_state,
            "RPM": lambda row: row["limits"]["rpm"],
            "EXPIRES": lambda row: ago(row["expires_at"]),
            "LAST USED": lambda row: ago(row["last_used_at"]),
            "AGE": _age,
        },
        called=("name",),
    ),
    "deployments": Kind(
        "/deployments",
        {
            "ID": "id",
            "NAME": "name",
            "PHASE": "phase",
            "REPLICAS": _scale,
            "CLASS": "slo_class",
            "PRICE": "price",
            "AGE": _age,
        },
        called=("name",),
    ),
    "model-versions": Kind(
        "/model-versions",
        {
            "ID": "id",
            "NAME": "name",
            "LICENCE": "licence",
            "LENGTH": "max_model_len",
            "SOURCE": "source_kind",
            "AGE": _age,
        },
        called=("name", "digest"),
    ),
    "adapters": Kind(
        "/adapters",
        {
            "ID": "id",
            "MODEL": "model",
            "STATE": "state",
            "RANK": "rank",
            "SIZE": lambda row: f"{row['size_bytes'] / 1e6:.1f} MB" if row["size_bytes"] else "",
            "WHY NOT": "not_served_because",
            "AGE": _age,
        },
        called=("model", "name"),
    ),
    "replicas": Kind(
        "/replicas",
        {
            "ID": "id",
            "PHASE": "phase",
            "RUNNING": lambda row: "?" if row["n_running"] is None else f"{row['n_running']}/{row['slots']}",
            "DEPLOYMENT": "deployment_id",
            "REASON": lambda row: row["reason_message"] or row["reason_code"],
            "AGE": _age,
        },
    ),
    "machines": Kind(
        "/machines",
        {
            "ID": "id",
            "STATE": "state",
            "PROVIDER": "provider",
            "OFFERING": "offering",
            "GPUS": "n_gpus",
            "MINE": "n_replicas",
            "AGE": _age,
        },
        paged=False,
    ),
    "decisions": Kind(
        "/decisions",
        {
            "ID": "id",
            "AGO": lambda row: ago(row["at"]),
            "ORDERS": lambda row: ", ".join(str(c.get("kind", "?")) for c in row["commands"]),
            "WHY": lambda row: "; ".join(row["reasons"]),
        },
    ),
    "operations": Kind(
        "/operations",
        {
            "ID": "id",
            "KIND": "kind",
            "SUBJECT": "subject",
            "STATE": "state",
            "DONE": _percent,
            "MESSAGE": "message",
            "AGE": _age,
        },
    ),
    "slo-classes": Kind(
        "/slo-classes",
        {
            "NAME": "name",
            "BAND": "band",
            "TTFT MS": "ttft_ms",
            "ITL MS": "itl_ms",
            "DEADLINE S": "deadline_s",
        },
        paged=False,
        one=False,
    ),
    "grants": Kind(
        "/grants",
        {"ID": "id", "NAME": "name", "TO": "grantee_id", "PROJECT": "project_id", "AGE": _age},
        one=False,
    ),
    "grants-held": Kind(
        "/grants-held", {"NAME": "name", "FROM": "owner_id", "PROJECT": "project_id", "AGE": _age}, one=False
    ),
    "budgets": Kind(
        "/budgets",
        {
            "ID": "id",
            "NAME": "name",
            "LIMIT": lambda row: money(row.get("limit_nano")),
            "SPENT": lambda row: money(row.get("spent_nano")),
            "PERIOD": "period",
            "HARD": "hard",
        },
        called=("name",),
    ),
    "slo-rules": Kind(
        "/slo-rules",
        {
            "ID": "id",
            "PROJECT": "project_id",
            "CLASS": "slo_class",
            "FOR": lambda row: row["key_id"] or row["deployment_id"] or "all of it",
            "TTFT MS": "ttft_ms",
            "ITL MS": "itl_ms",
        },
        one=False,
    ),
    "end-customer-limits": Kind(
        "/end-customer-limits",
        {
            "ID": "id",
            "PROJECT": "project_id",
            "CUSTOMER": lambda row: row["customer"] or "each without its own",
            "RPM": lambda row: row["limits"]["rpm"],
            "IN TPM": lambda row: row["limits"]["input_tpm"],
            "OUT TPM": lambda row: row["limits"]["output_tpm"],
            "AT ONCE": lambda row: row["limits"]["max_concurrency"],
            "BUDGET": lambda row: money(row["limits"]["budget_nano"]),
            "AGE": _age,
        },
        called=("customer",),
    ),
    "upstreams": Kind(
        "/upstreams",
        {
            "ID": "id",
            "NAME": "name",
            "ROLE": "role",
            "DEPLOYMENT": "deployment_id",
            "URL": "base_url",
            "MODEL": "model",
            "SLOTS": "slots",
            "ENABLED": "enabled",
            "AGE": _age,
        },
        called=("name",),
    ),
    "webhooks": Kind(
        "/webhooks",
        {
            "ID": "id",
            "URL": "url",
            "EVENTS": lambda row: ", ".join(row["events"]) or "all",
            "ENABLED": "enabled",
            "AGE": _age,
        },
        called=("url",),
    ),
    "quotas": Kind(
        "/quotas",
        {"KIND": "kind", "USED": "used", "LIMIT": "limit", "OWN": "own", "CEILING": "ceiling"},
        paged=False,
        one=False,
    ),
    "requests": Kind(
        "/requests",
        {
            "ID": "id",
            "AGO": lambda row: ago(row["admitted_at"]),
            "MODEL": "model",
            "STATUS": "status",
            "TOKENS": lambda row: f"{row['n_prompt_tokens']}→{row['n_completion_tokens']}",
            "TIME": lambda row: f"{row['duration_ms'] / 1000:.2f}s",
            "COST": lambda row: money(row["cost_nano"]),
        },
    ),
    "audit": Kind(
        "/audit",
        {
            "AGO": lambda row: ago(row["at"]),
            "ACTOR": "actor",
            "ACTION": "action",
            "KIND": "kind",
            "FIELDS": lambda row: ", ".join(row["changes"]),
        },
        one=False,
    ),
}
_SHORT: Final = {
    "org": "organization",
    "svc": "service-accounts",
    "models": "model-versions",
    "ops": "operations",
}


def kind_of(name: str) -> tuple[str, Kind]:
    """By its name, singular or plural. Raises Failure naming all."""
    word = _SHORT.get(name, name).lower()
    for candidate in (word, f"{word}s", f"{word}es"):
        if candidate in KINDS:
            return candidate, KINDS[candidate]
    raise Failure(f"there is no resource {name!r}; known: {', '.join(KINDS)}")


def find(api: Api, name: str, text: str, **params: Any) -> dict[str, Any]:
    """One thing by its id or by what people call it. Raises Failure for none, or for several of that name."""
    word, kind = kind_of(name)
    if kind.one and "_" in text and len(text) == 36:
        found: dict[str, Any] = api.get(f"{kind.path}/{text}")
        return found
    rows = [
        row
        for row in listed(api, kind, **params)
        if text in [row.get(field) for field in ("id", *kind.called)]
    ]
    if word == "keys":
        rows = [row for row in rows if not row["revoked_at"]] or rows
    if not rows:
        raise Failure(f"there is no {word.removesuffix('s')} {text!r}")
    if len(rows) > 1 and word != "model-versions":  # of those the newest is meant
        raise Failure(
            f"{text!r} is the name of {len(rows)} {word}: give the id ({', '.join(row['id'] for row in rows[:5])})"
        )
    return rows[0]


def listed(api: Api, kind: Kind, limit: int | None = None, **params: Any) -> list[dict[str, Any]]:
    """Rows, newest first."""
    if kind.paged:
        return list(api.pages(kind.path, limit=limit, **params))
    return list(api.get(kind.path, **params)["data"])[:limit]
