"""The generated client against the real API: made, imported, typed, driven, as a program would."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Coroutine, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from controlplane.api.app import api as rest
from controlplane.api.client import transport
from controlplane.api.client.generate import generate
from tests.controlplane.api.caller import Api
from tests.world import World

URL = "http://127.0.0.1"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("client")
    generate(json.loads(json.dumps(rest.get_openapi_schema(), default=str)), to)
    return to


@pytest.fixture(scope="session")
def client(folder: Path) -> Iterator[ModuleType]:
    sys.path.insert(0, str(folder))
    yield importlib.import_module("corral_client")
    sys.path.remove(str(folder))


@pytest.fixture
def wire(api: Api) -> Any:
    """What an httpx client is given to speak to the web process without a socket."""

    def answer(request: httpx.Request) -> httpx.Response:
        response = api.client.generic(
            request.method,
            request.url.raw_path.decode(),
            request.content,
            content_type=request.headers.get("Content-Type", ""),
            headers=dict(request.headers),
        )
        return httpx.Response(response.status_code, headers=dict(response.items()), content=response.content)

    return httpx.MockTransport(answer)


def test_a_program_creates_lists_changes_plans_and_deletes(
    client: ModuleType, wire: Any, api: Api, world: World
) -> None:
    models = client.models
    with client.Client(URL, api.token, http=httpx.Client(transport=wire)) as corral:
        made = [
            corral.create_key(
                models.NewKey(
                    project_id=f"prj_{world.project.id.hex}", name=f"k{n}", limits=models.LimitsValue(rpm=n)
                )
            )
            for n in range(5)
        ]
        assert made[0].key.startswith("sk-crl-")
        listed = list(corral.list_keys(limit=2, project_id=made[0].project_id))
        assert [key.name for key in listed] == ["k4", "k3", "k2", "k1", "k0"], "three pages"
        assert listed[0].limits.rpm == 4
        plan = corral.plan_revoke_key(made[0].id)
        assert [hit.name for hit in plan.disrupts.keys] == ["k0"]
        assert corral.get_key(made[0].id).revoked_at is None
        assert corral.revoke_key(made[0].id) is None
        assert corral.get_key(made[0].id).revoked_at is not None
        changed = corral.change_project(made[0].project_id, models.ProjectChange(weight=7))
        assert (changed.weight, changed.name) == (7, "Main"), "what is not set is not sent"
        member = next(each for each in corral.list_members() if each.role is models.Role.DEVELOPER)
        assert member.email == "bob@example.org"
        assert corral.get_usage(group_by=models.GroupBy.MODEL).data == []


def test_a_refusal_is_an_error_with_its_fields(client: ModuleType, wire: Any, api: Api) -> None:
    corral = client.Client(URL, api.token, http=httpx.Client(transport=wire))
    with pytest.raises(client.ApiError) as refused:
        corral.create_project(client.models.NewProject(name="", slug="two"))
    assert (refused.value.status, refused.value.code) == (400, "invalid_input")
    assert [error.field for error in refused.value.errors] == ["name"]
    assert refused.value.request_id.startswith("req_")
    with pytest.raises(client.ApiError) as missing:
        corral.get_key("key_x/../../organization")
    assert missing.value.status == 404, "an id cannot lead elsewhere"


def at_once(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run what never waits without an event loop: Django's connection of the test belongs to this very context."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waited")


def test_the_asynchronous_one_does_the_same(client: ModuleType, wire: Any, api: Api, world: World) -> None:
    models = client.models

    async def program() -> list[str]:
        async with client.AsyncClient(URL, api.token, http=httpx.AsyncClient(transport=wire)) as corral:
            for n in range(3):
                await corral.create_project(models.NewProject(name=f"P{n}", slug=f"p{n}"))
            with pytest.raises(client.ApiError):
                await corral.get_project(f"prj_{'0' * 32}")
            return [each.slug async for each in corral.list_projects(limit=2)]

    assert at_once(program()) == ["p2", "p1", "p0", "main"]


def test_it_has_a_method_for_every_operation_and_a_plan_for_every_write(client: ModuleType) -> None:
    for path in rest.get_openapi_schema()["paths"].values():
        for method, operation in path.items():
            for kind in (client.Client, client.AsyncClient):
                assert callable(getattr(kind, operation["operationId"]))
                assert hasattr(kind, f"plan_{operation['operationId']}") is (method != "get")


def test_a_moment_of_trouble_is_waited_out_with_the_same_key_and_then_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[Any] = [httpx.Response(503, headers={"Retry-After": "3"}), httpx.ReadTimeout("slow")]
    keys, slept = [], []

    def flaky(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        answer = answers.pop(0) if answers else httpx.Response(204)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("time.sleep", slept.append)
    sender = transport.Transport(URL, "mt-crl-x", http=httpx.Client(transport=httpx.MockTransport(flaky)))
    sender.nothing(transport.prepare("DELETE", "/api/v1/keys/x"))
    assert len(keys) == 3 and len(set(keys)) == 1
    assert slept[0] == 3.0 and slept[1] < 1
    answers += [httpx.Response(429)] * 9
    with pytest.raises(transport.ApiError) as refused:
        sender.nothing(transport.prepare("DELETE", "/api/v1/keys/x"))
    assert (refused.value.status, len(keys)) == (429, 3 + transport.MAX_TRIES)
    answers[:] = [httpx.Response(400)]
    with pytest.raises(transport.ApiError):
        sender.nothing(transport.prepare("DELETE", "/api/v1/keys/x"))
    assert len(keys) == 4 + transport.MAX_TRIES, "what is wrong stays wrong"


@pytest.mark.full
def test_it_passes_the_strict_type_check(folder: Path) -> None:
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\nplugins = pydantic.mypy\n")
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "corral_client"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
