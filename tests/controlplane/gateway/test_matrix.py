"""Who gets what from /v1: every route with every kind of caller, on a real Postgres and Redis. A new route without a
row fails.

One world for all rows: Acme's owner has had an answer with a secret in it; nobody else may learn that it exists. A
stranger has a deployment of the same name and sends the same idempotency key, body and ids.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from asgiref.sync import sync_to_async

import controlplane.gateway
from controlplane.gateway import app as surface
from controlplane.gateway.directory import PgDirectory
from controlplane.tenants import key_services, services
from controlplane.tenants import service_accounts as accounts
from controlplane.tenants.models import Role
from tests.controlplane.gateway.harness import KEYS, Job, Machine, _now_ms, running
from tests.database import acting_as
from tests.world import World, build_world, make_adapter, make_deployment, make_version
from workers import scripts

pytestmark = pytest.mark.django_db(transaction=True)

MODEL = "acme-secret-model"
WORDS = "the-answer-is-secret"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a-secret-prompt"}]}
SHARED = {**CHAT, "model": f"acme/{MODEL}"}
ASKED = {"model": MODEL, "input": "a-secret-prompt"}
TEXT = {"model": MODEL, "prompt": "a-secret-prompt"}


TEAMMATE, STRANGER, PARTNER, SUSPENDED = "teammate", "stranger", "partner", "suspended"


@dataclass(frozen=True)
class Row:
    """One way to call a route. Expected statuses: owner, a key of Acme's other project, a stranger's key; a suspended
    organization's key gets 403 and everybody unknown 401, unless the route is open to all."""

    method: str
    path: str
    owner: int
    teammate: int
    stranger: int
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    partner: int = 404  # of a tenant that may call Acme's deployment
    is_open: bool = False


AGAIN = {"idempotency-key": "again"}
SAME_EVENT = {"last-event-id": "{request}.1"}
ROWS: dict[str, tuple[Row, ...]] = {
    "/v1/chat/completions": (
        Row("POST", "/v1/chat/completions", 200, 404, 200, CHAT),
        Row("POST", "/v1/chat/completions", 200, 404, 200, CHAT, AGAIN),
        Row("POST", "/v1/chat/completions", 200, 404, 404, {**CHAT, "stream": True}, SAME_EVENT),
        Row(
            "POST",
            "/v1/chat/completions",
            404,
            404,
            404,
            {**CHAT, "model": "acme/" + MODEL, "stream": True},
            SAME_EVENT,
        ),
        Row("POST", "/v1/chat/completions", 404, 404, 404, SHARED, partner=200),
        Row("POST", "/v1/chat/completions", 200, 404, 404, {**CHAT, "model": f"{MODEL}:formal"}),
        Row("POST", "/v1/chat/completions", 404, 404, 404, {**CHAT, "model": f"acme/{MODEL}:formal"}),
    ),
    "/v1/completions": (
        Row("POST", "/v1/completions", 200, 404, 200, TEXT),
        Row("POST", "/v1/completions", 200, 404, 404, {**TEXT, "model": f"{MODEL}:formal"}),
        Row("POST", "/v1/completions", 404, 404, 404, {**TEXT, "model": "acme/" + MODEL}, partner=200),
    ),
    "/v1/messages": (
        Row("POST", "/v1/messages", 200, 404, 200, {**CHAT, "max_tokens": 4}),
        Row(
            "POST",
            "/v1/messages",
            404,
            404,
            404,
            {**CHAT, "max_tokens": 4, "model": "acme/" + MODEL},
            partner=200,
        ),
    ),
    "/v1/messages/count_tokens": (
        Row("POST", "/v1/messages/count_tokens", 200, 404, 200, CHAT),
        Row(
            "POST",
            "/v1/messages/count_tokens",
            404,
            404,
            404,
            {**CHAT, "model": "acme/" + MODEL},
            partner=200,
        ),
    ),
    "/v1/responses": (
        Row("POST", "/v1/responses", 200, 404, 200, ASKED),
        Row("POST", "/v1/responses", 409, 404, 404, {**ASKED, "stream": True}, SAME_EVENT),
        Row("POST", "/v1/responses", 404, 404, 404, {**ASKED, "model": "acme/" + MODEL}, partner=200),
    ),
    "/v1/models": (
        Row("GET", "/v1/models", 200, 200, 200, partner=200),
        Row("HEAD", "/v1/models", 200, 200, 200, partner=200),
    ),
    "/v1/models/": (
        Row("GET", f"/v1/models/{MODEL}", 200, 404, 200),
        Row("GET", f"/v1/models/{MODEL}:formal", 200, 404, 404),
        Row("GET", f"/v1/models/acme/{MODEL}", 404, 404, 404, partner=200),
        Row("GET", "/v1/models/{deployment}", 404, 404, 404),
    ),
    r"/v1/requests/([^/]+)/events\Z": (
        Row("GET", "/v1/requests/req_{request}/events", 200, 404, 404),
        Row("GET", "/v1/requests/req_{request}/events", 200, 404, 404, headers=SAME_EVENT),
        Row("GET", "/v1/requests/req_" + "0" * 32 + "/events", 404, 404, 404),
    ),
    "/healthz": (Row("GET", "/healthz", 200, 200, 200, partner=200, is_open=True),),
    "/readyz": (Row("GET", "/readyz", 200, 200, 200, partner=200, is_open=True),),
    "/metrics": (Row("GET", "/metrics", 200, 200, 200, partner=200, is_open=True),),
}


def routes() -> set[str]:
    """Every path that the gateway's code names, as it is written there."""
    found: set[str] = set()
    for file in Path(controlplane.gateway.__file__).parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        docs = {
            id(n.value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }
        found |= {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docs
            and re.match(r"/(?!api/)[a-z]", node.value)  # /api is another process's: links to it
        }
    return found


class Directory(PgDirectory):
    """The real one, in the harness's place for its own."""

    def add_key(self) -> str:
        return ""


class Served(Machine):
    """Acme's and the stranger's replicas; each answers with its owner's words."""

    def __init__(self, url: str, name: str, deployment: str, words: str) -> None:
        super().__init__(url, f"m-{name}", f"r-{name}")
        self._deployment, self._words = deployment, words
        self.behaviour = self._answer

    async def enrol(self, slots: int = 4) -> None:
        await self.redis.evalsha(
            scripts.ENROL.sha,
            0,
            KEYS.prefix,
            _now_ms(),
            self.replica,
            self.machine_id,
            self._deployment,
            slots,
        )

    async def _answer(self, job: Job) -> None:
        await job.emit(self._words)
        await job.emit(" indeed")
        await job.finish()


@dataclass
class Callers:
    """Header sets by kind of caller, and what nobody but the owner may see."""

    owner: dict[str, str]
    teammate: dict[str, str]
    stranger: dict[str, str]
    partner: dict[str, str]
    suspended: dict[str, str]
    nobody: dict[str, dict[str, str]]
    deployment: str
    strangers_deployment: str
    secrets: list[str]


@sync_to_async
def make_callers(world: World) -> Callers:
    acme, other = world.organization.id, world.other_organization.id
    ours = make_deployment(world, MODEL, engine_profile={"engine": "toy", "max_loras": 2})
    adapter = make_adapter(ours, "formal")
    from controlplane.deployments import services as deployments
    from controlplane.deployments import sharing

    theirs = deployments.create_deployment(
        organization_id=other,
        project_id=world.other_project.id,
        name=MODEL,
        model_version_id=make_version(other).id,
        engine_profile={"engine": "toy"},
    )
    aside = services.create_project(organization_id=acme, name="Aside", slug="aside")
    closed = services.create_organization(name="Closed", slug="closed", owner=world.charlie)
    closed_project = services.create_project(organization_id=closed.id, name="Main", slug="main")

    def key(organization_id: Any, project_id: Any) -> tuple[Any, str]:
        return key_services.create_api_key(organization_id=organization_id, project_id=project_id, name="k")

    own, owner = key(acme, world.project.id)
    _, teammate = key(acme, aside.id)
    _, stranger = key(other, world.other_project.id)
    friend = services.create_organization(name="Friend", slug="friend", owner=world.charlie)
    friend_project = services.create_project(organization_id=friend.id, name="Main", slug="main")
    with acting_as("corral_operator"):
        sharing.grant(organization_id=acme, deployment_id=ours.id, grantee_id=friend.id)
    _, partner = key(friend.id, friend_project.id)
    _, suspended = key(closed.id, closed_project.id)
    gone, revoked = key(acme, world.project.id)
    key_services.revoke_api_key(organization_id=acme, key_id=gone.id)
    services.suspend_organization(organization_id=closed.id, suspended=True)
    account = accounts.create_service_account(organization_id=acme, name="robot", role=Role.OWNER)
    _, token = accounts.create_token(organization_id=acme, account_id=account.id, name="t")

    def bearer(text: str) -> dict[str, str]:
        return {"authorization": f"Bearer {text}"}

    return Callers(
        owner=bearer(owner),
        teammate=bearer(teammate),
        stranger=bearer(stranger),
        partner=bearer(partner),
        suspended=bearer(suspended),
        nobody={
            "anonymous": {},
            "revoked": bearer(revoked),
            "management token": bearer(token),
            "of no kind": bearer("sk-something"),
            "another secret": bearer(owner[:-4] + "AAAA"),
            "as a header": {"x-api-key": owner[:-4] + "AAAA"},
        },
        deployment=ours.id.hex,
        strangers_deployment=theirs.id.hex,
        secrets=[
            WORDS,
            adapter.id.hex,
            ours.id.hex,
            acme.hex,
            world.project.id.hex,
            own.id.hex,
            own.lookup,
            "r-acme",
            "m-acme",
        ],
    )


@asynccontextmanager
async def machines(url: str, callers: Callers) -> AsyncIterator[None]:
    found = [
        Served(url, "acme", callers.deployment, WORDS),
        Served(url, "other", callers.strangers_deployment, "words of their own"),
    ]
    for machine in found:
        await machine.start()
    try:
        yield
    finally:
        for machine in found:
            await machine.stop()


async def test_every_route_with_every_caller(transactional_db: None, pg_server: Any, redis_url: str) -> None:
    world = await sync_to_async(build_world)()
    callers = await make_callers(world)
    directory = Directory(pg_server.dsn("app"), cell="c0")
    await directory.open()
    pepper = bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"])
    try:
        async with (
            running(redis_url, directory, key_pepper=pepper) as gw,  # type: ignore[arg-type]
            machines(redis_url, callers),
        ):
            told = await _walk(gw.http, callers)
    finally:
        await directory.close()
    n_callers = 5 + len(callers.nobody)
    assert [len(answers) for answers in told.values()] == [n_callers * len(rows) for rows in ROWS.values()]
    for answers in told.values():
        assert all(status == expected for status, expected in answers)


async def _walk(http: httpx.AsyncClient, callers: Callers) -> dict[str, list[tuple[int, int]]]:
    """Asks every row as everybody; (status, expected) of each, by route. Looks for what they may not see."""
    first = await http.post(
        "/v1/chat/completions",
        json={**CHAT, "stream": True},
        headers={**callers.owner, **AGAIN, "idempotency-key": "1st"},
    )
    assert WORDS in first.text
    known = {"request": first.headers["x-request-id"].removeprefix("req_"), "deployment": callers.deployment}
    await http.post("/v1/chat/completions", json=CHAT, headers={**callers.owner, **AGAIN})
    secrets = [*callers.secrets, known["request"]]

    async def answer(row: Row, who: dict[str, str]) -> tuple[int, str]:
        headers = {k: v.format_map(known) for k, v in row.headers.items()}
        path = row.path.format_map(known)
        found = await http.request(row.method, path, json=row.body, headers={**who, **headers})
        text = (found.text + repr(found.headers.raw)).replace(path, "")
        return found.status_code, text.replace(path.rpartition("/")[2], "")  # a name that was asked for

    told: dict[str, list[tuple[int, int]]] = {}
    for route, rows in ROWS.items():
        answers = told[route] = []
        for row in rows:
            what = (route, row.method, row.path, row.headers)
            status, text = await answer(row, callers.owner)
            assert status == row.owner, (*what, text)
            answers.append((status, row.owner))
            for name, who, expected in (
                (TEAMMATE, callers.teammate, row.teammate),
                (STRANGER, callers.stranger, row.stranger),
                (PARTNER, callers.partner, row.partner),
                (SUSPENDED, callers.suspended, 200 if row.is_open else 403),
                *((name, who, 200 if row.is_open else 401) for name, who in callers.nobody.items()),
            ):
                status, text = await answer(row, who)
                assert status == expected, (*what, name, text)
                answers.append((status, expected))
                is_own = (
                    name == PARTNER and status == 200 and row.method == "POST"
                )  # the same replica, the same words
                for secret in secrets[is_own:]:
                    assert secret not in text, (*what, name, secret)
                if expected == 403:
                    assert row.method == "HEAD" or "organization_suspended" in text, what
                if status == 404 and "events" in route:
                    assert "request_not_found" in text, what
                if name == TEAMMATE and route == "/v1/models":
                    assert MODEL not in text, (*what, name)
    return told


async def test_preflights_and_wrong_methods_tell_nothing(
    transactional_db: None, pg_server: Any, redis_url: str
) -> None:
    async with running(redis_url) as gw:
        for rows in ROWS.values():
            path = rows[0].path.format(request="0" * 32, deployment="0" * 32)
            for method in ("OPTIONS", "DELETE", "PUT"):
                found = await gw.http.request(method, path, headers={"origin": "http://elsewhere.test"})
                assert found.status_code == (204 if method == "OPTIONS" else 405), (method, path)
                assert "access-control-allow-origin" not in found.headers


def test_every_route_has_a_row() -> None:
    assert routes() == ROWS.keys()
    assert surface._GENERATE.keys() | {surface._MODEL_PREFIX, surface._EVENTS.pattern} <= ROWS.keys()
