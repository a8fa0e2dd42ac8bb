"""The published litellm package: its own migrations, keys made by its own code, imported here, and used.

Takes half a minute and a package index, so `make test-full` has it; test_import.py has tables written by hand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from controlplane.gateway.directory import PgDirectory
from controlplane.tenants import api_keys
from controlplane.tenants.models import ApiKey
from infra.local.postgres import EmbeddedPostgres
from tests.controlplane.gateway.harness import CHAT, Machine, running, until
from tests.controlplane.litellm.proxy import CONFIG, ask_postgres, database, sha256
from tests.controlplane.litellm.test_import import committed, run  # noqa: F401 - fixtures
from tests.world import World, make_version

pytestmark = [pytest.mark.full, pytest.mark.django_db(transaction=True)]
ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ("litellm[proxy]==1.106.2", "litellm-proxy-extras==0.4.108", "psycopg[binary]==3.3.9")
INSTALL_TIMEOUT_S, MAKE_TIMEOUT_S = 600, 240


@pytest.fixture(scope="session")
def litellm_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own for the package, kept under the cache directory; ours has none of it."""
    uv = next(filter(None, (shutil.which("uv"), shutil.which("uv", path=str(ROOT / ".tools" / "bin")))), None)
    if uv is None:
        pytest.skip("uv is not installed: `make tools` installs it")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "corral" / "litellm-1.106.2"
    python = cache / "bin" / "python"
    if not (cache / "complete").exists():
        subprocess.run(
            [uv, "venv", "-q", "--clear", "--python", sys.executable, cache], check=True, timeout=60
        )
        installed = subprocess.run(
            [uv, "pip", "install", "-q", "--python", python, *PACKAGES],
            capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=False,
        )  # fmt: skip
        if installed.returncode:
            pytest.skip(f"litellm cannot be installed here: {installed.stderr.strip()[-300:]}")
        (cache / "complete").touch()
    return python


async def test_a_real_proxys_keys_work_here(
    litellm_python: Path,
    committed: World,  # noqa: F811
    run: Callable[..., Any],  # noqa: F811
    as_operator: Callable[[], AbstractContextManager[None]],
    pg_server: EmbeddedPostgres,
    redis_url: str,
    tmp_path: Path,
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    script = Path(__file__).with_name("with_the_package.py")
    with database(pg_server, "litellm_real") as dsn:
        made = subprocess.run(
            [litellm_python, script, dsn], capture_output=True, text=True, timeout=MAKE_TIMEOUT_S, check=False
        )
        assert made.returncode == 0, made.stderr[-3000:]
        facts = json.loads(made.stdout.splitlines()[-1])
        assert facts["migrations"] > 100
        args = ("--database-url", dsn, "--config", str(config), "--owner", "alice@example.org")
        report = await sync_to_async(run)(*args)
        again = await sync_to_async(run)(*args)
    keys: dict[str, str] = facts["keys"]
    assert report["counts"]["keys"] == {"new": 10, "left out": 2}, report["not_carried"]
    assert again["counts"]["keys"] == {"already there": 10, "left out": 2}
    pepper = bytes.fromhex(os.environ["CORRAL_KEY_PEPPER"])

    def row(name: str) -> ApiKey:
        lookup = api_keys.foreign_lookup(pepper, sha256(keys[name]))
        with as_operator():
            return ApiKey.objects.select_related("project", "organization").get(lookup=lookup)

    search = await sync_to_async(row)("search")
    assert (search.organization.name, search.project.name) == ("Research", "Search")
    assert search.scopes == {"models": ["toy-chat"]}
    assert search.masked == f"sk-…{keys['search'][-4:]}"
    assert (search.rpm, search.input_tpm, search.max_concurrency) == (60, 20_000, 8)
    assert search.tags == ["prod", "eu", "user:bob@example.org"]
    assert (await sync_to_async(row)("ada")).project.limits.budget_nano == 6_000_000_000

    @sync_to_async
    def serve() -> str:
        from controlplane.deployments import services as deployments

        with as_operator():
            version = make_version(search.organization_id)
            return deployments.create_deployment(
                organization_id=search.organization_id,
                project_id=search.project_id,
                name="toy-chat",
                model_version_id=version.id,
                engine_profile={"engine": "toy"},
            ).id.hex

    directory = PgDirectory(pg_server.dsn("app"))
    await directory.open()
    machine = Machine(redis_url, deployment=await serve())
    await machine.start()
    try:
        async with running(redis_url, key_pepper=pepper) as gw:
            ask_postgres(gw, directory)
            for name, model, status in (
                ("search", "toy-chat", 200),
                ("search", "fast", 200),
                ("search", "gpt-4o", 200),
                ("rotated", "toy-chat", 200),
                ("team", "toy-chat", 200),
                ("custom", "toy-chat", 404),  # of nobody's team: its project serves nothing yet
                ("blocked", "toy-chat", 401),
                ("old", "toy-chat", 401),
                ("manager", "toy-chat", 401),
                ("dashboard", "toy-chat", 401),
            ):
                answer = await gw.http.post(
                    "/v1/chat/completions", json={**CHAT, "model": model}, headers=gw.auth(keys[name])
                )
                assert answer.status_code == status, (name, model, answer.text)
            told = await gw.http.get("/v1/models", headers=gw.auth(keys["chat only"]))
            assert (told.status_code, told.json()["error"]["code"]) == (403, "key_scope")

            async def rehashed() -> bool:
                found = await sync_to_async(row)("search")
                return bytes(found.digest) == api_keys.digest(pepper, keys["search"])

            await until(rehashed)
    finally:
        await machine.stop()
        await directory.close()
