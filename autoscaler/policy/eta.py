"""How long a client that waits for a deployment at zero still has to wait, from how long starts took before.

Pure. The measured averages are kept by timings.py.
"""

from dataclasses import dataclass

from autoscaler.types import StageName

WEIGHT = 0.3  # of the newest measurement: three starts make up two thirds of the average


@dataclass(frozen=True, slots=True)
class Timings:
    """Averages in milliseconds of past starts on one provider; None where nothing was measured yet."""

    launching_machine: float | None = None
    starting_replica: float | None = None
    loading_model: float | None = None
    waking_replica: float | None = None
    starting_machine: float | None = None


def average(old_ms: float | None, measured_ms: float) -> float:
    """Exponentially weighted moving average; the first measurement stands for itself."""
    return measured_ms if old_ms is None else (1 - WEIGHT) * old_ms + WEIGHT * measured_ms


def eta_ms(stage: StageName, in_stage_s: float, timings: Timings) -> int | None:
    """Milliseconds until ready: the rest of this stage and all later ones; None if one was never measured.

    A stage that takes longer than ever counts as about to end.
    """
    order: tuple[tuple[StageName, float | None], ...] = (
        (StageName.LAUNCHING_MACHINE, timings.launching_machine),
        (StageName.STARTING_REPLICA, timings.starting_replica),
        (StageName.LOADING_MODEL, timings.loading_model),
    )
    if stage is StageName.READY:
        return 0
    if stage is StageName.WAKING_REPLICA:  # nothing comes after it
        ms = timings.waking_replica
        return None if ms is None else round(max(ms - in_stage_s * 1000, 0))
    if stage is StageName.STARTING_MACHINE:  # as a launch, but for the first stage
        order = ((stage, timings.starting_machine), *order[1:])
    at = {StageName.WAKING: StageName.STARTING_REPLICA}.get(stage, stage)
    names = [name for name, _ in order]
    if at not in names:
        return None
    left = 0.0
    for index, (name, ms) in enumerate(order[names.index(at) :]):
        if ms is None:
            return None
        left += max(ms - in_stage_s * 1000, 0) if index == 0 and name is stage else ms
    return round(left)
