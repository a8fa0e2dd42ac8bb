"""Rows of Redis and Postgres: restarted, replaced, empty, away."""

from __future__ import annotations

import asyncio

import pytest

from tests.protocol.rows.looking import LONG, SHORT, running, shown
from tests.protocol.world import World

# -- Redis


def test_redis_restarted_with_its_log_goes_on_or_fails_retryably(w: World) -> None:
    async def story() -> None:
        w.allowed_codes = {"cell_unavailable"}
        answers = [w.client.ask(f"question {i}", LONG) for i in range(4)]
        await shown(w, *answers)
        w.network.crash()
        await asyncio.sleep(1.0)
        w.network.start()
        await w.rest()
        assert all(a.complete for a in answers), "a second away is waited for"

    w.run(story())


def test_redis_back_empty_loses_no_money_and_fails_only_retryably(w: World) -> None:
    async def story() -> None:
        done = w.client.ask("done before", SHORT)
        await w.until(lambda: done.request in w.ledger.rows)
        w.forgot, w.allowed_codes = True, {"cell_unavailable", "request_lost"}
        answers = [w.client.ask(f"question {i}", LONG) for i in range(4)]
        await shown(w, *answers)
        w.network.crash()
        await asyncio.sleep(0.5)
        w.network.start(emptied=True)
        await w.until(lambda: all(a.over for a in answers))
        assert {a.status for a in answers} == {200}
        assert {a.code for a in answers} == {"request_lost"}
        await w.until(lambda: w.r.scard(w.keys.replicas(w.deployment)) == len(w.live_fronts()))
        again = w.client.ask("after", SHORT)
        await w.rest()
        assert again.complete
        assert {done.request, again.request} <= w.ledger.rows.keys(), "the spool remembers what Redis forgot"
        spent = int(w.r.hget(w.keys.limits("key", "0" * 32), "spent"))
        assert spent == sum(row.cost_nano for row in w.ledger.rows.values()), "counted from the ledger again"

    w.run(story())


def test_redis_replaced_by_a_replica_that_lags_shows_no_token_twice(w: World) -> None:
    async def story() -> None:
        w.forgot, w.allowed_codes = (
            True,
            {"cell_unavailable", "request_lost", "journal_unreadable", "answer_lost"},
        )
        answers = [w.client.ask(f"question {i}", LONG) for i in range(4)]
        await shown(w, *answers)
        kept = w.network.snapshot()
        await asyncio.sleep(0.4)
        w.network.crash()
        await asyncio.sleep(0.3)
        w.network.start(snapshot=kept)
        await w.rest()
        assert all(a.over for a in answers)
        assert {a.code for a in answers} <= w.allowed_codes | {""}

    w.run(story())


@pytest.mark.parametrize("with_postgres", [True, False])
def test_requests_of_a_dead_replica_move_on_although_redis_forgot_its_end(
    w: World, with_postgres: bool
) -> None:
    async def story() -> None:
        w.forgot, w.allowed_codes = True, {"cell_unavailable"}
        answer = w.client.ask("question", LONG)
        front = await running(w, answer)
        key = w.keys.replica(front.id)
        w.drain(front)
        await w.until(lambda: w.r.hget(key, "state") == b"draining")  # it has no route any more
        w.postgres_up = with_postgres
        kept = w.network.snapshot()
        front.process.kill()
        await w.until(lambda: w.r.hget(key, "state") == b"dead", within_s=8.0)
        if with_postgres:
            await w.until(lambda: front.id not in w.rows.table.replicas)
        w.network.crash()
        await asyncio.sleep(0.2)
        w.network.start(snapshot=kept)
        await w.until(lambda: answer.over, within_s=20.0)
        w.postgres_up = True
        await w.rest()
        assert answer.complete

    w.run(story())


def test_sampled_tokens_that_redis_forgot_are_not_drawn_again_in_silence(w: World) -> None:
    async def story() -> None:
        w.forgot, w.allowed_codes = True, {"cannot_continue", "answer_lost"}
        answer = w.client.ask("question", LONG, temperature=1.0)
        await shown(w, answer)
        kept = w.network.snapshot()
        await asyncio.sleep(0.4)
        w.network.crash()
        await asyncio.sleep(0.3)
        w.network.start(snapshot=kept)
        await w.rest()
        assert answer.code, "the gateway or the replica says so, whoever is first"

    w.run(story())


# -- Postgres


def test_inference_goes_on_without_postgres_and_is_booked_when_it_is_back(w: World) -> None:
    async def story() -> None:
        for door in w.doors:  # they know the key
            w.client.ask(f"first at {door.process.name}", 1, door=door)
        await w.until(lambda: all(a.over for a in w.answers))
        n_before = len(w.ledger.rows)
        w.postgres_up = w.directory.up = False
        answers = [w.client.ask(f"question {i}", 20) for i in range(4)]
        await w.until(lambda: all(a.over for a in answers))
        await asyncio.sleep(5.0)
        assert all(a.complete for a in answers)
        assert len(w.ledger.rows) <= max(n_before, 2)
        w.postgres_up = w.directory.up = True
        await w.rest()

    w.run(story())


def test_a_key_nobody_knows_yet_is_no_401_while_postgres_is_away(w: World) -> None:
    async def story() -> None:
        w.allowed_codes = {"auth_unavailable"}
        for door in w.doors:
            w.client.ask(f"first at {door.process.name}", 1, door=door)
        await w.until(lambda: all(a.over for a in w.answers))
        w.postgres_up = w.directory.up = False
        unknown = w.key_with(budget_nano=10_000)
        unsure, known = w.client.ask("unsure", SHORT, key=unknown), w.client.ask("known", SHORT)
        await w.until(lambda: unsure.over and known.over)
        assert (unsure.status, unsure.code) == (503, "auth_unavailable")
        assert known.complete
        w.postgres_up = w.directory.up = True
        again = w.client.ask("again", SHORT, key=unknown)
        await w.rest()
        assert again.complete

    w.run(story())
