"""`corral apply`: what leads out of the house (upstreams, webhooks), what is promised (SLO rules), quotas, and
limits on end customers.

As reconcile.py, which calls the makers here: reads the API, changes nothing. Files hold no secrets: an upstream's key
and headers come from variables of the environment that the file names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, Final

from controlplane.cli.documents import Document
from controlplane.cli.steps import (
    LIMIT_NAMES,
    Call,
    Present,
    Step,
    limits_in,
    nano,
    patch,
    project_id,
    settled,
)

_RATES: Final = ("input", "cached", "output")
_PLACES: Final = {
    "project_id": "project",
    "slo_class": "class",
    "key_id": "spec.key",
    "deployment_id": "spec.deployment",
    "deployment": "spec.deployment",
    "target_deployment_id": "spec.target",
    "api_key": "spec.api_key_env",
    "headers": "spec.headers_env",
    "url": "url",
}
_KIND: Final = {"target": "deployment"}  # what a word names, where it is not its own


def is_default(document: Document) -> bool:
    """Rules that become the default come after those that cease to be."""
    return document.kind == "SloRule" and document.spec.get("is_default") is True


def _slo_rule(present: Present, document: Document) -> Step:
    spec, slo_class = document.spec, document.heads["class"]
    project = present.project(document.heads["project"])
    key, waits_for_key = _named(present, document, "key", project)
    deployment, waits_for_deployment = _named(present, document, "deployment", project)
    values = {name: value for name, value in spec.items() if name not in ("key", "deployment")}
    row = None
    if project and not (waits_for_key or waits_for_deployment):
        place = {"project_id": project["id"], "key_id": key, "deployment_id": deployment}
        row = present.one("slo-rules", slo_class=slo_class, **place)
    else:
        place = {"project_id": None, "key_id": key, "deployment_id": deployment}
    spot = tuple(place.values())
    if row is None:
        call = Call(
            "POST",
            lambda: "/slo-rules",
            lambda: {
                "project_id": project_id(present, document),
                "slo_class": slo_class,
                "key_id": _id(present, document, "key"),
                "deployment_id": _id(present, document, "deployment"),
                **values,
            },
            waits=project is None or waits_for_key or waits_for_deployment or spot in present.released,
            in_file=_PLACES,
        )
        return Step(document.title, "create", document, [call])
    if row["is_default"] and spec.get("is_default") is False:
        present.released.add(spot)
    step = Step(document.title, "update", document)
    calls = patch(document, f"/slo-rules/{row['id']}", row, (), values, _PLACES)
    if spec.get("is_default") and spot in present.released:
        calls = [Call(c.method, c.path, c.body, waits=True, in_file=_PLACES) for c in calls]
    step.calls += calls
    return settled(step)


def _end_customer_limits(present: Present, document: Document) -> Step:
    spec = document.spec
    whom = {name: spec[name] for name in ("end_customer", "customer") if spec.get(name) is not None}
    if len(whom) > 1:
        raise document.wrong(
            "spec.customer",
            "is the pseudonym of an end_customer: give one of the two, or none for each customer",
        )
    for name, value in whom.items():
        if not isinstance(value, str) or not value.strip():
            raise document.wrong(
                f"spec.{name}", "must be a text: in quotes, if it is a number; leave it out for each customer"
            )
    wanted = limits_in(document, spec)["limits"]
    project = present.project(document.heads["project"])
    row = None
    if project is not None and "end_customer" in whom:
        row = next(present.found("end-customer-limits", project_id=project["id"], **whom), None)
    elif project is not None:
        of_it = {"project_id": project["id"], "customer": whom.get("customer", "")}
        row = present.one("end-customer-limits", **of_it)
    if row is not None and all(row["limits"].get(name) == wanted.get(name) for name in LIMIT_NAMES):
        return Step(document.title, "same", document)
    places = {name: f"spec.{name}" for name in whom}
    call = Call(
        "PUT",
        lambda: f"/projects/{project_id(present, document)}/end-customer-limits",
        lambda: {**whom, **wanted},
        waits=project is None,
        under="spec.limits",
        in_file=places,
    )
    return Step(document.title, "create" if row is None else "update", document, [call])


def _quota(present: Present, document: Document) -> Step:
    name, spec = document.heads["name"], document.spec
    row = present.one("quotas", kind=name)
    if row is None:
        known = ", ".join(each["kind"] for each in present.rows("quotas"))
        raise document.wrong("name", f"there is no quota {name!r}; known: {known}")
    if len(spec) != 1:
        raise document.wrong(
            "spec", "give limit, or of spend_rate limit_usd_per_h; null: only the house's ceiling"
        )
    if "limit_usd_per_h" in spec and name != "spend_rate":
        raise document.wrong("spec.limit_usd_per_h", f"{name} is no amount of money: give limit")
    if "limit_usd_per_h" in spec:
        limit = nano(document, "spec.limit_usd_per_h", spec["limit_usd_per_h"])
    else:
        limit = spec["limit"]
    path = f"/quotas/{name}"
    step = Step(document.title, "update", document)
    if limit is None and row["own"] is not None:
        step.calls.append(Call("DELETE", lambda: path, lambda: None))
    elif limit is not None and (limit != row["own"] or isinstance(limit, bool)):
        place = {"limit": f"spec.{next(iter(spec))}"}
        step.calls.append(Call("PUT", lambda: path, lambda: {"limit": limit}, in_file=place))
    return settled(step)


def _webhook(present: Present, document: Document) -> Step:
    url, spec = document.heads["url"], dict(document.spec)
    found = [row for row in present.rows("webhooks") if row["url"] == url]
    if len(found) > 1:
        ids = ", ".join(row["id"] for row in found[:5])
        raise document.wrong("url", f"{len(found)} webhooks have this address ({ids}): delete all but one")
    if isinstance(spec.get("events"), list):
        spec["events"] = sorted(spec["events"], key=str)  # as the API has them: their order says nothing
    if found:
        step = Step(document.title, "update", document)
        step.calls += patch(document, f"/webhooks/{found[0]['id']}", found[0], (), spec, _PLACES)
        return settled(step)
    body = {"url": url, **{name: value for name, value in spec.items() if name != "enabled"}}
    step = Step(document.title, "create", document)
    step.calls.append(
        Call("POST", lambda: "/webhooks", lambda: body, keeps=present.remember("webhooks"), in_file=_PLACES)
    )
    if spec.get("enabled", True) is not True:

        def path() -> str:
            made = present.one("webhooks", url=url)
            return f"/webhooks/{made['id'] if made else ''}"

        change = {"enabled": spec["enabled"]}
        step.calls.append(Call("PATCH", path, lambda: change, waits=True, in_file=_PLACES))
    return step


def _upstream(present: Present, document: Document) -> Step:
    name, spec = document.heads["name"], document.spec
    project = present.project(document.heads["project"])
    deployment, waits = _named(present, document, "deployment", project)
    target, target_waits = _named(present, document, "target", project)
    row = present.one("upstreams", name=name)
    secrets = _secrets(present, document, row)
    values = {
        key: value
        for key, value in spec.items()
        if key not in ("deployment", "target", "api_key_env", "headers_env")
        and not key.endswith("_usd_per_million")
    }
    places = dict(_PLACES)
    for rate in _RATES:
        dollars = f"{rate}_usd_per_million"
        if dollars in spec:
            places[f"{rate}_nano_per_million"] = f"spec.{dollars}"
            values[f"{rate}_nano_per_million"] = nano(document, f"spec.{dollars}", spec[dollars])
    if row is None:
        call = Call(
            "POST",
            lambda: "/upstreams",
            lambda: {
                "name": name,
                "deployment_id": _id(present, document, "deployment"),
                "target_deployment_id": _id(present, document, "target"),
                **values,
                **secrets,
            },
            waits=waits or target_waits or project is None,
            in_file=places,
        )
        return Step(document.title, "create", document, [call])
    if row["deployment_id"] != deployment:
        raise document.wrong(
            "spec.deployment",
            f"{name} serves another one, and keeps it: delete it first, or take another name",
        )
    if row["target_deployment_id"] != target or target_waits:
        raise document.wrong(
            "spec.target",
            f"{name} has another one, or none, and keeps it: delete it first, or take another name",
        )
    step = Step(document.title, "update", document)
    change = {key: value for key, value in values.items() if value is not None}
    step.calls += patch(document, f"/upstreams/{row['id']}", row, (), {**change, **secrets}, places)
    return settled(step)


def _secrets(present: Present, document: Document, row: Mapping[str, Any] | None) -> dict[str, Any]:
    """Key and headers where they have to be sent: nobody can see whether those that are there are the same."""
    spec, found = document.spec, dict[str, Any]()
    if "api_key_env" in spec:
        wanted = spec["api_key_env"]
        has = bool(row and row["has_api_key"])
        if wanted and (not has or present.renew):
            found["api_key"] = _variable(document, "spec.api_key_env", wanted)
        elif not wanted and has:
            found["api_key"] = ""
    if "headers_env" in spec:
        names = spec["headers_env"] or {}
        if not isinstance(names, dict):
            raise document.wrong(
                "spec.headers_env", "must hold fields: a header and the variable with its value"
            )
        if sorted(names) != (row["header_names"] if row else []) or (names and present.renew):
            found["headers"] = {
                header: _variable(document, f"spec.headers_env.{header}", name)
                for header, name in names.items()
            }
    return found


def _variable(document: Document, path: str, name: Any) -> str:
    value = os.environ.get(name) if isinstance(name, str) else None
    if value is None:
        raise document.wrong(
            path, f"there is no variable {name!r} in the environment: export it, then apply again"
        )
    return value


def _named(
    present: Present, document: Document, word: str, project: Mapping[str, Any] | None
) -> tuple[str | None, bool]:
    """Id of what `spec.<word>` names in the project; or whether an earlier step makes it first."""
    name = document.spec.get(word)
    if name is None:
        return None, False
    row = _row(present, word, str(name), project)
    if row is None and not present.is_to_come(_KIND.get(word, word), document.heads["project"], str(name)):
        raise document.wrong(f"spec.{word}", f"there is no {word} {name!r} in {document.heads['project']}")
    return (None, True) if row is None else (str(row["id"]), False)


def _id(present: Present, document: Document, word: str) -> str | None:
    """The same when it is called, after what comes before."""
    name = document.spec.get(word)
    if name is None:
        return None
    row = _row(present, word, str(name), present.project(document.heads["project"]))
    if row is None:
        raise document.wrong(f"spec.{word}", f"there is no {word} {name!r} in {document.heads['project']}")
    return str(row["id"])


def _row(present: Present, word: str, name: str, project: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if project is None:
        return None
    if word == "key":
        return present.key(project["id"], name)
    return present.deployment(project["id"], name)


MAKERS: Final[Mapping[str, Callable[[Present, Document], Step]]] = {
    "SloRule": _slo_rule,
    "EndCustomerLimits": _end_customer_limits,
    "Quota": _quota,
    "Webhook": _webhook,
    "Upstream": _upstream,
}
