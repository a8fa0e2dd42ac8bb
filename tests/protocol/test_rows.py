"""One test per row of "when things break" (docs/architecture.md): what exactly is promised when this happens.

Each builds a small cell on virtual time, breaks one thing at a chosen moment and looks; `rest()` then checks every
promise that holds always: text equal to an undisturbed run, one end, billed once as journaled, nothing held or left.
"""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.protocol import checks, faults
from tests.protocol.clock import Process
from tests.protocol.fleet import Front
from tests.protocol.surface import Answer
from tests.protocol.world import World
from workers.scripts import FLUSH

LONG, SHORT = 60, 8  # tokens, of 40 ms each


async def shown(w: World, *answers: Answer, n_chars: int = 20) -> None:
    """Until so much of each answer has been read."""
    await w.until(lambda: all(len(answer.text) >= n_chars for answer in answers))


async def running(w: World, answer: Answer) -> Front:
    """The replica that serves it, once it shows something."""
    await shown(w, answer)
    front = w.front_of(answer.request)
    assert front is not None
    return front


def attempts(w: World, answer: Answer) -> int:
    return int(w.record(answer.request)[b"attempt"])


def crashes(w: World, answer: Answer) -> int:
    return int(w.record(answer.request)[b"crashes"])


# -- a preemption notice


def test_a_drained_replica_finishes_what_is_short_and_hands_off_the_rest(w: World) -> None:
    async def story() -> None:
        long = w.client.ask("long", LONG)
        front = await running(w, long)
        short = w.client.ask("short", SHORT)
        await shown(w, short, n_chars=1)
        w.order(front.spec.slots)
        w.drain(front)
        await w.rest()
        assert attempts(w, long) == 2
        assert crashes(w, long) == 0, "a hand-off is no death"
        assert short.complete
        if w.record(short.request)[b"was_mid"].decode() == front.machine:
            assert attempts(w, short) == 1
        assert not front.process.alive

    w.run(story())


# -- a worker dies silently


def test_silent_death_resumes_elsewhere_within_seconds(w: World) -> None:
    async def story() -> None:
        answers = [w.client.ask(f"question {i}", LONG) for i in range(4)]
        await shown(w, *answers)
        front = w.front_of(answers[0].request)
        hit = [a for a in answers if w.front_of(a.request) is front]
        front.process.kill()
        died_s, before = w.loop.now_s, {a.request: len(a.text) for a in hit}
        await asyncio.sleep(0.2)  # what was on its way
        before = {a.request: len(a.text) for a in hit}
        await w.until(lambda: all(len(a.text) > before[a.request] or a.over for a in hit))
        assert w.loop.now_s - died_s < 4.0
        await w.rest()
        assert [crashes(w, a) for a in hit] == [1] * len(hit)

    w.run(story())


NUMBERS = {"type": "array", "items": {"type": "integer"}, "minItems": 40}
CALL = {"type": "object", "properties": {"numbers": NUMBERS}, "required": ["numbers"]}
CALLING = {
    "tools": [{"type": "function", "function": {"name": "add", "parameters": CALL}}],
    "tool_choice": "required",
}


def test_a_call_of_a_function_goes_on_inside_its_arguments(w: World) -> None:
    """Its replica dies, and later the gateway that its client reads from."""

    async def story() -> None:
        streamed = w.client.ask("sum", 200, door=w.doors[0], returns=True, **CALLING)
        plain = w.client.ask("all", 200, door=w.doors[1], streaming=False, **CALLING)
        front = await running(w, streamed)
        front.process.kill()
        n_before = len(streamed.text)
        await w.until(lambda: len(streamed.text) > n_before + 20)
        w.doors[0].process.kill()
        await w.rest()
        assert streamed.complete
        assert plain.complete
        assert streamed.n_returns >= 1
        assert attempts(w, streamed) == 2

    w.run(story())


# -- what cannot be continued exactly: it drains to its end, starts again unseen, or fails visibly


SEEDED = {"temperature": 1.0, "seed": 7}  # vLLM's generator restarts with an attempt (workers/engine/base.py)


def test_what_cannot_be_continued_exactly_drains_to_its_end_or_fails_visibly(w: World) -> None:
    async def story() -> None:
        w.allowed_codes = {"cannot_continue"}
        front = w.live_fronts()[0]
        w.live_fronts()[1].process.kill()
        await w.until(lambda: w.r.scard(w.keys.replicas(w.deployment)) == 1)
        long = w.client.ask("long", LONG, **SEEDED)
        await shown(w, long)
        assert w.front_of(long.request) is front
        short = w.client.ask("short", SHORT, **SEEDED)
        await shown(w, short, n_chars=1)
        w.drain(front)
        await w.rest()
        assert short.complete
        assert long.code == "cannot_continue"
        assert attempts(w, long) == 1, "the replica that had it said so, nobody was waited for"
        assert w.ledger.rows[long.request].status == 503

    w.run(story())


def test_what_cannot_be_continued_exactly_fails_visibly_when_its_worker_dies(w: World) -> None:
    async def story() -> None:
        w.allowed_codes = {"cannot_continue"}
        answer = w.client.ask("question", LONG, **SEEDED)
        (await running(w, answer)).process.kill()
        await w.rest()
        assert (answer.code, attempts(w, answer)) == ("cannot_continue", 2)

    w.run(story())


def test_what_was_not_shown_yet_starts_again_from_the_beginning(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", 15, streaming=False, **SEEDED)  # one flush, at its end
        await w.until(lambda: any(f.engine.stats().n_running for f in w.live_fronts()))
        await asyncio.sleep(0.2)
        next(f for f in w.live_fronts() if f.engine.stats().n_running).process.kill()
        await w.rest()
        assert answer.complete
        assert attempts(w, answer) == 2

    w.run(story())


# -- a message delivered twice; a worker that was cut off and generates on


def test_a_message_delivered_twice_is_served_once(w: World) -> None:
    async def story() -> None:
        w.chance.p["message_twice"] = 1.0
        answers = [w.client.ask(f"question {i}", 30, streaming=i % 2 == 0) for i in range(4)]
        await w.rest()
        assert all(a.complete and attempts(w, a) == 1 for a in answers)

    w.run(story())


def test_a_message_delivered_to_two_replicas_of_a_machine_is_served_by_one(make_world) -> None:
    with make_world(machines=1, replicas=2) as w:

        async def story() -> None:
            await w.ready()
            answer = w.client.ask("question", LONG)
            front = await running(w, answer)
            other = next(f for f in w.live_fronts() if f is not front)
            again = other.process.spawn(other.replica.serve(answer.request, 1))
            await again  # the claim finds the lease held: acknowledged, and nothing else
            assert other.replica.server.n_tokens_total == 0
            await w.rest()
            assert answer.complete

        w.run(story())


def test_a_late_message_of_an_attempt_before_finds_the_epoch_old(make_world) -> None:
    with make_world(machines=1, replicas=2) as w:

        async def story() -> None:
            await w.ready()
            w.chance.delay = lambda name, most_s: 30.0  # no message gets through
            answer = w.client.ask("question", SHORT)
            await w.until(lambda: any(record[b"epoch"] == b"2" for record in checks.records(w).values()))
            (request,) = checks.records(w)
            lease = w.keys.machine(w.machines[0]).lease(request)
            for front in w.live_fronts():
                await front.process.spawn(front.replica.serve(request, 1))
            assert w.r.hget(lease, "state") == b"bound", "the attempt that counts can still be claimed"
            w.chance.delay = lambda name, most_s: 0.0
            await asyncio.sleep(30.0)  # the late ones come
            await w.rest()
            assert answer.complete

        w.run(story())


def test_a_cut_off_worker_is_refused_and_told_to_stop(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG)
        front = await running(w, answer)
        w.network.cut(front.machine)
        await w.until(lambda: int(w.record(answer.request)[b"epoch"]) == 2)
        n_before = front.replica.server.n_tokens_total
        await asyncio.sleep(0.3)
        assert front.replica.server.n_tokens_total > n_before, "it knows nothing and generates on"
        other = w.front_of(answer.request)
        w.network.heal(front.machine)
        assert other is not front
        await w.until(lambda: front.replica.server.n_running == 0)
        assert front.engine.stats().n_running == 0
        assert not w.r.exists(w.keys.machine(front.machine).journal(answer.request)), "it wrote nothing"
        await w.rest()

    w.run(story())


def test_a_worker_that_stood_still_finds_its_epoch_old_on_the_same_machine(make_world) -> None:
    with make_world(machines=1, replicas=2) as w:

        async def story() -> None:
            await w.ready()
            answer = w.client.ask("question", 200)
            front = await running(w, answer)
            front.process.stop()
            await w.until(lambda: int(w.record(answer.request)[b"epoch"]) == 2)
            await w.until(lambda: w.front_of(answer.request).replica.server.n_running)
            front.process.resume()
            await asyncio.sleep(0.3)
            assert front.replica.server.n_running == 0, "told to stop by its first flush"
            await w.rest()
            assert answer.complete

        w.run(story())


# -- the engine hangs, or dies


def test_a_hung_engine_is_killed_and_its_requests_resume(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG)
        front = await running(w, answer)
        front.hang()
        await w.until(lambda: not front.process.alive)
        assert front.replica.failed.code == "engine_hung"
        await w.rest()
        assert attempts(w, answer) == 2

    w.run(story())


def test_a_dead_engine_ends_its_replica_and_its_requests_resume(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG, streaming=False)
        await w.until(lambda: any(f.engine.stats().n_running for f in w.live_fronts()))
        await asyncio.sleep(1.2)
        front = next(f for f in w.live_fronts() if f.engine.stats().n_running)
        front.process.context().run(front.die)
        await w.rest()
        assert answer.complete
        assert attempts(w, answer) == 2

    w.run(story())


# -- a gateway dies


def test_a_request_outlives_its_gateway_and_is_billed_once(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG, door=w.doors[0])
        await shown(w, answer)
        w.doors[0].process.kill()
        await w.rest()
        assert answer.broken
        assert w.ledger.rows[answer.request].n_completion == LONG
        assert checks.journal(w, answer.request)[-1].end is not None

    w.run(story())


def test_a_client_that_comes_back_gets_the_rest_from_another_gateway(w: World) -> None:
    async def story() -> None:
        stream = w.client.ask("question", 400, door=w.doors[0], returns=True)
        plain = w.client.ask(
            "other", LONG, door=w.doors[0], streaming=False, returns=True, idempotency_key="key"
        )
        await shown(w, stream)
        w.doors[0].process.kill()
        await w.until(lambda: stream.n_returns)
        await asyncio.sleep(1.2)
        for _ in range(4):  # as it is made, not only when the journal is looked at
            n_before = len(stream.text)
            await asyncio.sleep(0.3)
            assert len(stream.text) > n_before
        await w.rest()
        assert stream.complete
        assert plain.complete
        assert stream.n_returns >= 1
        assert plain.n_returns >= 1
        assert len(w.ledger.rows) == 2, "each billed once"

    w.run(story())


def test_a_client_that_left_comes_back_for_what_was_cancelled(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG, returns=True)
        await shown(w, answer)
        answer.leave.set()
        await w.rest()
        assert answer.complete
        assert answer.n_returns >= 1
        assert sum(row.n_completion for row in w.ledger.rows.values()) == LONG, "nothing is charged twice"

    w.run(story())


# -- frames and answers are lost


def test_gaps_in_the_frames_are_filled_from_the_journal(w: World) -> None:
    async def story() -> None:
        for door in w.doors:
            w.network.link(door.process).frame_loss = 0.5
        answers = [w.client.ask(f"question {i}", LONG, streaming=i % 2 == 0) for i in range(4)]
        await w.rest()
        assert all(a.complete for a in answers)
        assert sum(d.gateway.inbox.n_catch_ups for d in w.doors) > 0

    w.run(story())


def test_with_every_frame_lost_the_journal_is_enough_and_the_second_to_settle_changes_nothing(
    w: World,
) -> None:
    async def story() -> None:
        for door in w.doors:
            w.network.link(door.process).frame_loss = 1.0
        answer = w.client.ask("question", SHORT)
        other = w.client.ask("other", 120)  # holds money while the first is settled twice
        await w.until(lambda: answer.over)
        checks.now(w)
        await w.rest()
        assert answer.complete
        assert other.complete

    w.run(story())


def test_a_flush_whose_answer_was_lost_is_sent_again_and_changes_nothing(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG)
        front = await running(w, answer)
        lease = front.config.keys.lease(answer.request)
        taken: list[bytes] = []  # state of the request at each answer

        def takes(process: Process, data: bytes) -> bool:
            """Every seventh answer to a flush, and the one to the end."""
            if process is not front.process or FLUSH.sha.encode() not in data:
                return False
            taken.append(w.r.hget(lease, "state"))
            return len(taken) % 7 == 0 or (taken[-1] == b"done" and taken.count(b"done") == 1)

        w.network.reply_takers.append(takes)
        await w.rest()
        assert b"done" in taken
        assert front.replica.publisher.n_failed_flushes > 5
        assert attempts(w, answer) == 1, "nobody took it for dead"
        assert front.replica.server.n_requests_total == 1, "its end was accepted, and it knows"

    w.run(story())


def test_a_slow_reader_is_paused_and_gets_everything(w: World) -> None:
    async def story() -> None:
        slow = w.client.ask("slow", 120, slow_s=0.5)
        await shown(w, slow)
        stream = next(s for d in w.doors for s in d.gateway.inbox.streams.values())
        stream._buffer = 4
        await w.until(lambda: stream.paused)
        assert len(stream.pieces) <= 4
        await w.rest()
        assert slow.complete

    w.run(story())


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


# -- poison


def test_poison_ends_after_two_deaths_and_its_neighbours_do_not(w: World) -> None:
    async def story() -> None:
        poison = w.client.ask("<die> please", LONG)
        await w.until(lambda: poison.over)
        assert (poison.status, poison.code) == (500, "request_poison")
        assert crashes(w, poison) == 2
        innocent = w.client.ask("after", SHORT)
        await w.rest()
        assert innocent.complete
        assert poison.request not in w.ledger.rows, "nothing was made, nothing is charged"

    w.run(story())


def test_those_that_run_beside_poison_are_not_taken_for_it(make_world) -> None:
    """It ends whoever begins it: what had shown something before it came is not blamed, twice in a row."""
    with make_world(machines=2, replicas=1) as w:

        async def story() -> None:
            await w.ready()
            beside = [w.client.ask(f"question {i}", LONG) for i in range(3)]
            await shown(w, *beside)
            poison = w.client.ask("<die> please", LONG)
            await w.until(lambda: poison.over, within_s=30.0)
            assert poison.code == "request_poison"
            await w.rest()
            assert all(answer.complete for answer in beside)
            assert [int(w.record(a.request)[b"deaths"]) for a in beside] == [2, 2, 2], "they saw both"
            assert poison.request not in w.ledger.rows

        w.run(story())


def test_one_that_ends_replicas_in_its_middle_is_given_up_and_one_that_goes_on_between_deaths_is_not(
    w: World,
) -> None:
    async def story() -> None:
        answer = w.client.ask("question", 150)
        for n_deaths in (1, 2, 3):
            n_before = len(answer.text)
            await w.until(lambda n=n_before: len(answer.text) > n + 100)
            front = w.front_of(answer.request)
            assert front is not None
            front.process.kill()
            await w.until(lambda n=n_deaths: int(w.record(answer.request).get(b"deaths", 0)) == n)
            assert crashes(w, answer) == 1, "blamed once: it went on well since"
        await w.rest()
        assert answer.complete

    w.run(story())


def test_poison_is_told_although_the_control_worker_dies_before_it_can(w: World) -> None:
    async def story() -> None:
        poison = w.client.ask("<die> please", LONG)
        await w.until(lambda: w.r.scard(w.keys.failed), within_s=30.0, step_s=0.0001)
        w.control.process.kill()
        assert not poison.over, "nobody was told yet"
        await w.until(lambda: poison.over, within_s=5.0)  # its gateway finds the reason in the record
        assert poison.code == "request_poison"
        await faults.kill_control(w, w.rng)
        w.control = type(w.control)(w)
        await w.rest()

    w.run(story())


# -- clients that leave


def test_a_generation_stops_when_its_client_leaves_also_when_that_word_is_lost(w: World) -> None:
    async def story() -> None:
        for machine in w.machines:
            w.network.links[machine].frame_loss = 1.0  # control messages among them
        answer = w.client.ask("question", LONG)
        front = await running(w, answer)
        answer.leave.set()
        await w.until(lambda: front.replica.server.n_running == 0, within_s=0.2)
        await w.rest()
        row = w.ledger.rows[answer.request]
        assert row.finish == "abort"
        assert row.n_completion < LONG

    w.run(story())


def test_what_a_client_left_is_not_served_again_when_its_worker_dies(w: World) -> None:
    async def story() -> None:
        answer = w.client.ask("question", LONG)
        front = await running(w, answer)
        w.network.cut(front.machine)  # the word that it left does not arrive
        answer.leave.set()
        await asyncio.sleep(0.5)
        front.process.kill()
        w.network.heal(front.machine)
        await asyncio.sleep(0.1)
        n_made = sum(len(entry.token_ids) for entry in checks.journal(w, answer.request))
        await w.rest()
        row = w.ledger.rows[answer.request]
        assert (row.finish, row.n_completion) == ("abort", n_made), (
            "billed what was made, and nothing more was"
        )

    w.run(story())


# -- money


def test_streams_that_share_the_last_credit_end_at_its_exact_token_although_a_worker_dies(w: World) -> None:
    async def story() -> None:
        budget = 330
        key = w.key_with(budget_nano=budget)
        answers = [w.client.ask(f"question {i}", LONG, key=key) for i in range(4)]
        await shown(w, *answers, n_chars=5)
        w.front_of(answers[0].request).process.kill()
        await w.rest()
        spent = sum(row.cost_nano for row in w.ledger.rows.values())
        assert budget - 2 < spent <= budget, "not a token too many, and none was left that could be paid"
        assert any(answer.out_of_money for answer in answers)
        assert all(answer.complete for answer in answers)

    w.run(story())


# -- messages that are lost; control and agents that die


def test_a_lost_message_of_a_live_replica_is_found_and_sent_again(w: World) -> None:
    async def story() -> None:
        w.chance.p["message_lost"] = 1.0
        answer = w.client.ask("question", SHORT)
        await w.until(lambda: checks.records(w))
        await asyncio.sleep(0.1)
        w.chance.p.clear()
        await w.until(lambda: answer.over, within_s=8.0)
        await w.rest()
        assert answer.complete
        assert attempts(w, answer) == 2
        assert crashes(w, answer) == 0

    w.run(story())


def test_a_new_control_worker_adopts_what_runs(w: World) -> None:
    async def story() -> None:
        answers = [w.client.ask(f"question {i}", LONG) for i in range(4)]
        await shown(w, *answers)
        n_fronts = len(w.fronts)
        await faults.kill_control(w, w.rng)
        await w.rest()
        assert all(attempts(w, a) == 1 for a in answers)
        assert len(w.fronts) == n_fronts

    w.run(story())


def test_a_new_agent_adopts_what_runs_and_the_spools_of_the_dead(w: World) -> None:
    async def story() -> None:
        w.postgres_up = False  # so that the spool matters
        answer = w.client.ask("question", SHORT)
        await w.until(lambda: answer.over)
        front = w.fronts[sorted(w.fronts)[0]]
        front.process.kill()
        await faults.kill_agent(w, random.Random(0))
        for machine in w.machines:
            w.r.delete(w.keys.machine(machine).usage)  # one witness is gone, the disk is the other
        w.postgres_up = True
        await w.rest()
        assert answer.request in w.ledger.rows

    w.run(story())


def test_usage_of_a_machine_lost_with_its_disk_is_booked_from_the_stream(w: World) -> None:
    async def story() -> None:
        for door in w.doors:  # they know the key
            w.client.ask(f"first at {door.process.name}", 1, door=door)
        await w.until(lambda: all(a.over for a in w.answers))
        w.postgres_up = False
        answer = w.client.ask("question", SHORT)
        await w.until(lambda: answer.over)
        for machine in w.machines:
            w.dead_machines.add(machine)
            w.agents[machine].process.kill()
            for front in w.fronts.values():
                front.process.kill()
        w.postgres_up = True
        await w.rest()
        assert answer.request in w.ledger.rows

    w.run(story())


# -- clocks


def test_machines_and_gateways_with_wrong_clocks_lose_nothing(make_world) -> None:
    with make_world() as w:
        for host, skew_s in {
            w.machines[0]: 86_400.0, w.machines[1]: -86_400.0, "gateway:0": 300.0, "gateway:1": -300.0,
        }.items():  # fmt: skip
            w.set_clock(host, skew_s)

        async def story() -> None:
            await w.ready()
            answers = [w.client.ask(f"question {i}", 20) for i in range(6)]
            await shown(w, *answers[:2])
            w.front_of(answers[0].request).process.kill()
            await w.rest()
            assert all(a.complete for a in answers)

        w.run(story())


def test_a_client_that_comes_back_keeps_its_time_although_the_gateways_clocks_differ(make_world) -> None:
    with make_world() as w:
        w.set_clock("gateway:0", -300.0)  # a request may take 60 s

        async def story() -> None:
            await w.ready()
            first, second = w.doors
            answers = [
                w.client.ask("stream", LONG, door=first, returns=True),
                w.client.ask("plain", LONG, door=first, returns=True, streaming=False, idempotency_key="key"),
            ]
            await shown(w, answers[0])
            first.process.kill()
            assert second.open
            await w.rest()
            assert all(a.complete and a.n_returns for a in answers)
            assert {attempts(w, a) for a in answers} == {1}

        w.run(story())
