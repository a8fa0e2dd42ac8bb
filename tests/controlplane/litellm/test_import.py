"""`manage.py import_litellm`: what becomes of each row, once and again, and that its keys work."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from asgiref.sync import sync_to_async
from django.core.management import CommandError, call_command

from controlplane.budgets.models import Budget
from controlplane.gateway.directory import PgDirectory
from controlplane.litellm import carry
from controlplane.tenants import api_keys
from controlplane.tenants.models import ApiKey, Organization, Project
from infra.local.postgres import EmbeddedPostgres
from tests.controlplane.gateway.harness import CHAT, Machine, Running, running, until
from tests.controlplane.litellm.proxy import CONFIG, TEXTS, ask_postgres, database, fill, put_key, sha256
from tests.world import World, build_world, make_deployment, make_version

AsOperator = Callable[[], AbstractContextManager[None]]
pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def committed(transactional_db: None) -> World:
    return build_world()


@pytest.fixture
def dsn(pg_server: EmbeddedPostgres) -> Iterator[str]:
    with database(pg_server) as it:
        fill(it)
        yield it


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def run(as_operator: AsOperator) -> Callable[..., Any]:
    def it(*args: str) -> Any:
        out = StringIO()
        with as_operator():
            call_command("import_litellm", *args, "--json", stdout=out)
        return json.loads(out.getvalue())

    return it


def everything(as_operator: AsOperator) -> dict[str, Any]:
    """Every row that an import could make or touch."""
    with as_operator():
        return {
            model.__name__: sorted(map(str, model.objects.values_list()))
            for model in (Organization, Project, ApiKey, Budget)
        }


def key_of(name: str) -> ApiKey:
    pepper = bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"])
    return ApiKey.objects.select_related("project", "organization").get(
        lookup=api_keys.foreign_lookup(pepper, sha256(TEXTS[name]))
    )


def test_rows_become_what_they_were(
    committed: World, dsn: str, config: Path, run: Callable[..., Any], as_operator: AsOperator
) -> None:
    report = run("--database-url", dsn, "--config", str(config), "--owner", "alice@example.org")
    assert report["counts"]["keys"] == {"new": 7, "left out": 3}
    with as_operator():
        key = key_of("search")
        assert (key.name, key.masked, key.origin) == ("search key", "sk-…6789", "litellm")
        assert (key.project.name, key.project.slug) == ("Search", "search")
        assert (key.organization.name, key.organization.slug) == ("Research & Co.", "research-co")
        assert key.organization.timezone == "Europe/Berlin"
        assert key.scopes == {"models": ["toy-chat"]}, "what key and team both allow"
        assert key.aliases == {"latest": "toy-chat", "gpt-4o": "toy-chat", "fast": "toy-chat"}
        assert key.tags == ["prod", "eu, west", "user:bob@example.org"]
        limits = key.limits
        assert (limits.rpm, limits.input_tpm, limits.output_tpm, limits.max_concurrency) == (
            60,
            20000,
            20000,
            8,
        )
        assert limits.budget_nano is None
        budgets = {b.model: b for b in Budget.objects.filter(api_key=key)}
        assert (budgets[""].limit_nano, budgets[""].period, budgets[""].hard) == (
            25_100_000_000,
            "month",
            True,
        )
        assert (budgets["toy-chat"].limit_nano, budgets["toy-chat"].period) == (1_500_000_000, "day")
        [team] = Budget.objects.filter(project=key.project)
        assert (team.limit_nano, team.period) == (100_000_000, "week"), "0.1 dollars, exactly"
        assert key.project.limits.rpm == 600
        [research] = Budget.objects.filter(organization=key.organization, project=None, api_key=None)
        assert (research.limit_nano, research.period) == (5_000_000_000_000, "month")
        assert key.organization.limits.rpm == 9000
        assert key_of("team").scopes == {"models": ["toy-chat", "gpt-4o", "team/*"]}
        ada = key_of("ada")
        assert (ada.project.name, ada.project.limits.budget_nano) == ("ada@example.org", 6_000_000_000)
        assert ada.organization.slug == "litellm"
        loose = key_of("loose")
        assert loose.scopes == {"routes": ["chat", "requests"]}
        assert loose.expires_at is not None and loose.expires_at.isoformat() == "2099-01-02T03:04:05+00:00"
        assert loose.project.name == "Personal keys" and loose.revoked_at is None
        shared = key_of("shared")
        assert shared.limits.budget_nano == 3_000_000_000, "4.25 less what was spent"
        [soft] = Budget.objects.filter(api_key=shared)
        assert (soft.hard, soft.period, soft.limit_nano) == (False, "total", 1_250_000_000)
        assert key_of("blocked").revoked_at is not None and key_of("old").revoked_at is not None
        assert key_of("old").project.slug == "search", "another organization, the same name"


def test_what_could_not_be_carried_is_told_with_a_remedy_and_no_secret(
    committed: World, dsn: str, config: Path, as_operator: AsOperator
) -> None:
    out = StringIO()
    with as_operator():
        call_command(
            "import_litellm", "--database-url", dsn, "--config", str(config), "--owner", "alice@example.org",
            "--plan", stdout=out,
        )  # fmt: skip
    text = out.getvalue()
    for told in (
        "nothing was changed", "guardrails have no counterpart", "expired", "sk-" not in text and "expired",
        "session of LiteLLM's console", "calls no model", "invite them", "blocked there", "router_settings.fallbacks",
        "general_settings.master_key", "hosted_vllm/Qwen/Qwen3-8B at http://10.0.0.7:8000/v1", "anthropic",
        "limits of end customers", "tpm_limit counts prompt and answer together",
    ):  # fmt: skip
        assert told and str(told) in text, told
    for secret in ("secret-in-the-file", "sk-1234", *TEXTS.values(), *map(sha256, TEXTS.values())):
        assert secret not in text


def test_a_plan_changes_nothing_and_a_second_run_neither(
    committed: World, dsn: str, config: Path, run: Callable[..., Any], as_operator: AsOperator
) -> None:
    args = ("--database-url", dsn, "--config", str(config), "--owner", "alice@example.org")
    before = everything(as_operator)
    planned = run(*args, "--plan")
    assert everything(as_operator) == before
    done = run(*args)
    assert {**planned, "planned_only": False} == done
    after = everything(as_operator)
    again = run(*args)
    assert everything(as_operator) == after
    assert again["counts"]["keys"] == {"already there": 7, "left out": 3}
    assert {row["fate"] for row in (*again["organizations"], *again["projects"])} == {"already there"}
    assert [row["id"] for row in again["keys"]] == [row["id"] for row in done["keys"]]


def test_what_came_meanwhile_is_added_and_what_was_changed_here_stays(
    committed: World, dsn: str, run: Callable[..., Any], as_operator: AsOperator
) -> None:
    args = ("--database-url", dsn, "--owner", "alice@example.org")
    run(*args)
    with as_operator():
        ApiKey.objects.filter(id=key_of("search").id).update(rpm=5, name="renamed")
        Project.objects.filter(id=key_of("ada").project_id).update(slug="another-slug")
    TEXTS["later"] = "sk-later-0123456789"
    try:
        with psycopg.connect(dsn, autocommit=True) as connection:
            put_key(connection, "later", team_id="t1")
        assert run(*args)["counts"]["keys"]["new"] == 1
        with as_operator():
            assert key_of("later").project_id == key_of("search").project_id
            assert (key_of("search").rpm, key_of("search").name) == (5, "renamed")
    finally:
        del TEXTS["later"]


def test_nothing_is_half_imported(
    committed: World,
    dsn: str,
    run: Callable[..., Any],
    as_operator: AsOperator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = everything(as_operator)
    with pytest.raises(CommandError, match=r"--owner.*nothing was imported"):
        run("--database-url", dsn)
    make, n = carry._make_keys, []

    def fails_later(*args: Any) -> None:
        n.append(1)
        if len(n) > 1:
            raise carry.InvalidInputError("the disk is full")
        make(*args)

    monkeypatch.setattr(carry, "_make_keys", fails_later)
    with pytest.raises(CommandError, match="the disk is full; nothing was imported"):
        run("--database-url", dsn, "--owner", "alice@example.org")
    assert everything(as_operator) == before


def test_a_dump_is_read_as_the_database_is(
    committed: World, dsn: str, pg_server: EmbeddedPostgres, tmp_path: Path, run: Callable[..., Any]
) -> None:
    pg_dump = Path(pg_server.argv()[0]).with_name("pg_dump")
    path = tmp_path / "litellm.sql"
    subprocess.run([pg_dump, "--data-only", "-f", path, dsn], check=True, timeout=60)
    owner = ("--owner", "alice@example.org", "--plan")
    from_dump = run("--dump", str(path), *owner)
    from_database = run("--database-url", dsn, *owner)
    assert {**from_dump, "from": ""} == {**from_database, "from": ""}
    for kind, remedy in (("--format=custom", "--format=plain"), ("--inserts", "without --inserts")):
        subprocess.run([pg_dump, "--data-only", kind, "-f", path, dsn], check=True, timeout=60)
        with pytest.raises(CommandError, match=remedy):
            run("--dump", str(path), *owner)


def test_an_organization_that_is_there_can_take_what_has_none(
    committed: World, dsn: str, run: Callable[..., Any], as_operator: AsOperator
) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute('UPDATE "LiteLLM_TeamTable" SET organization_id = NULL')
        connection.execute('DELETE FROM "LiteLLM_OrganizationTable"')
    report = run("--database-url", dsn, "--organization", "acme")
    assert [row["fate"] for row in report["organizations"]] == ["already there"]
    with as_operator():
        assert key_of("search").organization_id == committed.organization.id
        slugs = set(
            Project.objects.filter(organization=committed.organization).values_list("slug", flat=True)
        )
        assert {"main", "search", "personal-keys"} <= slugs
        assert len([slug for slug in slugs if slug.startswith("search")]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--database-url", "postgresql://127.0.0.1:1/none"), "--database-url"),
        (("--dump", "/nowhere.sql"), "cannot be read"),
        (("--dump", __file__), "has no table LiteLLM_VerificationToken"),
    ],
)
def test_a_source_that_is_none_is_told(
    committed: World, run: Callable[..., Any], args: tuple[str, str], message: str
) -> None:
    with pytest.raises(CommandError, match=message):
        run(*args)


# -- its keys work


@sync_to_async
def _import(run: Callable[..., Any], as_operator: AsOperator, *args: str) -> str:
    """Imports, and serves toy-chat in the project of the team; the deployment's id."""
    from controlplane.deployments import services as deployments

    run(*args)
    with as_operator():
        project = key_of("search").project
        version = make_version(project.organization_id)
        made = deployments.create_deployment(
            organization_id=project.organization_id,
            project_id=project.id,
            name="toy-chat",
            model_version_id=version.id,
            engine_profile={"engine": "toy"},
        )
    return made.id.hex


async def test_its_keys_work_and_are_rehashed_at_their_first_use(
    committed: World,
    dsn: str,
    config: Path,
    run: Callable[..., Any],
    as_operator: AsOperator,
    pg_server: EmbeddedPostgres,
    redis_url: str,
) -> None:
    deployment = await _import(
        run, as_operator, "--database-url", dsn, "--config", str(config), "--owner", "alice@example.org"
    )
    pepper = bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"])
    directory = PgDirectory(pg_server.dsn("app"))
    await directory.open()
    machine = Machine(redis_url, deployment=deployment)
    await machine.start()
    try:
        async with running(redis_url, key_pepper=pepper) as gw:
            ask_postgres(gw, directory)
            told = await _called(gw, as_operator, pepper)
    finally:
        await machine.stop()
        await directory.close()
    assert told == {
        "blocked": (401, "revoked_api_key"),
        "old": (401, "revoked_api_key"),
        "expired": (401, "invalid_api_key"),
        "dashboard": (401, "invalid_api_key"),
        "ada": (404, "model_not_found"),
    }


async def _called(gw: Running, as_operator: AsOperator, pepper: bytes) -> dict[str, tuple[int, str]]:
    """Asks with the key that works until it is rehashed; what those that do not work are told."""

    @sync_to_async
    def digest(name: str) -> bytes:
        with as_operator():
            return bytes(key_of(name).digest)

    body = {**CHAT, "model": "toy-chat"}
    first = await digest("search")
    assert first == api_keys.foreign_digest(pepper, sha256(TEXTS["search"]))
    for model in ("toy-chat", "fast", "gpt-4o"):
        answer = await gw.http.post(
            "/v1/chat/completions", json={**body, "model": model}, headers=gw.auth(TEXTS["search"])
        )
        assert answer.status_code == 200, (model, answer.text)
    ours = api_keys.digest(pepper, TEXTS["search"])

    async def rehashed() -> bool:
        return await digest("search") == ours

    await until(rehashed)
    assert (await gw.http.get("/v1/models", headers=gw.auth(TEXTS["search"]))).status_code == 200
    found = await gw.http.get("/v1/models", headers=gw.auth(TEXTS["loose"]))
    assert (found.status_code, found.json()["error"]["code"]) == (403, "key_scope")
    found = await gw.http.get("/v1/models", headers=gw.auth(TEXTS["search"] + "x"))
    assert found.status_code == 401
    told = {}
    for name in ("blocked", "old", "expired", "dashboard", "ada"):
        found = await gw.http.post("/v1/chat/completions", json=body, headers=gw.auth(TEXTS[name]))
        told[name] = (found.status_code, found.json()["error"]["code"])
    return told


def test_the_models_of_a_project_that_shares_them_keep_their_names(
    committed: World, dsn: str, config: Path, run: Callable[..., Any], as_operator: AsOperator
) -> None:
    from controlplane.deployments import sharing
    from tests.controlplane.tenants.test_key_lookup import look_up

    run("--database-url", dsn, "--config", str(config), "--owner", "alice@example.org", "--shared-by", "acme")
    deployment = make_deployment(committed, "toy-chat")
    with as_operator():
        key = key_of("search")
        sharing.grant(
            organization_id=committed.organization.id,
            deployment_id=deployment.id,
            grantee_id=key.organization_id,
        )
        told = look_up(key.lookup)
        assert told["key"]["aliases"]["toy-chat"] == "acme/toy-chat"
        assert [each["name"] for each in told["deployments"]] == ["acme/toy-chat"]
    from controlplane.gateway.keybounds import callable_names

    names = callable_names({"acme/toy-chat"}, ("toy-chat",), told["key"]["aliases"])
    assert names == {"toy-chat": "acme/toy-chat"}, "in scope under the old name, and not under the other"
