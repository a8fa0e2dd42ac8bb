"""Rows of requests that kill what serves them, and of those that only ran beside."""

from __future__ import annotations

from tests.protocol import faults
from tests.protocol.rows.looking import LONG, SHORT, crashes, shown
from tests.protocol.world import World


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
