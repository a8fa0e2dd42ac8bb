"""Rows between gateway and client: a gateway dies, frames and answers are lost, clients leave and come back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from tests.protocol import checks
from tests.protocol.clock import Process
from tests.protocol.rows.looking import LONG, SHORT, attempts, running, shown
from tests.protocol.world import World
from workers.engine import toy_text
from workers.scripts import FLUSH

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


# -- a prompt is counted


def test_a_prompt_is_counted_by_whoever_lives_and_costs_nothing(w: World) -> None:
    async def story() -> None:
        await w.ready()
        prompts = [f"question {i}" for i in range(6)]
        counting = [asyncio.ensure_future(counted(w, prompt)) for prompt in prompts]
        await asyncio.sleep(0.001)
        w.live_fronts()[0].process.kill()
        n_tokens = [len(toy_text.tokenize_chat([{"role": "user", "content": p}])) for p in prompts]
        assert await asyncio.gather(*counting) == n_tokens
        await w.rest()
        assert [(r.n_completion, r.cost_nano) for r in w.ledger.rows.values()] == [(0, 0)] * len(prompts)

    w.run(story())


async def counted(w: World, prompt: str) -> int:
    """What one of the gateways says of it."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": prompt}]}
    parts = [json.dumps(body).encode()]
    said: list[bytes] = []

    async def receive() -> dict[str, Any]:
        if not parts:
            await asyncio.Event().wait()  # the client stays
        return {"type": "http.request", "body": parts.pop(), "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        said.append(message.get("body", b""))

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/messages/count_tokens",
        "headers": [(b"x-api-key", w.key.encode())],
    }
    door = w.rng.choice(w.doors)
    await door.process.spawn(door.gateway.app(scope, receive, send))
    return int(json.loads(b"".join(said))["input_tokens"])
