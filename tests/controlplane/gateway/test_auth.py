"""Keys: good, wrong, revoked, expired, suspended; what the cache may serve, how long, and what ends that."""

import asyncio
import hashlib
import re
import time
from typing import Any

import pytest
from msgspec.structs import replace

from controlplane.gateway.auth import KeyCache
from controlplane.gateway.directory import DirectoryUnavailable, LeaseRow, LimitsRow
from controlplane.gateway.errors import ApiError
from controlplane.tenants import api_keys
from tests.controlplane.gateway.harness import CHAT, KEYS, PEPPER, FakeDirectory, Machine, Running, until


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def directory() -> FakeDirectory:
    return FakeDirectory()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cache(directory: FakeDirectory, clock: Clock) -> KeyCache:
    return KeyCache(directory, PEPPER, fresh_s=30, stale_s=900, unknown_s=5, max_keys=4, clock=clock)


async def ask(cache: KeyCache, key: str) -> str:
    """ "ok" or the error's code."""
    try:
        await cache.authenticate(b"Bearer " + key.encode(), None)
    except ApiError as error:
        return error.code
    return "ok"


def lookup_of(key: str) -> str:
    lookup = api_keys.lookup_of(key)
    assert lookup
    return lookup


async def test_key_is_read_once_while_fresh(cache: KeyCache, directory: FakeDirectory, clock: Clock) -> None:
    key = directory.add_key()
    for _ in range(5):
        assert await ask(cache, key) == "ok"
    assert directory.n_found == 1
    clock.now += 31
    assert await ask(cache, key) == "ok"
    assert directory.n_found == 2


@pytest.mark.parametrize("is_cached", [False, True])
async def test_a_wrong_secret_is_asked_for_exactly_like_an_unknown_key(
    cache: KeyCache, directory: FakeDirectory, clock: Clock, is_cached: bool
) -> None:
    """Whether its lookup part exists, or is cached even, must not show in how often Postgres is asked."""
    key = directory.add_key()
    if is_cached:
        assert await ask(cache, key) == "ok"
    asked = []
    for wrong in (key[:-2] + "AA", api_keys.generate(PEPPER).plaintext):
        before = directory.n_found
        for pause_s in (0.0, 1.0, 5.0, 0.0):
            clock.now += pause_s
            assert await ask(cache, wrong) == "invalid_api_key"
        asked.append(directory.n_found - before)
    assert asked == [2, 2]
    assert await ask(cache, key) == "ok", "and the right one is not locked out by who guesses"


async def test_a_wrong_secret_while_postgres_is_away_is_told_like_an_unknown_key(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    key = directory.add_key()
    assert await ask(cache, key) == "ok"
    directory.up = False
    assert await ask(cache, key[:-2] + "AA") == "auth_unavailable"
    assert await ask(cache, api_keys.generate(PEPPER).plaintext) == "auth_unavailable"
    assert await ask(cache, key) == "ok"


async def test_a_refusal_comes_at_the_same_instant_however_long_the_search_took(
    cache: KeyCache, directory: FakeDirectory, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Postgres touched for a public part that exists takes longer, which nobody must be able to measure."""

    async def sleep(seconds: float) -> None:
        clock.now += seconds

    find, takes_s = directory.find, iter((0.0005, 0.0012, 0.004))

    async def slow(lookup: str, digests: tuple[bytes, ...]) -> Any:
        clock.now += next(takes_s)
        return await find(lookup, digests)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(directory, "find", slow)
    ends = []
    for _ in range(3):
        began_s = clock.now
        assert await ask(cache, api_keys.generate(PEPPER).plaintext) == "invalid_api_key"
        ends.append(clock.now - began_s)
    assert ends == [pytest.approx(0.005)] * 3


async def test_the_memory_of_refused_keys_is_bounded(cache: KeyCache, directory: FakeDirectory) -> None:
    for first in range(0, 5_000, 50):  # together, for each refusal takes its time
        await asyncio.gather(*(ask(cache, f"sk-{n}") for n in range(first, first + 50)))
    assert len(cache._refused) <= 4_096 and not cache._asking


# -- imported keys: of them only the SHA-256 was known


def imported(directory: FakeDirectory, text: str) -> str:
    """A row as an import makes it; its lookup part."""
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    lookup = api_keys.foreign_lookup(PEPPER, sha256)
    record = directory.records.pop(lookup_of(directory.add_key()))
    digest = api_keys.foreign_digest(PEPPER, sha256).hex()
    directory.records[lookup] = replace(record, key=replace(record.key, lookup=lookup, digest=digest))
    return lookup


async def test_an_imported_key_works_and_is_stored_like_every_other_from_its_first_use_on(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    text = "sk-Zx9_made-elsewhere"
    lookup = imported(directory, text)
    assert await ask(cache, text) == "ok"
    await until(lambda: directory.noted == [f"key:{lookup}"])
    assert directory.records[lookup].key.digest == api_keys.digest(PEPPER, text).hex()
    cache.invalidate(f"key:{lookup}")
    assert await ask(cache, text) == "ok"
    assert await ask(cache, text + "x") == "invalid_api_key"
    cache.doubt_all()
    assert await ask(cache, text) == "ok"
    assert directory.noted == [f"key:{lookup}"], "once"


async def test_an_imported_key_works_where_it_cannot_be_rehashed_yet(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    text = "sk-made-elsewhere"
    lookup = imported(directory, text)
    rehash = directory.rehash

    async def fails(*args: Any) -> None:
        raise DirectoryUnavailable

    directory.rehash = fails  # type: ignore[method-assign]
    assert await ask(cache, text) == "ok"
    await until(lambda: not cache._rehashing)
    assert directory.noted == []
    directory.rehash = rehash  # type: ignore[method-assign]
    cache.doubt_all()
    assert await ask(cache, text) == "ok"
    await until(lambda: directory.noted == [f"key:{lookup}"])


async def test_the_sha256_of_an_imported_key_is_no_key(cache: KeyCache, directory: FakeDirectory) -> None:
    """Who stole the other gateway's table has that."""
    text = "sk-made-elsewhere"
    imported(directory, text)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    for stolen in (sha256, f"sk-{sha256}"):
        assert await ask(cache, stolen) == "invalid_api_key"


def test_nothing_stored_of_an_imported_key_shows_its_sha256() -> None:
    sha256 = hashlib.sha256(b"sk-1234").hexdigest()
    for pepper in (PEPPER, b"another-pepper-of-16-bytes"):
        lookup, digest = api_keys.foreign_lookup(pepper, sha256), api_keys.foreign_digest(pepper, sha256)
        assert re.fullmatch("[0-9A-Za-z]{12}", lookup)
        assert digest.hex() != sha256 and digest != api_keys.digest(pepper, "sk-1234")
    assert api_keys.foreign_lookup(PEPPER, sha256) != lookup, "only who has the pepper can tell"


async def test_unknown_key_is_remembered_shortly(
    cache: KeyCache, directory: FakeDirectory, clock: Clock
) -> None:
    key = api_keys.generate(PEPPER).plaintext
    for _ in range(5):
        assert await ask(cache, key) == "invalid_api_key"
    assert directory.n_found == 1
    clock.now += 6
    await ask(cache, key)
    assert directory.n_found == 2


async def test_key_made_after_it_was_asked_for_works_when_announced(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    key = directory.add_key()
    record = directory.records.pop(lookup_of(key))
    assert await ask(cache, key) == "invalid_api_key"
    directory.records[lookup_of(key)] = record
    cache.invalidate(f"key:{lookup_of(key)}")
    assert await ask(cache, key) == "ok"


@pytest.mark.parametrize("away", [False, True])
async def test_announced_revoke_is_never_served(
    cache: KeyCache, directory: FakeDirectory, away: bool
) -> None:
    key = directory.add_key()
    assert await ask(cache, key) == "ok"
    directory.change(key, revoked_at_ms=1)
    directory.up = not away
    cache.invalidate(f"key:{lookup_of(key)}")
    assert await ask(cache, key) == ("auth_unavailable" if away else "revoked_api_key")


async def test_change_announced_while_the_key_is_being_read_is_not_lost(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    """The answer may be older than the announcement: it serves who asked, and is read again by the next."""
    key = directory.add_key()
    find = directory.find

    async def find_and_revoke(lookup: str, digests: tuple[bytes, ...]) -> object:
        found = await find(lookup, digests)
        directory.change(key, revoked_at_ms=1)
        cache.invalidate(f"key:{lookup}")
        return found

    directory.find = find_and_revoke  # type: ignore[method-assign, assignment]
    assert await ask(cache, key) == "ok"
    assert await ask(cache, key) == "revoked_api_key"


@pytest.mark.parametrize("ref", ["prj:" + "1" * 32, "dep:" + "d" * 32, "org:" + "0" * 32, "all"])
async def test_other_announcements_make_it_read_again(
    cache: KeyCache, directory: FakeDirectory, ref: str
) -> None:
    key = directory.add_key()
    await ask(cache, key)
    cache.invalidate("prj:" + "9" * 32)
    await ask(cache, key)
    assert directory.n_found == 1, "not its project"
    cache.invalidate(ref)
    assert await ask(cache, key) == "ok"
    assert directory.n_found == 2


async def test_stale_key_serves_through_an_outage_for_a_bounded_time(
    cache: KeyCache, directory: FakeDirectory, clock: Clock
) -> None:
    key, never_seen = directory.add_key(), directory.add_key()
    await ask(cache, key)
    directory.up = False
    clock.now += 800
    assert await ask(cache, key) == "ok"
    assert await ask(cache, never_seen) == "auth_unavailable"
    cache.doubt_all()
    assert await ask(cache, key) == "ok", "a missed announcement is a doubt, not a revoke"
    clock.now += 101
    assert await ask(cache, key) == "auth_unavailable"
    directory.up = True
    assert await ask(cache, key) == "ok"


async def test_suspended_organization_is_not_served_from_the_cache_in_an_outage(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    key = directory.add_key()
    await ask(cache, key)
    directory.up = False
    cache.invalidate("org:" + "0" * 32)
    assert await ask(cache, key) == "auth_unavailable"


async def test_expiry_needs_no_announcement(cache: KeyCache, directory: FakeDirectory) -> None:
    key = directory.add_key(expires_at_ms=int(time.time() * 1000) + 150)
    assert await ask(cache, key) == "ok"

    async def expired() -> bool:
        return await ask(cache, key) == "expired_api_key"

    await until(expired)
    assert directory.n_found == 1


async def test_cache_is_bounded(cache: KeyCache, directory: FakeDirectory) -> None:
    keys = [directory.add_key() for _ in range(10)]
    for key in keys:
        assert await ask(cache, key) == "ok"
    assert len(cache._entries) <= 4
    assert len(cache._verified) <= 4
    for key in keys:
        assert await ask(cache, key) == "ok"


async def test_dropped_entry_is_not_revived_through_its_header(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    """Evicted from the bounded cache, then revoked: the header's old entry must not answer."""
    key = directory.add_key()
    await ask(cache, key)
    for _ in range(4):
        await ask(cache, directory.add_key())
    directory.change(key, revoked_at_ms=1)
    cache.invalidate(f"key:{lookup_of(key)}")
    assert await ask(cache, key) == "revoked_api_key"


# -- over HTTP


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Bearer sk-wrong"}, "invalid_api_key"),
        ({"authorization": "Basic dXNlcjpwYXNz"}, "invalid_api_key"),
        ({"authorization": "Bearer"}, "invalid_api_key"),
        ({"authorization": "Bearer " + "x" * 5000}, "invalid_api_key"),
        ({"authorization": "Bearer " + api_keys.generate(PEPPER).plaintext}, "invalid_api_key"),
        ({"x-api-key": "sk-wrong"}, "invalid_api_key"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
async def test_bad_key_is_a_401_with_a_code(
    gw: Running, headers: dict[str, str], code: str, path: str
) -> None:
    if path == "/v1/models":
        response = await gw.http.get(path, headers=headers)
    else:
        response = await gw.http.post(path, json=CHAT, headers=headers)
    assert response.status_code == 401
    assert response.json()["error"]["code"] == code
    assert response.headers["www-authenticate"] == "Bearer"


async def test_key_may_come_as_x_api_key(gw: Running, machine: Machine) -> None:
    response = await gw.http.post("/v1/chat/completions", json=CHAT, headers={"x-api-key": gw.key})
    assert response.status_code == 200


async def test_revoked_and_suspended_are_told_apart(gw: Running) -> None:
    revoked = gw.directory.add_key(revoked_at_ms=1)
    response = await gw.http.get("/v1/models", headers=gw.auth(revoked))
    assert (response.status_code, response.json()["error"]["code"]) == (401, "revoked_api_key")
    suspended = gw.directory.add_key()
    record = gw.directory.records[lookup_of(suspended)]
    from msgspec.structs import replace

    organization = replace(record.organization, suspended_at_ms=1)
    gw.directory.records[lookup_of(suspended)] = replace(record, organization=organization)
    response = await gw.http.get("/v1/models", headers=gw.auth(suspended))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "organization_suspended")


@pytest.mark.parametrize("by", ["announcement", "note"])
async def test_revoke_takes_effect_within_a_second(gw: Running, by: str) -> None:
    """By the announcement on Redis, and by the note in Postgres should that be lost."""
    assert (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 200
    gw.directory.change(gw.key, revoked_at_ms=1)
    ref = f"key:{lookup_of(gw.key)}"
    if by == "note":
        gw.directory.noted.append(ref)
    else:
        await gw.redis.publish(KEYS.invalidate_channel, ref)

    async def refused() -> bool:
        return (await gw.http.get("/v1/models", headers=gw.auth())).status_code == 401

    await until(refused, 5.0)


# -- several cells: the limits in a context are this cell's part of them, as long as the lease lasts


def leased(directory: FakeDirectory, key: str, ppm: int, left_ms: int, /, **budgets: int) -> None:
    """This cell's part of the key's limits becomes this."""
    lookup = lookup_of(key)
    record = directory.records[lookup]
    directory.records[lookup] = replace(record, lease=LeaseRow(ppm, left_ms, budgets))


async def test_a_context_holds_the_cells_part_of_every_limit(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    limits = LimitsRow(rpm=7, input_tpm=1000, output_tpm=999, max_concurrency=3, budget_nano=5_000)
    key = directory.add_key(key_limits=limits)
    leased(directory, key, 500_000, 60_000, key=1_234)
    context = await cache.authenticate(b"Bearer " + key.encode(), None)
    assert context.scopes[0][2] == (3, 500, 499, 1, 1_234)
    assert context.scopes[2][2] == (-1, -1, -1, -1, -1), "no limit stays none"


async def test_a_part_is_not_used_beyond_its_lease_even_with_postgres_away(
    cache: KeyCache, directory: FakeDirectory, clock: Clock
) -> None:
    key = directory.add_key(key_limits=LimitsRow(rpm=10))
    leased(directory, key, 500_000, 20_000)
    assert await ask(cache, key) == "ok"
    directory.up = False
    clock.now += 19.9
    assert await ask(cache, key) == "ok"
    clock.now += 0.2
    assert await ask(cache, key) == "auth_unavailable", "the part may be another cell's by now"


async def test_without_a_lease_what_is_limited_gets_a_503_and_the_rest_is_served(
    cache: KeyCache, directory: FakeDirectory, clock: Clock
) -> None:
    limited, unlimited = directory.add_key(key_limits=LimitsRow(rpm=10)), directory.add_key()
    for key in (limited, unlimited):
        leased(directory, key, 0, 0)
    assert await ask(cache, limited) == "limits_unavailable"
    assert await ask(cache, unlimited) == "ok"
    n_found = directory.n_found
    assert await ask(cache, limited) == "limits_unavailable"
    assert directory.n_found == n_found, "and Postgres is not asked each time"
    leased(directory, limited, 1_000_000, 60_000)
    clock.now += 1.1
    assert await ask(cache, limited) == "ok"


async def test_a_changed_share_is_read_again_when_it_is_announced(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    key = directory.add_key(key_limits=LimitsRow(rpm=10), organization="e" * 32)
    leased(directory, key, 1_000_000, 60_000)
    assert (await cache.authenticate(b"Bearer " + key.encode(), None)).scopes[0][2][0] == 10
    leased(directory, key, 100_000, 60_000)
    cache.invalidate("lim:" + "e" * 32)
    assert (await cache.authenticate(b"Bearer " + key.encode(), None)).scopes[0][2][0] == 1


async def test_a_directory_that_does_not_compare_lets_nobody_in(
    cache: KeyCache, directory: FakeDirectory
) -> None:
    key = directory.add_key()
    find = directory.find

    async def careless(lookup: str, digests: tuple[bytes, ...]) -> Any:
        digest = bytes.fromhex(directory.records[lookup].key.digest)
        return await find(lookup, (digest,))

    directory.find = careless  # type: ignore[method-assign]
    assert await ask(cache, key[:-2] + "AA") == "invalid_api_key"
    assert await ask(cache, key) == "ok"
