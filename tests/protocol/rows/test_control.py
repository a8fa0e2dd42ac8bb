"""Rows of what runs the cell: lost messages, control workers, agents and machines that die, clocks that are wrong."""

from __future__ import annotations

import asyncio
import random

from tests.protocol import checks, faults
from tests.protocol.rows.looking import LONG, SHORT, attempts, crashes, shown
from tests.protocol.world import World

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
