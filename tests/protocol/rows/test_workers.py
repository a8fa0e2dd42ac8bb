"""Rows of workers: they drain, die, hang, are cut off, stand still, or get a message twice; what cannot be continued
exactly."""

from __future__ import annotations

import asyncio

from tests.protocol import checks
from tests.protocol.rows.looking import LONG, SHORT, attempts, crashes, running, shown
from tests.protocol.world import World

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
