"""Secrets change while servers and processes run: old and new work side by side, then the old one ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import psycopg
import pytest
import redis

from infra.local import environment, roles
from infra.local.postgres import EmbeddedPostgres
from infra.local.privatefile import read_json, write_private_json
from infra.local.redis import EmbeddedRedis
from infra.local.rolling import restart_all, take_request
from infra.local.rotation import Rotation, RotationError
from infra.local.stackstate import read_state
from tests.infra.local.conditions import until
from tests.infra.local.test_stack import Stack as WholeStack
from tests.infra.local.test_supervisor import ROOT


def test_second_logins_act_as_the_role_and_end_with_their_sessions(pg_server: EmbeddedPostgres) -> None:
    first = dict(pg_server._credentials())
    both = roles.rotated(first)
    assert roles.rotated(both) == both, "what is half-way stays"
    assert roles.is_rotating(both)
    assert {name: both[name] for name in first} == first
    try:
        with pg_server.connect() as superuser:
            roles.ensure_roles(superuser, both, owner_creates_databases=True)
        for role in roles.ROLES:
            login = roles.login_of(role, both)
            assert login == f"{role}_b"
            dsn = f"postgresql://{login}:{both[login]}@127.0.0.1:{pg_server.port}/corral"
            with psycopg.connect(dsn, autocommit=True) as connection:
                facts = connection.execute(
                    "SELECT current_user, session_user, current_setting('TimeZone')"
                ).fetchone()
                assert facts == (role, login, "UTC")
                if role != roles.OWNER:
                    assert connection.execute("SHOW statement_timeout").fetchone() == ("10s",)
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        connection.execute("CREATE TABLE mine (id int)")
            psycopg.connect(pg_server.dsn(role.removeprefix("corral_"))).close()  # the former works on
        held = psycopg.connect(dsn, autocommit=True)
        # The other way round: the first logins are active, the second ones retire.
        back = roles.retired({name: value for name, value in both.items() if not name.startswith("login:")})
        assert back == first
        with pg_server.connect() as superuser:
            roles.ensure_roles(superuser, back, owner_creates_databases=True)
        with pytest.raises(psycopg.OperationalError):
            held.execute("SELECT 1")
        with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
            psycopg.connect(dsn)
    finally:
        with pg_server.connect() as superuser:
            for role in roles.ROLES:
                superuser.execute(f"DROP ROLE IF EXISTS {role}_b")


def test_redis_takes_two_passwords_and_then_one_also_over_a_restart(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    try:
        server.wait_ready()
        old = server.url()
        with redis.Redis.from_url(old) as connected:
            connected.ping()
            server.rotate_password()
            new = server.url()
            server.rotate_password()
            assert server.url() == new != old, "what is half-way stays"
            for url in (old, new):
                assert redis.Redis.from_url(url).ping()
            server.stop()
            server.start()
            server.wait_ready()
            for url in (old, new):
                assert redis.Redis.from_url(url).ping()
            connected.ping()
            server.retire_password()
            assert connected.ping(), "who is connected stays so"
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(old).ping()
        assert redis.Redis.from_url(new).ping()
        server.stop()
        server.start()
        server.wait_ready()
        with pytest.raises(redis.AuthenticationError):
            redis.Redis.from_url(old).ping()
    finally:
        server.stop()


def test_processes_start_again_one_by_one_with_what_they_are_told_now(tmp_path: Path) -> None:
    """Oftener than a process may die; the supervisor neither waits nor gives up."""
    told, seen = tmp_path / "told.json", tmp_path / "seen"
    write_private_json(told, {"WORD": "0"})
    argv = ["/bin/sh", "-c", f'echo "$WORD" >> {seen}; sleep 300 & wait']
    specs = [{"name": name, "argv": argv, "env_file": str(told)} for name in ("web", "gateway-1", "beat")]
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.infra.local.supervised", str(tmp_path / "var"), json.dumps(specs)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: (s := read_state(tmp_path / "var")) and s.phase == "running", "it runs")
        said: list[str] = []
        for word in ("1", "2", "3", "4"):
            write_private_json(told, {"WORD": word})
            restart_all(tmp_path / "var", said.append)
        assert said == ["gateway-1 started again", "web started again", "beat started again"] * 4
        until(lambda: len(seen.read_text().split()) == 15, "all have started")
        assert seen.read_text().split() == [word for word in "01234" for _ in range(3)]
        record = read_state(tmp_path / "var")
        assert record is not None
        assert {process.n_restarts for process in record.processes} == {4}
        assert not take_request(tmp_path / "var", "web")
    finally:
        program.terminate()
        program.wait(10)


def test_every_new_secret_goes_to_no_process_that_does_not_need_it(tmp_path: Path) -> None:
    kept = environment.stack_secrets(tmp_path)
    write_private_json(
        tmp_path / "secrets.json",
        kept
        | {"secret_key_previous": "s" * 40, "key_pepper_previous": "a" * 32, "key_pepper_next": "b" * 32},
    )
    stack = environment.secret_variables(tmp_path)
    gateway = environment.process_environment("gateway", stack, {})
    assert gateway["CORRAL_KEY_PEPPER_PREVIOUS"] == "a" * 32
    assert gateway["CORRAL_KEY_PEPPER_NEXT"] == "b" * 32
    assert gateway["CORRAL_DIGEST_SECRET"] == kept["digest_secret"]
    assert "CORRAL_SECRET_KEY_PREVIOUS" not in gateway
    assert environment.process_environment("web", stack, {})["CORRAL_SECRET_KEY_PREVIOUS"] == "s" * 40


def test_servers_of_ones_own_are_not_ours_to_change(tmp_path: Path) -> None:
    rotation = Rotation(tmp_path, lambda _: None)
    with pytest.raises(RotationError, match="database"):
        rotation.rotate(["database"])
    with pytest.raises(RotationError, match="redis"):
        rotation.rotate(["redis"])


SEAL = """
from controlplane.identity import providers
from controlplane.tenants import services
alice = services.create_user(email="alice@example.org", password="correct-horse-battery")
acme = services.create_organization(name="Acme", slug="acme-seals", owner=alice)
providers.create_provider(
    organization_id=acme.id, kind="oidc", name="P", issuer="https://id.example.org", client_id="c",
    client_secret="sealed under the first key",
)
"""
OPEN = """
from controlplane.identity import providers
from controlplane.identity.models import IdentityProvider
print(providers.secret_of(IdentityProvider.objects.get(name="P")))
"""


@pytest.mark.full
@pytest.mark.stack
@pytest.mark.timeout(900)
def test_all_secrets_of_a_running_stack() -> None:
    """The whole way, twice, then the former ones end. The drill does it under load."""
    directory = Path(tempfile.mkdtemp(prefix="corral-test-rotation-"))
    directory.chmod(0o711)  # PostgreSQL may run as another user
    stack = WholeStack(directory / "var")
    try:
        stack.up()
        sealed = stack.manage("shell", "-v", "0", "-c", SEAL)
        assert sealed.returncode == 0, sealed.stderr
        for _ in range(2):
            before = environment.load(stack.var)
            done = stack.manage("rotate", "all", "--json")
            assert done.returncode == 0, done.stderr
            after = environment.load(stack.var)
            for name in ("CORRAL_PG_DSN_APP", "CORRAL_REDIS_URL", "CORRAL_SECRET_KEY", "CORRAL_KEY_PEPPER"):
                assert after[name] != before[name]
            with pytest.raises(psycopg.OperationalError):
                psycopg.connect(before["CORRAL_PG_DSN_APP"])
            with pytest.raises(redis.AuthenticationError):
                redis.Redis.from_url(before["CORRAL_REDIS_URL"]).ping()
            assert stack.readyz("gateway") == stack.readyz("web") == 200
            assert all(process["phase"] in ("ready", "done") for process in stack.status()["processes"])
        assert stack.manage("rotate", "all", "--finish").returncode == 0
        kept = read_json(stack.var / "secrets.json") or {}
        assert not {"key_pepper_previous", "secret_key_previous"} & kept.keys()
        opened = stack.manage("shell", "-v", "0", "-c", OPEN)
        assert opened.stdout.strip() == "sealed under the first key", opened.stderr
        assert stack.readyz("gateway") == stack.readyz("web") == 200
    finally:
        stack.manage("down")
        shutil.rmtree(directory, ignore_errors=True)
