"""A machine's Redis password is replaced while it works: both are valid until its agent has the new one, then one is.

The agent's part is the real one (workers/agent/renewal.py), on the machine's own Redis user; its beats are as it
writes them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
import redis
from asgiref.sync import sync_to_async
from django.db import connections
from django.utils import timezone
from redis.backoff import NoBackoff
from redis.retry import Retry

from autoscaler import launch, reconcile, renewal, services
from autoscaler.models import Machine, MachineState
from autoscaler.policy.passwords import MAX_OFFERS
from tests.autoscaler.conftest import Scaling
from workers import sealed
from workers.agent.renewal import Renewal
from workers.app import ConsumerConfig, make_app
from workers.contract import Heartbeat, ReplicaPhase
from workers.keys import MachineKeys
from workers.redis_address import parse_url, with_password_file
from workers.redis_client import Client, RedisError

DUE = timedelta(hours=3, seconds=1)
OFFER = timedelta(minutes=5)


def digest_of(url: str) -> str:
    return hashlib.sha256((parse_url(url).password_now() or "").encode()).hexdigest()


class Enrolled:
    """A machine as it knows itself, and as its row says."""

    def __init__(self, scaling: Scaling, path: Path) -> None:
        scaling.queue("a")
        scaling.tick()
        self.scaling, self.path, self.id = scaling, path, scaling.machine().id
        self.box_key = sealed.new_key()
        self.keys: MachineKeys = scaling.house.cell.keys.machine(self.id.hex)
        self.given = services.enrol(
            machine_id=self.id.hex,
            proof=scaling.provider.proofs[self.id.hex],
            capabilities={"box_public": sealed.public_of(self.box_key)},
            cell=scaling.house.cell,
        ).redis_url
        self.url = with_password_file(self.given, path)
        self.due = timezone.now() + DUE

    def row(self) -> Machine:
        return Machine.objects.get(id=self.id)

    def renew(self, at: datetime | None = None) -> Any:
        return renewal.renew(self.scaling.house, at or self.due)

    def beat(self) -> None:
        """What the agent says of its password, in its beat."""
        beat = Heartbeat(
            machine=self.id.hex,
            seq=1,
            at_ms=0,
            phase=ReplicaPhase.READY,
            password=digest_of(self.url),
        )
        self.scaling.house.cell.redis.set(self.keys.heartbeat(), msgspec.json.encode(beat))

    def digests(self) -> set[str]:
        return set(self.scaling.house.cell.user_digests(self.id.hex) or ())


@pytest.fixture
def enrolled(scaling: Scaling, tmp_path: Path) -> Enrolled:
    return Enrolled(scaling, tmp_path / "redis-password")


def _lets_in(url: str) -> bool:
    address = parse_url(url)
    with redis.Redis(
        host=address.host,
        port=address.port,
        username=address.username,
        password=address.password_now(),
        retry=Retry(NoBackoff(), 0),
    ) as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return False


async def _sync(call: Callable[[], Any]) -> Any:
    """In the thread that all such calls of the process share: its connection may have another test's role."""

    def alone() -> Any:
        connections.close_all()
        try:
            return call()
        finally:
            connections.close_all()

    return await sync_to_async(alone, thread_sensitive=True)()


async def _answers(client: Client) -> bool:
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        try:
            await client.connect()
            return bool(await client.call("PING") == b"PONG")
        except RedisError:
            continue
    return False


async def test_the_agent_takes_it_and_every_connection_of_the_old_one_ends(enrolled: Enrolled) -> None:
    client = Client(enrolled.url, name="agent")
    await client.connect()
    agent = Renewal(client, enrolled.keys, enrolled.box_key, enrolled.path)
    assert agent.digest == (await _sync(enrolled.row)).redis_password_digest
    thief = redis.Redis.from_url(enrolled.given, retry=Retry(NoBackoff(), 0))
    thief.ping()
    await _sync(enrolled.renew)
    assert len((await _sync(enrolled.row)).password_digests) == 2
    assert _lets_in(enrolled.given), "until the agent has it, the old one is good"
    box = thief.get(enrolled.keys.password)
    assert isinstance(box, bytes)
    with pytest.raises(sealed.BoxError):  # who has the password sees the box, and has no key to it
        sealed.open_box(sealed.new_key(), box.decode())
    await _sync(enrolled.renew)
    assert len(await _sync(enrolled.digests)) == 2, "nothing ends before the agent says so"

    assert await agent.look()
    assert not await agent.look()
    assert enrolled.path.stat().st_mode & 0o777 == 0o600
    enrolled.beat()
    assert agent.digest == (await _sync(enrolled.row)).redis_password_next
    await _sync(enrolled.renew)
    with pytest.raises(redis.ConnectionError):
        thief.get(enrolled.keys.desired)  # cut off, and not let in again
    assert not _lets_in(enrolled.given)
    assert _lets_in(enrolled.url)
    assert await _answers(client), "the agent's own client came back with the new one"
    consumer = ConsumerConfig(redis_url=enrolled.url, key_prefix=enrolled.keys.prefix, replica_id="r1")
    with make_app(consumer).connection_for_read() as broker:
        broker.ensure_connection(max_retries=1)
        assert broker.default_channel.client.ping()
    await client.close()
    row = await _sync(enrolled.row)
    assert (row.redis_password_next, row.redis_password_offers) == ("", 0)
    await _sync(enrolled.renew)
    assert (await _sync(enrolled.row)).redis_password_next == "", "the next one is due later"


def test_offers_that_are_not_taken_are_bounded_and_then_the_machine_is_replaced(enrolled: Enrolled) -> None:
    at, boxes = enrolled.due, set()
    for _ in range(MAX_OFFERS):
        enrolled.beat()
        enrolled.renew(at)
        boxes.add(enrolled.scaling.house.cell.redis.get(enrolled.keys.password))
        at += OFFER
        enrolled.renew(at)
        assert enrolled.digests() == {enrolled.row().redis_password_digest}
        assert not enrolled.scaling.house.cell.redis.exists(enrolled.keys.password)
    assert len(boxes) == MAX_OFFERS
    touched = enrolled.renew(at)
    row = enrolled.row()
    assert (row.state, row.reason) == (MachineState.DRAINING, "it took no new Redis password")
    assert row.ends_at is not None
    assert abs(row.ends_at - timezone.now() - timedelta(hours=2, minutes=45)) < timedelta(minutes=1)
    assert enrolled.scaling.provider.left == [row.provider_ref]
    assert touched == {enrolled.scaling.deployment.id}, "its replica's successor is ordered at once"
    assert _lets_in(enrolled.given), "it drains with the password it has"
    thief = redis.Redis.from_url(enrolled.given, retry=Retry(NoBackoff(), 0))
    thief.ping()
    enrolled.renew(enrolled.due + timedelta(hours=3))
    assert enrolled.digests() == set() and not _lets_in(enrolled.given)
    with pytest.raises(redis.ConnectionError):
        thief.ping()
    assert reconcile.restore(enrolled.scaling.house) == 0, "nobody makes it again"
    assert not _lets_in(enrolled.given)


def test_a_silent_machine_is_not_locked_out_of_what_it_may_have_taken(enrolled: Enrolled) -> None:
    enrolled.renew()
    enrolled.renew(enrolled.due + 2 * OFFER)
    assert len(enrolled.digests()) == 2
    assert len(enrolled.row().password_digests) == 2


@pytest.mark.parametrize("half", ["offered", "taken"])
async def test_an_emptied_redis_locks_nobody_out_and_the_renewal_goes_on(
    enrolled: Enrolled, half: str
) -> None:
    """Its users, the box and what the agent said are gone; rows and the machine's own file are not."""
    client = Client(enrolled.url, name="agent")
    await client.connect()
    agent = Renewal(client, enrolled.keys, enrolled.box_key, enrolled.path)
    await _sync(enrolled.renew)
    if half == "taken":
        assert await agent.look()
    cell = enrolled.scaling.house.cell

    def emptied() -> None:
        cell.redis.acl_deluser(f"m-{enrolled.id.hex}")
        cell.redis.delete(enrolled.keys.password, enrolled.keys.heartbeat())
        reconcile.restore(enrolled.scaling.house)

    await _sync(emptied)
    assert _lets_in(enrolled.url) and _lets_in(enrolled.given)
    enrolled.beat()
    at = enrolled.due + OFFER
    await _sync(lambda: enrolled.renew(at))  # the offer is over, or has been taken
    assert _lets_in(enrolled.url)
    if half == "offered":
        await _sync(lambda: enrolled.renew(at))
        assert await _answers(client) and await agent.look()
        enrolled.beat()
        await _sync(lambda: enrolled.renew(at))
    row = await _sync(enrolled.row)
    assert row.password_digests == (agent.digest,)
    assert _lets_in(enrolled.url) and not _lets_in(enrolled.given)
    await client.close()


def test_a_redis_with_passwords_of_an_earlier_day_lets_in_as_the_row_says(enrolled: Enrolled) -> None:
    cell = enrolled.scaling.house.cell
    cell.set_user(enrolled.id.hex, "0" * 64)
    assert reconcile.restore(enrolled.scaling.house) == 1
    assert enrolled.digests() == {enrolled.row().redis_password_digest}
    assert reconcile.restore(enrolled.scaling.house) == 0


def test_control_that_died_at_any_point_is_followed_by_one_that_goes_on(
    enrolled: Enrolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call to Redis fails once, before or after it was done; the machine is let in by what it says, all along."""
    from autoscaler.cell import Cell

    class Died(redis.RedisError):
        pass

    for name in ("set_user", "offer_password", "disconnect", "end_offer"):
        for is_done in (False, True):
            real = getattr(Cell, name)

            def failing(*args: Any, real: Any = real, is_done: bool = is_done) -> Any:
                if is_done:
                    real(*args)
                raise Died

            Machine.objects.update(redis_password_at=timezone.now())
            at = timezone.now() + DUE
            for attempt in range(3):
                with monkeypatch.context() as patch:
                    if attempt == 0:
                        patch.setattr(Cell, name, failing)
                    for _ in range(3):
                        enrolled.renew(at)
                        box = enrolled.scaling.house.cell.redis.getdel(enrolled.keys.password)
                        if isinstance(box, bytes):
                            enrolled.path.write_bytes(sealed.open_box(enrolled.box_key, box.decode()))
                        assert _lets_in(enrolled.url), (name, is_done, attempt)
                        enrolled.beat()
                at += OFFER
            row = enrolled.row()
            assert row.redis_password_at and row.redis_password_at > timezone.now() + DUE / 2, "replaced"
            assert row.password_digests == (digest_of(enrolled.url),), (name, is_done)
            assert enrolled.digests() == set(row.password_digests), (name, is_done)


def test_a_machine_that_goes_meanwhile_gets_no_user_again(
    enrolled: Enrolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler.cell import Cell

    real, cell = Cell.set_user, enrolled.scaling.house.cell

    def ends_first(self: Cell, machine: str, *digests: str) -> None:
        launch.gone(enrolled.id, "ended by a test", cell)
        real(self, machine, *digests)

    monkeypatch.setattr(Cell, "set_user", ends_first)
    enrolled.renew()
    assert not cell.has_user(enrolled.id.hex)
    real(cell, enrolled.id.hex, "0" * 64)  # as a watcher with a table of a moment ago would
    reconcile.restore(enrolled.scaling.house)
    assert not cell.has_user(enrolled.id.hex)


def test_a_password_that_ended_while_redis_was_away_lets_nobody_in_for_long(
    enrolled: Enrolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    from autoscaler.cell import Cell

    def away(*_: Any) -> None:
        raise redis.ConnectionError

    over = enrolled.due + timedelta(hours=3)
    Machine.objects.update(state=MachineState.DRAINING, ends_at=over)
    with monkeypatch.context() as patch:
        patch.setattr(Cell, "delete_user", away)
        enrolled.renew(over + timedelta(hours=1))
    assert enrolled.row().redis_password_digest == "" and _lets_in(enrolled.given)
    assert reconcile.restore(enrolled.scaling.house) == 1
    assert not _lets_in(enrolled.given)


def test_the_oldest_password_comes_first_whether_or_not_it_was_ever_replaced(
    enrolled: Enrolled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More machines than one pass looks at, most of them new, do not keep it from one whose time is up."""
    monkeypatch.setattr(renewal, "MAX_PER_PASS", 1)
    Machine.objects.update(redis_password_at=timezone.now())
    row = enrolled.row()
    row.pk, row.command_id, row.pool_slot, row.provider_ref = uuid4(), uuid4(), None, ""
    row.enroll_used_at, row.redis_password_at = timezone.now() + timedelta(hours=1), None
    row._state.adding = True
    row.save()
    enrolled.renew()
    assert enrolled.row().redis_password_next


def test_a_machine_that_can_open_nothing_is_replaced(enrolled: Enrolled) -> None:
    Machine.objects.update(capabilities={})
    enrolled.renew()
    assert enrolled.row().reason == "its agent can open no new Redis password"
    Machine.objects.update(
        capabilities={"box_public": "nonsense"}, state=MachineState.ENROLLED, ends_at=None, reason=""
    )
    for _ in range(MAX_OFFERS + 1):
        enrolled.renew()
    assert enrolled.row().state == MachineState.DRAINING


async def test_a_box_that_is_not_for_this_machine_is_thrown_away(enrolled: Enrolled) -> None:
    client = Client(enrolled.url, name="agent")
    await client.connect()
    box = sealed.seal_for(sealed.public_of(sealed.new_key()), b"x")
    await client.call("SET", enrolled.keys.password, box)
    agent = Renewal(client, enrolled.keys, enrolled.box_key, enrolled.path)
    before = agent.digest
    assert not await agent.look()
    assert await client.call("EXISTS", enrolled.keys.password) == 0
    assert not enrolled.path.exists() and agent.digest == before
    await client.close()
