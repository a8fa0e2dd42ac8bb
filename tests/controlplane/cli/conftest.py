"""The command line against the real web process, in this process and on the test's own connection."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner, Result
from django.core.signals import request_started
from django.core.wsgi import get_wsgi_application
from django.db import close_old_connections

from tests.world import World

URL = "http://127.0.0.1:8401"


@dataclass
class Corral:
    """`run("get", "keys")`, signed in as Acme's owner."""

    folder: Path
    token: str

    def run(self, *args: str, status: int = 0, stdin: str | None = None) -> Result:
        from controlplane.cli.main import cli

        result = CliRunner().invoke(cli, args, input=stdin, prog_name="corral")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == status, result.output
        return result

    def file(self, text: str, name: str = "acme.yaml") -> str:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    def apply(self, text: str, *args: str, status: int = 0) -> Result:
        return self.run("apply", "-f", self.file(text), "--yes", *args, status=status)


@pytest.fixture
def wsgi(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """httpx clients made from now on speak to the web process without a socket."""
    served = get_wsgi_application()

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        request_started.disconnect(
            close_old_connections
        )  # what begins a request must not close the test's own
        try:
            response = served(environ, start_response)
            return [response.content]
        finally:
            request_started.connect(close_old_connections)

    transport = httpx.WSGITransport(app=application)
    monkeypatch.setattr(httpx, "Client", functools.partial(httpx.Client, transport=transport))
    return application


@pytest.fixture
def corral(world: World, wsgi: Any, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    from autoscaler.house import build_cell
    from controlplane.tenants.models import Role
    from tests.controlplane.api.caller import token_of

    build_cell.cache_clear()
    token = token_of(world.organization.id, Role.OWNER)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CORRAL_API_URL", URL)
    monkeypatch.setenv("CORRAL_API_TOKEN", token)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("CORRAL_CONTEXT", raising=False)
    yield Corral(tmp_path, token)
    build_cell.cache_clear()
