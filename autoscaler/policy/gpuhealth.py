"""Which machines have a sick GPU, and which of them are given up now. Pure; called by autoscaler/health.py.

A sick one gets nothing new, is replaced first, drained and ended. Half of a pool at once at most: when more of it looks
sick, the fault is more likely a driver's or ours, and taking everything away would help nobody; the rest follows as
those that went before are gone.
"""

from dataclasses import dataclass
from typing import Final

HOT_S: Final = 60.0  # at the temperature at which it slows itself down; bursts of seconds are ordinary
SHUTDOWN_MARGIN_C: Final = 2

# NVIDIA's codes after which a GPU is not trusted until it was reset or replaced ("XID errors", deployment guide r570:
# those whose remedy is a reset or to contact support). Codes of a program's own faults (13, 31, 43, 45, 68, 69) and of
# errors that were contained (63, 92, 94) are not among them: what a contained one leaves is told as a pending remap.
FATAL_XIDS: Final = {
    46: "stopped processing",
    48: "uncorrectable memory error",
    62: "internal microcontroller halted",
    64: "memory could not be remapped",
    74: "NVLink error",
    79: "fell off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "system processor timeout",
    120: "system processor error",
    140: "unrecovered memory error",
    143: "failed to initialise",
}


@dataclass(frozen=True, slots=True)
class GpuState:
    """One GPU as its machine's agent tells it; fields as in workers/contract.py (GpuHealth)."""

    index: int
    lost: str = ""
    xids: tuple[int, ...] = ()
    n_ecc_uncorrected: int = 0
    is_remap_pending: bool = False
    has_remap_failed: bool = False
    temperature_c: int = 0
    slowdown_c: int = 0
    shutdown_c: int = 0
    hot_s: float = 0.0


@dataclass(frozen=True, slots=True)
class MachineHealth:
    """A machine of the pool. is_leaving: it is given up already, for whatever reason, and not yet gone."""

    id: str
    gpus: tuple[GpuState, ...] = ()
    is_leaving: bool = False


@dataclass(frozen=True, slots=True)
class HealthInputs:
    """What is judged, as it is stored with the decision."""

    machines: tuple[MachineHealth, ...]


@dataclass(frozen=True, slots=True)
class Quarantine:
    """One machine to be given up, and why."""

    machine_id: str
    why: str


@dataclass(frozen=True, slots=True)
class HealthOrders:
    """quarantine: now, by id. reasons: of these, and of those that have to wait."""

    quarantine: tuple[Quarantine, ...] = ()
    reasons: tuple[str, ...] = ()


def complaint(gpu: GpuState) -> str:
    """What is wrong with it, the gravest; '' for a healthy one."""
    fatal = [xid for xid in gpu.xids if xid in FATAL_XIDS]
    if gpu.lost:
        what = f"cannot be reached: {gpu.lost}"
    elif fatal:
        what = f"XID {fatal[0]}: {FATAL_XIDS[fatal[0]]}"
    elif gpu.has_remap_failed:
        what = "has bad memory and none to spare"
    elif gpu.is_remap_pending:
        what = "has bad memory that only a reset retires"
    elif gpu.n_ecc_uncorrected:
        what = f"{gpu.n_ecc_uncorrected} uncorrectable memory errors"
    elif gpu.shutdown_c and gpu.temperature_c >= gpu.shutdown_c - SHUTDOWN_MARGIN_C:
        what = f"{gpu.temperature_c} degrees, shuts itself down at {gpu.shutdown_c}"
    elif gpu.hot_s >= HOT_S:
        what = f"{gpu.temperature_c} degrees, slowed down for {gpu.hot_s:.0f} s"
    else:
        return ""
    return f"GPU {gpu.index}: {what}"


def judge(inputs: HealthInputs) -> HealthOrders:
    """Who is quarantined now; ties by id."""
    machines = inputs.machines
    n_left = max(len(machines) // 2, 1) - sum(machine.is_leaving for machine in machines)
    given_up: list[Quarantine] = []
    reasons: list[str] = []
    for machine in sorted(machines, key=lambda m: m.id):
        why = "; ".join(filter(None, map(complaint, sorted(machine.gpus, key=lambda g: g.index))))
        if not why or machine.is_leaving:
            continue
        if n_left > 0:
            n_left -= 1
            given_up.append(Quarantine(machine.id, why))
            reasons.append(f"{machine.id} is sick: {why}")
        else:
            reasons.append(
                f"{machine.id} is sick, too, and waits: half of {len(machines)} machines leave already"
            )
    return HealthOrders(tuple(given_up), tuple(reasons))
