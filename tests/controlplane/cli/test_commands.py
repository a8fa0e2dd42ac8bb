"""Each command as a user runs it: its output in every form, and its exit status."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from controlplane.cli.main import COMMANDS
from controlplane.cli.output import ago, money
from controlplane.tenants import key_services
from tests.booked import book_usage
from tests.controlplane.cli.conftest import URL, Corral
from tests.world import World, make_deployment, make_replica


def test_signing_in_keeps_the_token_for_its_owner_only(
    corral: Corral, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CORRAL_API_TOKEN")
    assert "corral login" in corral.run("get", "keys", status=4).stderr
    assert "Signed in to Acme" in corral.run("login", "--url", URL, stdin=f"{corral.token}\n").output
    file = Path(os.environ["XDG_CONFIG_HOME"]) / "corral" / "config.yaml"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "main" in corral.run("get", "projects").stdout
    corral.run("login", "--url", URL, "--context", "second", stdin=corral.token)
    corral.run("contexts", "default")
    rows = json.loads(corral.run("contexts", "-o", "json").stdout)
    assert [(row["name"], row["current"]) for row in rows] == [("default", True), ("second", False)]
    assert corral.token not in corral.run("contexts").output
    corral.run("logout")
    assert "main" in corral.run("get", "projects").stdout, "now in the other one"
    bad = corral.run("login", "--url", URL, stdin="mt-crl-" + "a" * 12 + "-" + "b" * 43, status=4)
    assert "unknown" in bad.stderr
    assert "begins with mt-crl-" in corral.run("login", stdin="sk-crl-x", status=1).stderr
    assert "no context 'x'" in corral.run("--context", "x", "get", "keys", status=4).stderr


def test_get_shows_tables_json_and_yaml(corral: Corral, world: World) -> None:
    replica, _ = make_replica(make_deployment(world))
    book_usage(world)
    assert "toy-chat" in corral.run("get", "deployments").stdout
    (row,) = json.loads(corral.run("-o", "json", "get", "deployment").stdout)
    assert row["name"] == "toy-chat"
    (same,) = yaml.safe_load(corral.run("get", "deployments", "-o", "yaml").stdout)
    assert same == row
    one = corral.run("get", "deployment", "toy-chat").stdout
    assert row["id"] in one and "engine_profile:" in one
    assert str(replica) in corral.run("get", "replicas", "-f", "live=true").stdout
    assert "nothing here" in corral.run("get", "replicas", "-f", "phase=failed").stderr
    for kind in (
        "organization",
        "machines",
        "decisions",
        "operations",
        "requests",
        "audit",
        "members",
        "slo-classes",
        "grants",
        "grants-held",
        "slo-rules",
        "webhooks",
        "quotas",
        "budgets",
        "invitations",
        "service-accounts",
        "model-versions",
        "adapters",
        "keys",
    ):
        corral.run("get", kind)
    wrong = corral.run("get", "replicas", "-f", "phse=ready", status=1).stderr
    assert "'phse' is no parameter" in wrong and "phase" in wrong
    assert "known: organization" in corral.run("get", "cows", status=1).stderr
    assert "no deployment 'x'" in corral.run("get", "deployment", "x", status=1).stderr


def test_keys_are_created_rotated_and_revoked(corral: Corral, world: World) -> None:
    made = corral.run("keys", "create", "web", "--project", "main", "--rpm", "60", "--budget", "2.5")
    assert made.stdout.startswith("sk-crl-") and made.stdout.count("\n") == 1, "only the key, for a pipe"
    (row,) = json.loads(corral.run("keys", "list", "-o", "json").stdout)
    assert row["limits"]["budget_nano"] == 2_500_000_000
    assert corral.run("keys", "rotate", row["id"], "--overlap-s", "0").stdout.startswith("sk-crl-")
    assert "--yes" in corral.run("keys", "revoke", row["id"], status=1).stderr
    gone = corral.run("keys", "revoke", row["id"], "--yes")
    assert "key web stops working at once" in gone.stderr
    assert row["id"] not in corral.run("keys", "list").stdout
    assert row["id"] in corral.run("keys", "list", "--all").stdout


def test_a_deployment_is_scaled_after_its_plan_was_shown(corral: Corral, world: World) -> None:
    deployment = make_deployment(world)
    for _ in range(2):
        make_replica(deployment)
    shown = corral.run("deployments", "scale", "toy-chat", "--max", "1", "--yes")
    assert "max_replicas: 2 → 1" in shown.stderr
    assert "1 replica of toy-chat is drained" in shown.stderr
    assert "so already" in corral.run("deployments", "scale", "toy-chat", "--max", "1").output
    assert "0-1" in corral.run("deployments", "list", "--project", "main").stdout
    assert "ready" in corral.run("deployments", "show", "toy-chat").stdout
    machine = json.loads(corral.run("get", "machines", "-o", "json").stdout)[0]["id"]
    assert "Draining mch_" in corral.run("deployments", "drain", machine, "-y").stdout
    assert "give the id" in corral.run("deployments", "drain", "toy-chat", "-y", status=1).stderr
    corral.run("deployments", "delete", "toy-chat", "-y")
    assert "nothing here" in corral.run("deployments", "list").stderr


def test_logs_tell_requests_and_decisions_in_order(corral: Corral, world: World) -> None:
    make_replica(make_deployment(world))
    book_usage(world, age_s=30, status=503, finish_reason="error")
    book_usage(world, age_s=90)
    book_usage(world, age_s=20, model="other")
    lines = corral.run("logs", "toy-chat").stdout.splitlines()
    assert len(lines) == 3
    assert "200  toy-chat  100→20 tokens in 0.90 s" in lines[0]
    assert "503" in lines[1]
    assert "start replica: 1 request waits" in lines[2]
    assert len(corral.run("logs", "--since", "60s", "--project", "main").stdout.splitlines()) == 2
    (first, *_) = corral.run("logs", "-o", "json").stdout.splitlines()
    assert json.loads(first)["status"] == 200
    assert "say 15m" in corral.run("logs", "--since", "yesterday", status=1).stderr


def test_usage_is_summed_under_names(corral: Corral, world: World) -> None:
    key, _ = key_services.create_api_key(
        organization_id=world.organization.id, project_id=world.project.id, name="program"
    )
    for _ in range(2):
        book_usage(world, key_id=key.id)
    book_usage(world)
    shown = corral.run("usage", "--by", "key").stdout
    assert "program" in shown and "200" in shown and "together" in shown
    assert json.loads(corral.run("usage", "--by", "model", "-o", "json").stdout)["data"][0]["n_requests"] == 3


def test_explain_and_doctor(corral: Corral, world: World) -> None:
    event = book_usage(world)
    _, decision = make_replica(make_deployment(world))
    assert "first token after" in corral.run("explain", str(event)).stdout
    assert "1 request waits" in corral.run("explain", str(decision)).stdout
    assert "give the id" in corral.run("explain", "key_1", status=1).stderr
    assert "no such request" in corral.run("explain", f"req_{'0' * 32}", status=1).stderr
    assert "the token works, for Acme" in corral.run("doctor").stdout


def test_a_control_plane_that_is_away_is_status_3(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    class Away(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            raise httpx.ConnectError("refused")

    monkeypatch.setattr(httpx, "Client", lambda **values: _client(Away(), values))
    monkeypatch.setattr("time.sleep", lambda _: None)
    answer = corral.run("get", "keys", status=3)
    assert "does not answer" in answer.stderr
    assert corral.run("doctor", status=3).stdout.splitlines()[-1].startswith("✗ reachable")


def _client(transport: object, values: dict) -> object:
    from httpx._client import Client

    return Client(**{**values, "transport": transport})


def test_a_call_that_fails_for_a_moment_is_repeated_with_the_same_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import httpx

    from controlplane.cli.config import Context
    from controlplane.cli.failures import Refused
    from controlplane.cli.transport import MAX_TRIES, Api

    answers = [
        httpx.Response(503, headers={"Retry-After": "7"}),
        httpx.ReadTimeout("slow"),
        httpx.Response(204),
    ]
    seen, slept = [], []

    class Flaky(httpx.BaseTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.headers["Idempotency-Key"])
            answer = answers.pop(0) if answers else httpx.Response(503, json={})
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(httpx, "Client", lambda **values: _client(Flaky(), values))
    api = Api(Context(URL, "mt-crl-x"), sleep=slept.append)
    assert api.call("DELETE", "/keys/x") is None
    assert len(set(seen)) == 1 and len(seen) == 3
    assert slept == [7.0, 0.6]
    with pytest.raises(Refused) as refused:
        api.call("DELETE", "/keys/x")
    assert (refused.value.exit_code, len(seen)) == (3, 3 + MAX_TRIES)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(corral: Corral, shell: str) -> None:
    assert "_CORRAL_COMPLETE" in corral.run("completion", shell).stdout


def test_help_names_every_command_and_a_slip_is_guessed(corral: Corral) -> None:
    shown = corral.run("--help").stdout
    for name in COMMANDS:
        assert name in shown
        assert "Usage: corral" in corral.run(name, "--help").stdout
    assert "Did you mean" in corral.run("aply", status=2).stderr


def test_it_starts_without_what_it_does_not_need() -> None:
    code = (
        "import sys; sys.argv = ['corral', '--version']\n"
        "from controlplane.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'django', 'httpx', 'yaml', 'pydantic', 'ninja', 'celery'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_money_and_ages_read_well() -> None:
    from datetime import UTC, datetime

    assert [money(n) for n in (None, 0, 15_000, 2_500_000_000, 1_234_567_890_000)] == [
        "-", "$0", "$0.000015", "$2.50", "$1,234.57",
    ]  # fmt: skip
    now = datetime(2026, 1, 2, tzinfo=UTC)
    told = {
        "2026-01-01T23:59:30Z": "30s",
        "2025-12-30T00:00:00Z": "3d",
        "2026-01-02T03:00:00Z": "in 3h",
        None: "-",
    }
    assert {text: ago(text, now) for text in told} == told
