"""Everything that may go wrong with a world: each fault is a coroutine that breaks something and heals what heals.

`unfold` draws a story from a seed; a test of one row calls the fault it is about. Faults note what they did.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from tests.protocol import checks
from tests.protocol.control import Booking, Control
from tests.protocol.fleet import Agent, Front
from tests.protocol.surface import Door
from tests.protocol.world import World

Fault = Callable[[World, random.Random], Awaitable[None]]


def _some_front(world: World, rng: random.Random) -> Front | None:
    serving = [f for f in world.live_fronts() if f.consumer is not None and not f.process.stopped]
    return rng.choice(serving) if serving else None


# -- the GPU side


async def kill_front(world: World, rng: random.Random) -> None:
    """SIGKILL of a replica, in the middle of whatever it does."""
    front = _some_front(world, rng)
    if front is not None:
        world.note(f"SIGKILL {front.process.name}")
        front.process.kill()


async def kill_engine(world: World, rng: random.Random) -> None:
    front = _some_front(world, rng)
    if front is not None:
        world.note(f"engine of {front.process.name} dies")
        front.process.context().run(front.die)


async def hang_engine(world: World, rng: random.Random) -> None:
    front = _some_front(world, rng)
    if front is not None:
        world.note(f"engine of {front.process.name} hangs")
        front.hang()


async def freeze_front(world: World, rng: random.Random) -> None:
    """It stands still for a while, is given up or not, and then goes on as if nothing had happened."""
    front = _some_front(world, rng)
    if front is not None:
        for_s = rng.uniform(0.3, 8.0)
        world.note(f"{front.process.name} stands still for {for_s:.1f} s")
        front.process.stop()
        await asyncio.sleep(for_s)
        front.process.resume()


async def cut_machine(world: World, rng: random.Random) -> None:
    """Cut off from Redis, generating on, and back."""
    machine, for_s = rng.choice(world.machines), rng.uniform(0.3, 8.0)
    world.note(f"machine {machine[-4:]} is cut off for {for_s:.1f} s")
    world.network.cut(machine)
    await asyncio.sleep(for_s)
    world.network.heal(machine)


async def reset_machine(world: World, rng: random.Random) -> None:
    """Its connections break: calls under way were applied or not, answers are lost."""
    machine = rng.choice(world.machines)
    world.note(f"connections of machine {machine[-4:]} break")
    world.network.reset(machine)


async def lose_machine(world: World, rng: random.Random) -> None:
    """The machine is gone with its disk (the spot market took it without a word)."""
    machine = rng.choice(world.machines)
    if machine not in world.dead_machines:
        world.note(f"machine {machine[-4:]} is gone")
        world.dead_machines.add(machine)
        world.agents[machine].process.kill()
        for front in world.fronts.values():
            if front.machine == machine:
                front.process.kill()


async def spot_notice(world: World, rng: random.Random) -> None:
    """Everything on a machine drains; replacements were ordered first."""
    front = _some_front(world, rng)
    if front is not None:
        world.note(f"{front.process.name} drains")
        world.order(front.spec.slots)
        world.drain(front)


async def kill_agent(world: World, rng: random.Random) -> None:
    machine = rng.choice(world.machines)
    if machine not in world.dead_machines:
        world.note(f"agent of {machine[-4:]} dies")
        world.agents[machine].process.kill()
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        if machine not in world.dead_machines:
            world.agents[machine] = Agent(world, machine)


# -- the trusted side


async def kill_control(world: World, rng: random.Random) -> None:
    """The watcher dies between any two of its calls; another one comes."""
    if world.control.process.alive:
        world.note("the control worker dies")
        world.control.process.kill()
        await asyncio.sleep(rng.uniform(0.3, 3.0))
        world.control = Control(world)


async def kill_intake(world: World, rng: random.Random) -> None:
    if world.booking.process.alive:
        world.note("intake dies")
        world.booking.process.kill()
        await asyncio.sleep(rng.uniform(0.3, 3.0))
        world.booking = Booking(world)


async def second_intake(world: World, rng: random.Random) -> None:
    """Two at once do double work and no harm."""
    world.note("a second intake runs")
    second = Booking(world)
    await asyncio.sleep(rng.uniform(1.0, 5.0))
    second.process.kill()


async def postgres_away(world: World, rng: random.Random) -> None:
    for_s = rng.uniform(0.5, 12.0)
    world.note(f"Postgres is away for {for_s:.1f} s")
    world.postgres_up = world.directory.up = False
    await asyncio.sleep(for_s)
    world.postgres_up = world.directory.up = True


async def kill_gateway(world: World, rng: random.Random) -> None:
    door = rng.choice(world.doors)
    if door.open:
        world.note(f"{door.process.name} dies")
        door.process.kill()
        await asyncio.sleep(rng.uniform(0.2, 2.0))
        world.doors.append(Door(world, f"gateway:{len(world.doors)}"))


async def reset_gateway(world: World, rng: random.Random) -> None:
    door = rng.choice(world.doors)
    if door.open:
        world.note(f"connections of {door.process.name} break")
        world.network.reset(door.process.host)


async def restart_redis(world: World, rng: random.Random) -> None:
    await _redis_restarts(world, rng, rng.uniform(0.05, 4.0))


async def replace_redis(world: World, rng: random.Random) -> None:
    """Its replica takes over, which had not heard of the last moment."""
    kept = world.network.snapshot()
    lost_s = rng.uniform(0.02, 1.0)
    world.note(f"Redis' replica falls behind by {lost_s:.2f} s")
    await asyncio.sleep(lost_s)
    if world.network.up:
        world.forgot = True
        await _redis_restarts(world, rng, rng.uniform(0.05, 4.0), snapshot=kept)


async def empty_redis(world: World, rng: random.Random) -> None:
    world.forgot = True
    await _redis_restarts(world, rng, rng.uniform(0.05, 4.0), emptied=True)


async def _redis_restarts(world: World, rng: random.Random, away_s: float, **how: object) -> None:
    if not world.network.up:
        return
    world.note(f"Redis ends, and is back in {away_s:.1f} s {'empty' if how.get('emptied') else ''}")
    world.network.crash()
    await asyncio.sleep(away_s)
    world.network.start(**how)  # type: ignore[arg-type]


# -- clients


async def leave(world: World, rng: random.Random) -> None:
    """A client hangs up, at any moment."""
    waiting = [a for a in world.answers if not a.over]
    if waiting:
        answer = rng.choice(waiting)
        world.note(f"a client leaves {answer.request[-4:] or answer.prompt}")
        answer.leave.set()


# -- stories

GENTLE: tuple[Fault, ...] = (
    kill_front, kill_front, kill_engine, hang_engine, freeze_front, freeze_front, cut_machine, cut_machine,
    reset_machine, lose_machine, spot_notice, kill_agent, kill_control, kill_control, kill_intake, second_intake,
    leave, leave,
)  # fmt: skip
HARSH: tuple[Fault, ...] = (
    *GENTLE, postgres_away, kill_gateway, reset_gateway, restart_redis, replace_redis, empty_redis,
)  # fmt: skip
_FORGOT = {"cell_unavailable", "budget_unavailable", "request_lost", "request_not_found", "journal_unreadable",
           "answer_lost", "internal_error"}  # fmt: skip
EXCUSES: dict[Fault, set[str]] = {
    reset_gateway: {"cell_unavailable"},
    restart_redis: {"cell_unavailable", "budget_unavailable"},
    replace_redis: _FORGOT,
    empty_redis: _FORGOT,
    postgres_away: {"auth_unavailable", "budget_unavailable"},
}


async def unfold(world: World, rng: random.Random, faults: tuple[Fault, ...]) -> None:
    """A story: questions and faults at random instants of a few seconds."""
    chance = world.chance
    if rng.random() < 0.5:
        chance.p["message_twice"] = rng.choice((0.05, 0.3, 1.0))
    if rng.random() < 0.3:
        chance.p["message_late"] = rng.choice((0.05, 0.3))
    if rng.random() < 0.3:
        chance.p["message_lost"] = rng.choice((0.05, 0.2))
    if rng.random() < 0.3:
        chance.p["reply_lost"] = rng.choice((0.002, 0.02))
    if rng.random() < 0.5:
        for door in world.doors:
            world.network.link(door.process).frame_loss = rng.choice((0.02, 0.2, 0.6))
    if rng.random() < 0.2:
        world.network.links["control"].frame_loss = 0.5
    keys = [world.key]
    if rng.random() < 0.25:
        keys.append(world.key_with(budget_nano=rng.randint(40, 600)))
    span_s = rng.uniform(1.0, 6.0)
    events: list[tuple[float, Callable[[], object]]] = []
    for i in range(rng.randint(2, 10)):
        events.append((rng.uniform(0.0, span_s), lambda i=i: _ask(world, rng, i, rng.choice(keys))))
    drawn = [rng.choice(faults) for _ in range(rng.randint(1, 5))]
    for fault in drawn:
        world.allowed_codes |= EXCUSES.get(fault, set())
        events.append(
            (rng.uniform(0.05, span_s + 1.0), lambda f=fault: world.loop.create_task(f(world, rng)))
        )
    started_s = world.loop.now_s
    for at_s, event in sorted(events, key=lambda pair: pair[0]):
        await asyncio.sleep(max(0.0, started_s + at_s - world.loop.now_s))
        happening = event()
        if isinstance(happening, asyncio.Task):
            world.loop.tasks.append(happening)
        if world.network.up:
            checks.now(world)


def _ask(world: World, rng: random.Random, i: int, key: str) -> None:
    seeded = {"temperature": 1.0, "seed": i} if rng.random() < 0.15 else {}
    world.client.ask(
        f"question {i} of {world.seed}", rng.choice((1, 2, 5, 12, 30, 60)), streaming=rng.random() < 0.7,
        slow_s=rng.choice((0.0, 0.0, 0.0, 0.2)), returns=rng.random() < 0.5,
        idempotency_key=f"key {i}" if rng.random() < 0.3 else "", key=key, **seeded,
    )  # fmt: skip
