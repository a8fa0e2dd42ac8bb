"""The pipelining client and the subscriber, against a real Redis; faults against a peer that misbehaves."""

import asyncio
import contextlib
import datetime
import gc
import hashlib
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from infra.local.redis import EmbeddedRedis
from tests.workers.resp_server import Command, resp_server
from tests.workers.waiting import until
from workers.redis_client import (
    Client,
    RedisOverloaded,
    RedisUnavailable,
    ResponseError,
    Script,
    Subscriber,
    parse_url,
)


def script_of(source: str) -> Script:
    return Script("test", source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


COUNT = script_of("return redis.call('INCR', KEYS[1])")


@contextlib.asynccontextmanager
async def connected(url: str, **options: object) -> AsyncIterator[Client]:
    client = Client(url, name="test", **options)  # type: ignore[arg-type]
    await client.connect(10.0)
    try:
        yield client
    finally:
        await client.close()


@pytest.fixture
def admin(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


# -- calls


async def test_every_concurrent_call_gets_its_own_reply(redis_url: str) -> None:
    async with connected(redis_url) as client:
        await asyncio.gather(*(client.call("SET", f"k{n}", n) for n in range(500)))
        values = await asyncio.gather(*(client.call("GET", f"k{n}") for n in range(500)))
        assert values == [str(n).encode() for n in range(500)]


async def test_an_error_reply_fails_its_own_call_only(redis_url: str) -> None:
    async with connected(redis_url) as client:
        first, wrong, last = client.call("SET", "k", "v"), client.call("INCR", "k"), client.call("GET", "k")
        assert await first == b"OK"
        with pytest.raises(ResponseError) as error:
            await wrong
        assert error.value.code == "ERR"
        assert await last == b"v"


async def test_cancelling_a_call_does_not_shift_the_replies_of_others(redis_url: str) -> None:
    async with connected(redis_url) as client:
        calls = [client.call("ECHO", str(n)) for n in range(10)]
        calls[3].cancel()
        assert await asyncio.gather(*(c for c in calls if not c.cancelled())) == [
            str(n).encode() for n in range(10) if n != 3
        ]


async def test_calls_of_one_loop_pass_leave_in_one_write() -> None:
    async with resp_server() as (peer, address), connected(f"redis://{address}") as client:
        await asyncio.gather(*(client.call("SET", n, "v") for n in range(50)))
        assert len(peer.commands) == 50
        assert len(peer.chunks) == 1


async def test_arguments_of_other_types_are_refused_before_anything_is_sent(redis_url: str) -> None:
    async with connected(redis_url) as client:
        with pytest.raises(TypeError):
            client.call("SET", "k", None)  # type: ignore[arg-type]
        assert await client.call("GET", "k") is None


async def test_close_waits_for_answers_in_flight(redis_url: str, admin: redis.Redis) -> None:
    async with connected(redis_url) as client:
        for _ in range(1000):
            client.fire("INCR", "n")
        pending = client.call("INCR", "n")
    assert await pending == 1001


async def test_failures_of_fired_commands_are_counted_and_logged_once_without_arguments(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(redis_url) as client:
        client.fire("SET", "secret-key", "v")
        for _ in range(3):
            client.fire("LPUSH", "secret-key", "secret-value")
        await client.call("PING")
        assert client.n_fire_errors == 3
    lines = [record.getMessage() for record in caplog.records if "fire-and-forget" in record.getMessage()]
    assert len(lines) == 1
    assert "WRONGTYPE" in lines[0]
    assert "secret" not in caplog.text


# -- scripts


async def test_scripts_are_loaded_on_connect_and_again_when_redis_forgot_them(
    redis_url: str, admin: redis.Redis
) -> None:
    async with connected(redis_url, scripts=[COUNT]) as client:
        assert admin.script_exists(COUNT.sha) == [True]
        admin.script_flush()
        assert await asyncio.gather(*(client.evalsha(COUNT, ["n"], []) for _ in range(3)))
        assert admin.get("n") == b"3"


async def test_a_user_who_may_not_load_scripts_waits_for_the_trusted_side(
    redis_url: str, admin: redis.Redis
) -> None:
    admin.acl_setuser("limited", enabled=True, passwords=["+pw"], keys=["*"], commands=["+evalsha", "+incr"])
    url = redis_url.replace(redis_url.split("//")[1].split("@")[0], "limited:pw")
    async with connected(url, scripts=[COUNT], may_load_scripts=False) as client:
        pending = client.evalsha(COUNT, ["n"], [])
        await asyncio.sleep(0)
        admin.script_load(COUNT.source)
        assert await pending == 1
        admin.script_flush()
        with pytest.raises(RedisUnavailable) as error:
            await client.evalsha(COUNT, ["n"], [])
        assert not error.value.maybe_applied
        assert admin.get("n") == b"1"


# -- outages


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    server.wait_ready()
    yield server
    server.destroy()


async def test_calls_fail_at_once_while_redis_is_away_and_work_again_after_its_return(
    own_redis: EmbeddedRedis,
) -> None:
    async with connected(own_redis.url()) as client:
        own_redis.stop()
        await until(lambda: not client.connected, "the client to notice")
        with pytest.raises(RedisUnavailable) as error:
            await client.call("SET", "k", "v")
        assert not error.value.maybe_applied
        client.fire("SET", "k", "v")
        assert client.n_fire_errors == 1
        own_redis.start()
        await client.connect(10.0)
        assert await client.call("SET", "k", "v") == b"OK"
        assert client.n_disconnects == 1


async def test_calls_on_the_wire_when_the_connection_breaks_may_have_been_applied() -> None:
    def hang_up(command: Command) -> bytes | None:
        if command[0] == b"DIE":
            raise ConnectionResetError
        return b"+OK\r\n"

    async with resp_server() as (peer, address), connected(f"redis://{address}") as client:
        peer.behaviour = hang_up
        calls = [client.call("SET", "k", "v"), client.call("DIE"), client.call("SET", "k", "w")]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert results[0] == b"OK"
        assert [type(result) for result in results[1:]] == [RedisUnavailable] * 2
        assert all(result.maybe_applied for result in results[1:] if isinstance(result, RedisUnavailable))
        await until(lambda: client.connected, "the next connection")
        assert await client.call("SET", "k", "v") == b"OK"


async def test_a_call_repeated_the_moment_its_connection_breaks_fails_at_once() -> None:
    def hang_up(command: Command) -> bytes | None:
        raise ConnectionResetError

    async def insist(client: Client) -> None:
        with pytest.raises(RedisUnavailable):
            await client.call("SET", "k", "v")
        with pytest.raises(RedisUnavailable) as error:
            await asyncio.wait_for(client.call("SET", "k", "v"), 5)
        assert not error.value.maybe_applied

    async with resp_server() as (peer, address), connected(f"redis://{address}") as client:
        peer.behaviour = hang_up
        await asyncio.gather(*(insist(client) for _ in range(3)))


async def test_an_overdue_reply_fails_everything_in_flight_and_opens_a_new_connection() -> None:
    async with (
        resp_server() as (peer, address),
        connected(f"redis://{address}", call_timeout_s=0.2) as client,
    ):
        peer.behaviour = lambda command: None
        calls = [client.call("SET", "k", n) for n in range(3)]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(result, RedisUnavailable)
            assert result.maybe_applied
        await until(lambda: client.connected and peer.n_connections == 2, "the next connection")


async def test_a_full_pipeline_refuses_more_calls_and_sends_nothing() -> None:
    async with (
        resp_server() as (peer, address),
        connected(f"redis://{address}", max_in_flight=10) as client,
    ):
        peer.behaviour = lambda command: None
        calls = [client.call("SET", "k", n) for n in range(10)]
        with pytest.raises(RedisOverloaded) as error:
            await client.call("SET", "k", 10)
        assert not error.value.maybe_applied
        client.fire("SET", "k", 11)
        assert client.n_fire_errors == 1
        await until(lambda: len(peer.commands) == 10, "the first ten")
        for call in calls:
            call.cancel()


async def test_a_demoted_primary_is_left_behind() -> None:
    async with resp_server() as (peer, address), connected(f"redis://{address}") as client:
        peer.behaviour = lambda command: b"-READONLY You can't write against a read only replica.\r\n"
        with pytest.raises(RedisUnavailable) as error:
            await client.call("SET", "k", "v")
        assert not error.value.maybe_applied
        await until(lambda: peer.n_connections == 2, "a new connection")


async def test_no_connection_within_the_timeout_says_so_and_goes_on_trying(
    caplog: pytest.LogCaptureFixture,
) -> None:
    client = Client("redis://user:hunter2@127.0.0.1:1/0", name="test")
    with pytest.raises(RedisUnavailable, match=r"127\.0\.0\.1:1"):
        await client.connect(0.1)
    await client.close()
    assert "hunter2" not in caplog.text


async def test_a_wrong_password_is_an_outage_and_never_logged(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    client = Client(redis_url.replace("@", "wrong@"), name="test")
    with pytest.raises(RedisUnavailable):
        await client.connect(0.3)
    await client.close()
    assert "WRONGPASS" in caplog.text
    assert str(parse_url(redis_url).password) not in caplog.text


async def test_closing_leaves_no_task_behind(redis_url: str) -> None:
    before = len(asyncio.all_tasks())
    async with connected(redis_url) as client:
        await client.call("PING")
    gc.collect()
    assert len(asyncio.all_tasks()) == before
    with pytest.raises(RedisUnavailable):
        await client.call("PING")


# -- addresses


def test_url_parts() -> None:
    address = parse_url("redis://m-1:p%40ss@cell.example:6380/3")
    assert (address.host, address.port, address.db) == ("cell.example", 6380, 3)
    assert (address.username, address.password, address.tls) == ("m-1", "p@ss", None)
    assert "p@ss" not in repr(address)
    assert parse_url("unix:///run/redis.sock?db=2").path == "/run/redis.sock"
    assert parse_url("unix:///run/redis.sock?db=2").db == 2


@pytest.mark.parametrize("url", ["http://x", "redis://x/one", "x:6379"])
def test_a_bad_url_names_what_is_wrong(url: str) -> None:
    with pytest.raises(ValueError, match=r"Redis URL: (scheme|database)"):
        parse_url(url)


async def test_a_unix_socket(tmp_path: Path) -> None:
    async with resp_server(path=tmp_path / "s") as (_, path), connected(f"unix://{path}") as client:
        assert await client.call("SET", "k", "v") == b"OK"


async def test_tls_verifies_the_server(tmp_path: Path) -> None:
    context, ca_path = _self_signed(tmp_path)
    async with resp_server(tls=context) as (_, address):
        async with connected(f"rediss://{address}?ssl_ca_certs={ca_path}") as client:
            assert await client.call("SET", "k", "v") == b"OK"
        stranger = Client(f"rediss://{address}", name="test")
        with pytest.raises(RedisUnavailable):
            await stranger.connect(0.3)
        await stranger.close()


def _self_signed(directory: Path) -> tuple[ssl.SSLContext, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    certificate_path, key_path = directory / "cert.pem", directory / "key.pem"
    certificate_path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    key_path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_path, key_path)
    return context, certificate_path


# -- subscriber


class Heard:
    """What a subscriber was told, in order."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def message(self, channel: bytes, payload: bytes) -> None:
        if payload == b"bad":
            raise ValueError("payload of a tenant")
        self.events.append((channel, payload))

    def gap(self) -> None:
        self.events.append("gap")


@contextlib.asynccontextmanager
async def subscribed(url: str, **options: float) -> AsyncIterator[tuple[Subscriber, Heard]]:
    heard = Heard()
    subscriber = Subscriber(url, name="test", on_message=heard.message, on_gap=heard.gap, **options)
    subscriber.start()
    try:
        yield subscriber, heard
    finally:
        await subscriber.close()


async def test_channels_and_patterns_deliver_channel_and_payload(redis_url: str, admin: redis.Redis) -> None:
    async with subscribed(redis_url) as (subscriber, heard):
        await subscriber.subscribe("a", "b")
        await subscriber.psubscribe("m:*:g:1")
        assert admin.publish("a", b"\xff1") + admin.publish("m:9:g:1", "2") + admin.publish("c", "3") == 2
        await until(lambda: len(heard.events) == 2, "both messages")
        assert heard.events == [(b"a", b"\xff1"), (b"m:9:g:1", b"2")]
        subscriber.unsubscribe("a")
        await until(lambda: admin.publish("a", "x") == 0, "the unsubscription")
        assert admin.publish("b", "x") == 1


async def test_a_lost_connection_is_told_as_a_gap_once_the_subscriptions_stand_again(
    redis_url: str, admin: redis.Redis
) -> None:
    async with subscribed(redis_url) as (subscriber, heard):
        await subscriber.subscribe("a")
        await subscriber.psubscribe("p*")
        admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: "gap" in heard.events, "the gap")
        assert admin.publish("a", "1") + admin.publish("p", "2") == 2
        await until(lambda: len(heard.events) == 3, "messages after the gap")
        assert heard.events == ["gap", (b"a", b"1"), (b"p", b"2")]
        assert subscriber.n_gaps == 1


async def test_subscribing_while_redis_is_away_takes_effect_on_its_return(own_redis: EmbeddedRedis) -> None:
    async with subscribed(own_redis.url()) as (subscriber, heard):
        await subscriber.subscribe("a")
        own_redis.stop()
        await until(lambda: not subscriber.connected, "the subscriber to notice")
        with pytest.raises(RedisUnavailable):
            await subscriber.subscribe("b", timeout_s=0.05)
        own_redis.start()
        await until(lambda: subscriber.connected, "its return")
        with own_redis.connect() as admin:
            assert admin.publish("b", "1") == 1
        await until(lambda: (b"b", b"1") in heard.events, "the message")


async def test_a_refused_subscription_raises_and_harms_no_other(redis_url: str, admin: redis.Redis) -> None:
    admin.acl_setuser(
        "deaf", enabled=True, passwords=["+pw"], channels=["mine:*"], commands=["+@pubsub", "+ping"]
    )
    url = redis_url.replace(redis_url.split("//")[1].split("@")[0], "deaf:pw")
    async with subscribed(url) as (subscriber, heard):
        await subscriber.subscribe("mine:1")
        with pytest.raises(ResponseError) as error:
            await subscriber.subscribe("theirs:1")
        assert error.value.code == "NOPERM"
        admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: "gap" in heard.events, "the next connection")
        assert admin.publish("mine:1", "1") == 1


async def test_a_failing_callback_is_counted_and_loses_no_other_message(
    redis_url: str, admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async with subscribed(redis_url) as (subscriber, heard):
        await subscriber.subscribe("a")
        for payload in ("1", "bad", "bad", "2"):
            admin.publish("a", payload)
        await until(lambda: len(heard.events) == 2, "the good messages")
        assert subscriber.n_callback_errors == 2
    assert caplog.text.count("message callback failed") == 1
    assert "payload of a tenant" not in caplog.text


async def test_a_peer_that_stops_answering_is_left() -> None:
    def subscribe_only(command: Command) -> bytes | None:
        return b"*3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n" if command[0] == b"SUBSCRIBE" else None

    async with resp_server() as (peer, address):
        peer.behaviour = subscribe_only
        peer.answers_later_pings = False
        async with subscribed(f"redis://{address}", ping_interval_s=0.05) as (subscriber, heard):
            await subscriber.subscribe("a")
            await until(lambda: peer.n_connections >= 2 and "gap" in heard.events, "a new connection")
            assert heard.events[0] == "gap"
