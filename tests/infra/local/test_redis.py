"""The embedded Redis: who may do what, what survives."""

import os
import signal
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from infra.local.process import find_working_in, identity_of
from infra.local.redis import LOG_BYTES, EmbeddedRedis
from tests.infra.local.conditions import until


def client_of(server: EmbeddedRedis, user: str | None = None, password: str | None = None) -> redis.Redis:
    return redis.Redis(
        host="127.0.0.1",
        port=server.port,
        username=user,
        password=password,
        socket_timeout=2,
        retry=Retry(NoBackoff(), 0),
    )


def pid_of(server: EmbeddedRedis) -> int:
    return find_working_in(server.base, "redis-server")[0].pid


def test_nobody_gets_in_without_a_password(redis_server: EmbeddedRedis) -> None:
    with pytest.raises(redis.AuthenticationError):
        client_of(redis_server).ping()
    with pytest.raises(redis.AuthenticationError):
        client_of(redis_server, "corral", "wrong").ping()
    with pytest.raises(redis.AuthenticationError):
        client_of(redis_server, "default", "").ping()


def test_settings_that_matter(redis_server: EmbeddedRedis, redis_url: str) -> None:
    with redis_server.connect() as client:
        wanted = {
            "bind": "127.0.0.1",
            "appendonly": "yes",
            "appendfsync": "everysec",
            "auto-aof-rewrite-min-size": str(LOG_BYTES),  # bounds how long a restart reads
            "save": "",
            "maxmemory-policy": "noeviction",
            "acl-pubsub-default": "resetchannels",
        }
        assert {name: client.config_get(name)[name] for name in wanted} == wanted
        assert client.info("server")["redis_version"] == "6.2.14"


def test_full_memory_refuses_writes_and_forgets_nothing(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis", max_memory_mb=3)
    server.start()
    server.wait_ready()
    try:
        with server.connect() as client:
            client.set("kept", "1")
            with pytest.raises(redis.OutOfMemoryError):
                for number in range(100):
                    client.set(f"filler.{number}", b"x" * (100 << 10))
            assert client.get("kept") == b"1"
    finally:
        server.stop()


def test_keys_and_saved_users_survive_kill_9(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    with server.connect() as client:
        client.acl_setuser(
            "m-1",
            enabled=True,
            passwords=["+secret"],
            keys=["c0:m:1:*"],
            channels=["c0:m:1:*"],
            commands=["+get", "+set"],
        )
        client.acl_save()
        client.config_set("appendfsync", "always")  # everysec may lose the last second
        client.set("c0:m:1:a", "1")
    pid = pid_of(server)
    os.kill(pid, signal.SIGKILL)
    until(lambda: identity_of(pid) is None, "redis to be dead")
    server.stop()

    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    try:
        machine = client_of(server, "m-1", "secret")
        assert machine.get("c0:m:1:a") == b"1"
        with pytest.raises(NoPermissionError):
            machine.get("c0:m:2:a")
        with pytest.raises(NoPermissionError):
            machine.publish("c0:m:2:g", "x")
        with server.connect() as client:
            assert set(client.acl_users()) == {"corral", "default", "m-1"}
    finally:
        server.stop()


def test_default_user_stays_off_whatever_was_saved(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    with server.connect() as client:
        client.execute_command("ACL", "SETUSER", "default", "on", "nopass", "~*", "+@all")
        client.acl_save()
    server.stop()
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    try:
        with pytest.raises(redis.AuthenticationError):
            client_of(server).ping()
    finally:
        server.stop()


def test_leftover_of_a_dead_run_is_ended_before_the_log_is_opened_again(tmp_path: Path) -> None:
    first = EmbeddedRedis(tmp_path / "redis")
    first.start()
    first.wait_ready()
    pid = pid_of(first)
    first.release()  # as if the process holding the lock had gone and the server had not
    second = EmbeddedRedis(tmp_path / "redis")
    second.start()
    second.wait_ready()
    try:
        assert identity_of(pid) is None
        assert pid_of(second) != pid
    finally:
        second.stop()
        first.stop()


def test_second_start_over_the_same_data_is_refused(redis_server: EmbeddedRedis) -> None:
    with pytest.raises(RuntimeError, match="another process already runs the redis-server"):
        EmbeddedRedis(redis_server.base).start()


def test_files_are_private(redis_server: EmbeddedRedis) -> None:
    for name in ("credentials.json", "redis.conf", "users.acl", "appendonly.aof"):
        assert (redis_server.base / name).stat().st_mode & 0o077 == 0, name


def test_a_long_log_is_rewritten_at_the_start_and_what_a_cut_off_rewrite_left_is_removed(
    tmp_path: Path,
) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    try:
        with server.connect() as client:
            value = "x" * (1 << 20)
            for _ in range(LOG_BYTES // len(value) + 1):
                client.set("same", value)
        log = tmp_path / "redis" / "appendonly.aof"
        server.stop()
        assert log.stat().st_size > LOG_BYTES
        (tmp_path / "redis" / "temp-rewriteaof-1.aof").write_text("half")
        server.start()
        server.wait_ready()
        server.compact()
        until(lambda: log.stat().st_size < LOG_BYTES, "the log is short")
        assert not list((tmp_path / "redis").glob("temp-rewriteaof-1.aof"))
        with server.connect() as client:
            assert client.get("same") == value.encode()
    finally:
        server.stop()
