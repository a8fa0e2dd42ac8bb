"""Which GPUs are sick, and that at most half of a pool leaves for it at once."""

from __future__ import annotations

import pytest

from autoscaler.policy.gpuhealth import FATAL_XIDS, GpuState, HealthInputs, MachineHealth, complaint, judge

WELL = GpuState(0, xids=(13, 31, 43, 45, 63, 94), temperature_c=88, slowdown_c=87, shutdown_c=92, hot_s=59.9)


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        (GpuState(0), ""),
        (WELL, ""),
        (GpuState(1, lost="GPU is lost"), "GPU 1: cannot be reached: GPU is lost"),
        (GpuState(0, xids=(31, 79)), "GPU 0: XID 79: fell off the bus"),
        (GpuState(0, n_ecc_uncorrected=2), "GPU 0: 2 uncorrectable memory errors"),
        (
            GpuState(0, n_ecc_uncorrected=2, is_remap_pending=True),
            "GPU 0: has bad memory that only a reset retires",
        ),
        (GpuState(0, has_remap_failed=True), "GPU 0: has bad memory and none to spare"),
        (GpuState(0, temperature_c=90, shutdown_c=92), "GPU 0: 90 degrees, shuts itself down at 92"),
        (GpuState(0, temperature_c=88, slowdown_c=87, hot_s=60), "GPU 0: 88 degrees, slowed down for 60 s"),
    ],
)
def test_complaints(gpu: GpuState, expected: str) -> None:
    assert complaint(gpu) == expected


@pytest.mark.parametrize("xid", sorted(FATAL_XIDS))
def test_every_fatal_code_is_a_complaint(xid: int) -> None:
    assert f"XID {xid}: " in complaint(GpuState(0, xids=(xid,)))


def _machines(*sick: bool, leaving: int = 0) -> HealthInputs:
    return HealthInputs(
        tuple(
            MachineHealth(f"m{i}", (GpuState(0, lost="lost") if is_sick else WELL,), is_leaving=i < leaving)
            for i, is_sick in enumerate(sick)
        )
    )


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (_machines(), []),
        (_machines(False, False), []),
        (_machines(True), ["m0"]),  # even the only one: its successor comes first
        (_machines(False, True, False, False), ["m1"]),
        (_machines(True, True, True, True), ["m0", "m1"]),
        (_machines(True, True, True, True, leaving=1), ["m1"]),
        (_machines(True, True, True, True, leaving=2), []),
        (_machines(True, leaving=1), []),
    ],
)
def test_half_of_a_pool_at_once(inputs: HealthInputs, expected: list[str]) -> None:
    orders = judge(inputs)
    assert [each.machine_id for each in orders.quarantine] == expected
    assert judge(HealthInputs(inputs.machines[::-1])) == orders
    n_told = sum("sick" in reason for reason in orders.reasons)
    assert n_told == sum(bool(m.gpus[0].lost) and not m.is_leaving for m in inputs.machines)
