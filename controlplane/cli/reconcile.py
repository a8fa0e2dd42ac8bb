"""Which steps make the organization look as the documents say: one maker for each kind. Changes nothing.

Only what a document names is compared: what it leaves out stays. Kinds that lead out of the house, promises and quotas
are in outward.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Final

from controlplane.cli import outward
from controlplane.cli.documents import Document, walk
from controlplane.cli.steps import (
    Call,
    Present,
    Step,
    covers,
    given,
    limits,
    limits_in,
    nano,
    patch,
    project_id,
    same,
    settled,
)
from controlplane.cli.transport import Api

# What is needed comes before what needs it.
ORDER: Final = (
    "Organization",
    "Project",
    "ServiceAccount",
    "Member",
    "Deployment",
    "Key",
    "Limits",
    "Budget",
    "SloRule",
    "EndCustomerLimits",
    "Quota",
    "Webhook",
    "Upstream",
)
# Fields of the API whose name in a file is another: where an error about them is shown.
_IN_FILE: Final = {
    "model_version_id": "spec.model",
    "project_id": "project",
    "slug": "name",
    "key_id": "spec.key",
}


def steps(api: Api, documents: list[Document], *, prune: bool = False, renew: bool = False) -> list[Step]:
    """In the order in which they are done. Raises Failure naming file and line."""
    present = Present(api, renew=renew)
    present.coming = {
        (each.kind, each.heads["project"], each.heads["name"])
        for each in documents
        if each.kind in ("Key", "Deployment")
    }
    named = {each.heads["name"] for each in documents if each.kind == "Project"}
    found = []
    for document in walk(sorted(documents, key=outward.is_default), *ORDER):
        if "project" in document.heads and not (
            document.heads["project"] in named or present.project(document.heads["project"])
        ):
            raise document.wrong("project", f"there is no project {document.heads['project']!r}")
        found.append(_MAKERS[document.kind](present, document))
    if prune:
        found += _pruned(present, documents)
    return found


def field_in_file(call: Call, name: str) -> str:
    """Where in its document a field of the call's body stands."""
    head = name.split(".")[0]
    if head in call.in_file:
        return call.in_file[head]
    return _IN_FILE.get(head, name if name in ("name", "email") else f"{call.under}.{name}")


def _organization(present: Present, document: Document) -> Step:
    row, spec = present.organization, document.spec
    step = Step(f"organization {row['slug']}", "update", document)
    step.calls += patch(document, "/organization", row, ("name", "timezone", "weight"))
    step.calls += limits(document, "/organization/limits", row, spec)
    return settled(step)


def _project(present: Present, document: Document) -> Step:
    name, spec = document.heads["name"], document.spec
    row = present.project(name)
    values = {"name": spec.get("title", name), **given(spec, "weight", "zero_retention")}
    if row is None:
        body = {**values, "slug": name, **limits_in(document, spec)}
        call = Call("POST", lambda: "/projects", lambda: body, keeps=present.remember("projects"))
        return Step(document.title, "create", document, [call])
    if "title" not in spec:
        del values["name"]
    step = Step(document.title, "update", document)
    step.calls += patch(document, f"/projects/{row['id']}", row, (), values)
    step.calls += limits(document, f"/projects/{row['id']}/limits", row, spec)
    return settled(step)


def _service_account(present: Present, document: Document) -> Step:
    row = present.one("service-accounts", name=document.heads["name"])
    if row is None:
        body = {**document.heads, **document.spec}
        return Step(
            document.title, "create", document, [Call("POST", lambda: "/service-accounts", lambda: body)]
        )
    if row["role"] != document.spec["role"]:
        raise document.wrong("spec.role", f"it is {row['role']}; an account keeps its role: make another one")
    return settled(Step(document.title, "update", document))


def _member(present: Present, document: Document) -> Step:
    email, role = document.heads["email"].lower(), document.spec["role"]
    row = present.one("members", email=email)
    if row is not None:
        step = Step(document.title, "update", document)
        step.calls += patch(document, f"/members/{row['id']}", row, ("role",))
        return settled(step)
    waiting = present.one("invitations", email=email, status="open")
    if waiting is not None and waiting["role"] == role:
        return Step(document.title, "same", document, note="was invited")
    body = {"email": email, "role": role}
    return Step(
        document.title, "create", document, [Call("POST", lambda: "/invitations", lambda: body)], "is invited"
    )


def _key(present: Present, document: Document) -> Step:
    name, spec = document.heads["name"], document.spec
    project = present.project(document.heads["project"])
    row = present.key(project["id"], name) if project else None
    values = given(spec, "weight", "scopes", "aliases", "tags", "expires_at")
    if row is None:
        call = Call(
            "POST",
            lambda: "/keys",
            lambda: {
                "name": name,
                "project_id": project_id(present, document),
                **values,
                **limits_in(document, spec),
            },
            waits=project is None,
            keeps=present.remember("keys"),
        )
        return Step(document.title, "create", document, [call])
    path = f"/keys/{row['id']}"
    step = Step(document.title, "update", document)
    step.calls += patch(document, path, row, ("aliases", "tags"))
    if "scopes" in spec and not covers(row.get("scopes") or {}, spec["scopes"]):
        scopes = spec["scopes"]
        step.calls.append(Call("PUT", lambda: f"{path}/scopes", lambda: scopes, under="spec.scopes"))
    step.calls += limits(document, f"{path}/limits", row, spec)
    for fixed in ("weight", "expires_at"):
        if fixed in spec and not same(row.get(fixed), spec[fixed]):
            raise document.wrong(
                f"spec.{fixed}", f"it is {row.get(fixed)}, and a key keeps it: rotate or make another"
            )
    return settled(step)


def _deployment(present: Present, document: Document) -> Step:
    name, spec = document.heads["name"], document.spec
    project = present.project(document.heads["project"])
    row = present.one("deployments", project_id=project["id"], name=name) if project else None
    values = {key: value for key, value in spec.items() if key != "model"}
    values["model_version_id"] = _model(present, document)
    if row is None:
        call = Call(
            "POST",
            lambda: "/deployments",
            lambda: {"name": name, "project_id": project_id(present, document), **values},
            waits=project is None,
            keeps=present.remember("deployments"),
        )
        return Step(document.title, "create", document, [call])
    step = Step(document.title, "update", document)
    step.calls += patch(document, f"/deployments/{row['id']}", row, (), values)
    return settled(step)


def _limits_document(present: Present, document: Document) -> Step:
    spec = document.spec
    if "key" in spec:
        slug = spec.get("project")
        project = present.project(str(slug)) if slug else None
        found = [
            row
            for row in present.rows("keys")
            if spec["key"] in (row["id"], row["name"])
            and not row["revoked_at"]
            and (project is None or row["project_id"] == project["id"])
        ]
        if len(found) != 1:
            raise document.wrong(
                "spec.key", f"{len(found)} keys are called {spec['key']!r}: name the project too"
            )
        return settled(
            Step(
                f"limits of key {found[0]['name']}",
                "update",
                document,
                limits(document, f"/keys/{found[0]['id']}/limits", found[0], spec),
            )
        )
    if "project" in spec:
        row = present.project(str(spec["project"]))
        if row is None:
            raise document.wrong("spec.project", f"there is no project {spec['project']!r}")
        calls = limits(document, f"/projects/{row['id']}/limits", row, spec)
        return settled(Step(f"limits of project {row['slug']}", "update", document, calls))
    row = present.organization
    calls = limits(document, "/organization/limits", row, spec)
    return settled(Step(f"limits of organization {row['slug']}", "update", document, calls))


def _budget(present: Present, document: Document) -> Step:
    name, spec = document.heads["name"], dict(document.spec)
    if "limit_usd" in spec:
        spec["limit_nano"] = nano(document, "spec.limit_usd", spec.pop("limit_usd"))
    for needed in ("limit_nano", "period"):
        if needed not in spec:
            raise document.wrong("spec", f"Budget needs {needed}")
    project = present.project(str(spec["project"])) if "project" in spec else None
    if "project" in spec and project is None:
        raise document.wrong("spec.project", f"there is no project {spec['project']!r}; apply it first")
    subject = {"project_id": project["id"] if project else None, "key_id": spec.get("key")}
    row = present.one("budgets", name=name, **subject)
    values = {key: value for key, value in spec.items() if key not in ("project", "key")}
    if row is None:
        body = {"name": name, **{k: v for k, v in subject.items() if v}, **values}
        return Step(document.title, "create", document, [Call("POST", lambda: "/budgets", lambda: body)])
    if row["period"] != spec["period"]:
        raise document.wrong("spec.period", f"it is {row['period']}, and a budget keeps it: make another")
    for fixed in ("period", "rolling_hours", "model"):
        values.pop(fixed, None)
    step = Step(document.title, "update", document)
    step.calls += patch(document, f"/budgets/{row['id']}", row, (), values)
    return settled(step)


_MAKERS: Final[Mapping[str, Callable[[Present, Document], Step]]] = {
    "Organization": _organization,
    "Project": _project,
    "ServiceAccount": _service_account,
    "Member": _member,
    "Deployment": _deployment,
    "Key": _key,
    "Limits": _limits_document,
    "Budget": _budget,
    **outward.MAKERS,
}


def _pruned(present: Present, documents: list[Document]) -> Iterator[Step]:
    """Keys and deployments of the projects that the documents name, which no document names."""
    slugs = {
        each.heads.get("project") or each.heads.get("name", "")
        for each in documents
        if each.kind in _OF_PROJECT
    }
    for kind, word in (("deployments", "Deployment"), ("keys", "Key")):
        kept = {(each.heads["project"], each.heads["name"]) for each in documents if each.kind == word}
        for slug in sorted(slugs):
            project = present.project(slug)
            for row in present.rows(kind) if project else ():
                if project and row["project_id"] == project["id"] and (slug, row["name"]) not in kept:
                    if row.get("revoked_at"):
                        continue
                    path = f"/{kind}/{row['id']}"
                    call = Call("DELETE", lambda path=path: path, lambda: None)  # type: ignore[misc]
                    yield Step(f"{word.lower()} {row['name']} ({slug})", "delete", None, [call])


_OF_PROJECT: Final = frozenset({"Project", "Deployment", "Key"})


def _model(present: Present, document: Document) -> str:
    """Id of the newest version of that name that is not retired, or of the one with that id or digest."""
    wanted = document.spec["model"]
    versions = present.rows("model-versions")
    for row in versions:
        if wanted in (row["id"], row["digest"]) or (wanted == row["name"] and not row["retired_at"]):
            return str(row["id"])
    known = ", ".join(sorted({row["name"] for row in versions if not row["retired_at"]})) or "none"
    raise document.wrong("spec.model", f"there is no model version {wanted!r}; known: {known}")
