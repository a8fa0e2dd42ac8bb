"""How many requests a replica may run at once, so that the gaps between tokens stay within the promise.

AIMD with a prediction guard, one replica at a time; what does not fit waits in our queue, not in the engine's. Slots
grow by a fixed step while requests want them and the predicted 95th percentile of the gaps, the KV cache and the
engine's own queue stay below their marks (grow.py); they shrink when a mark is broken in most of several beats
(shrink.py), and not again before the running requests have come down to them. A queue inside the engine that dissolves
by itself meanwhile was that of many which began at once: what runs is given its slots back. Called by
autoscaler/watch/slots.py with every heartbeat. Pure: the time comes with the observation, the memory goes in and comes
out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from controlplane.policy.slots.grow import grow
from controlplane.policy.slots.promise import aim_ms, note_alone
from controlplane.policy.slots.shrink import relent, relieve, slow_down
from controlplane.policy.slots.types import Answer, Beat, SlotMemory, SlotObservation, SlotTarget
from controlplane.policy.slots.window import Window, newest, typical_ms

MAX_BEATS: Final = 40  # remembered since the last change: a mild breach needs that many steps to be sure of


def first_slots(learned: int | None, target: SlotTarget) -> int:
    """What a new replica begins with: what another of the same deployment came to, else its engine's batch."""
    return target.clamp(target.ceiling if learned is None else learned)


def next_slots(memory: SlotMemory, observation: SlotObservation, target: SlotTarget) -> Answer:
    """The answer to one new heartbeat. The reason is one sentence, with numbers.

    No measurement, no change: an idle replica keeps its slots, and so does one that does not report steps.
    """
    if observation.slots != memory.slots:  # set by somebody else: judge anew
        memory = replace(memory, slots=observation.slots, beats=(), above=(), shrink=None)
    slots = target.clamp(observation.slots)
    if observation.slots != slots:
        why = f"{observation.slots} slots are outside {target.floor} to {target.ceiling}"
        return slots, replace(memory, slots=slots, beats=()), why
    n_tokens = sum(n for _, n in observation.gaps)
    if observation.n_steps <= 0 or n_tokens <= 0:
        return memory.slots, replace(memory, beats=(), above=()), "nothing was measured: slots stay"
    memory = _note(memory, observation, n_tokens)
    n_running = max(float(observation.used), n_tokens / observation.n_steps - 0.5)
    if n_running > memory.slots:
        above = (*memory.above, memory.beats[-1])[-MAX_BEATS:]
        # A shrink is as old as its effect.
        memory = replace(memory, beats=(), above=above, shrunk_at_s=observation.at_s)
        why = f"{n_running:.0f} still run: judged when they have come down to {memory.slots}"
        return relent(memory, observation, target) or (memory.slots, memory, why)
    memory = replace(memory, above=())
    memory = note_alone(memory, observation.at_s, target)
    aim = replace(target, itl_ms=aim_ms(memory, target))
    window = Window.of(newest(memory.beats), memory.slots, aim)
    said = (memory, window, observation, aim)
    slots, memory, reason = relieve(*said) or slow_down(*said) or grow(*said)
    if memory.alone_ms:
        reason += f"; {target.itl_ms:g} ms is out of reach: one alone takes {memory.alone_ms:.0f} ms"
    return slots, memory, reason


def _note(memory: SlotMemory, seen: SlotObservation, n_tokens: int) -> SlotMemory:
    """The beat joins the window (the newest that make up a judgement) and the fit."""
    beat = Beat(
        n_steps=seen.n_steps,
        n_tokens=n_tokens,
        gaps=seen.gaps,
        engine_queue=seen.engine_queue,
        kv_used_ratio=seen.kv_used_ratio,
        n_preempted=seen.n_preempted,
        wants_more=seen.n_queued > 0 or seen.used >= seen.slots,
    )
    fit = memory.fit.plus(n_tokens / seen.n_steps, typical_ms(seen.gaps), seen.n_steps)
    return replace(memory, beats=(*memory.beats, beat)[-MAX_BEATS:], fit=fit)
