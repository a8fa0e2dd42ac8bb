"""What the agent reads of its GPUs: from a library of ours in the driver's place; the real one where there is a GPU."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest

from tests.workers.agent.fake_nvml import FakeNvml, Gpu
from workers.agent import gpuhealth
from workers.agent.gpuhealth import GpuReader, GpuWatch, NoNvmlError
from workers.contract import GpuHealth


def test_what_a_gpu_tells_and_what_its_model_does_not() -> None:
    old = Gpu(remapped=None, retiring=1, n_ecc=None)
    library = FakeNvml(Gpu(n_ecc=3, remapped=(1, 2, 1, 1)), old)
    found = GpuReader(library).read()
    shared = {"temperature_c": 50, "slowdown_c": 87, "shutdown_c": 92}
    assert found == (
        GpuHealth(index=0, n_ecc_uncorrected=3, is_remap_pending=True, has_remap_failed=True, **shared),
        GpuHealth(index=1, is_remap_pending=True, **shared),
    )


def test_codes_are_kept_once_each_and_bounded() -> None:
    gpu = Gpu(xids=[79, 79, 31, *range(100, 150)])
    reader = GpuReader(FakeNvml(Gpu(), gpu))
    assert reader.read()[1].xids[:3] == (79, 31, 100)
    gpu.xids = [48]
    well, other = reader.read()
    assert (well.xids, len(other.xids)) == ((), gpuhealth.MAX_XIDS)


def test_a_lost_gpu_is_told_with_its_codes_and_may_come_back() -> None:
    gpu = Gpu(xids=[79])
    reader = GpuReader(FakeNvml(gpu, Gpu()))
    reader.read()
    gpu.lost = True
    lost, well = reader.read()
    assert (lost.lost, lost.xids, well.lost) == ("GPU is lost", (79,), "")
    assert reader.read()[0].lost
    gpu.lost = False
    assert reader.read()[0].lost == ""


def test_a_gpu_that_fails_every_read_holds_on_to_one_set_of_events() -> None:
    library = FakeNvml(Gpu(lost_to_reads=True), Gpu())
    reader = GpuReader(library)
    for _ in range(3):
        assert [gpu.lost for gpu in reader.read()] == ["GPU is lost", ""]
    assert library.n_event_sets == 1


def test_what_an_old_driver_cannot_do_is_no_fault_of_its_gpu() -> None:
    library = FakeNvml(Gpu(is_deaf=True))
    assert GpuReader(library).read()[0].lost == ""
    assert library.n_event_sets == 0


def test_heat_is_counted_from_when_it_began() -> None:
    gpu, now_s = Gpu(temperature_c=88), [100.0]
    reader = GpuReader(FakeNvml(gpu), clock=lambda: now_s[0])
    assert reader.read()[0].hot_s == 0
    now_s[0] = 161.0
    assert reader.read()[0].hot_s == 61
    gpu.temperature_c = 80
    assert reader.read()[0].hot_s == 0
    gpu.temperature_c = 88
    assert reader.read()[0].hot_s == 0


async def _until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not what():
            await asyncio.sleep(0.005)


async def test_a_driver_that_hangs_is_told_and_heard_again() -> None:
    library = FakeNvml(Gpu())
    watch = GpuWatch(lambda: library, every_s=0.01, hangs_s=0.05)
    task = asyncio.create_task(watch.run())
    await _until(lambda: bool(watch.health) and watch.health[0].temperature_c == 50)
    library.release.clear()
    await _until(lambda: "has not answered for" in watch.health[0].lost)
    library.release.set()
    await _until(lambda: not watch.health[0].lost)
    assert watch.health[0].temperature_c == 50
    task.cancel()


async def test_without_a_driver_there_is_nothing_to_tell_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    watch = GpuWatch(FakeNvml)
    with caplog.at_level(logging.INFO):
        task = asyncio.create_task(watch.run())
        await _until(lambda: "GPU health is not read: NVML Shared Library Not Found" in caplog.text)
    assert watch.health == ()
    assert not task.done(), "the agent goes on"
    task.cancel()


async def test_bindings_that_are_not_as_known_do_not_end_the_agent(caplog: pytest.LogCaptureFixture) -> None:
    library = FakeNvml(Gpu())
    watch = GpuWatch(lambda: library, every_s=0.01)
    task = asyncio.create_task(watch.run())
    await _until(lambda: bool(watch.health) and watch.health[0].temperature_c == 50)
    vars(library)["nvmlDeviceGetUUID"] = None
    await _until(lambda: watch.health == ())
    assert "GPU health is read no more: TypeError" in caplog.text
    assert not task.done(), "the agent goes on"
    task.cancel()


def test_the_bindings_are_found_without_the_engine() -> None:
    code = (
        "import sys; from workers.agent import gpuhealth as g; lib = g.load_library(); "
        "assert lib.nvmlEventSetWait_v2 and lib.nvmlDeviceGetRemappedRows; "
        "assert not {'vllm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_the_real_library_reads_this_machines_gpus() -> None:
    try:
        reader = GpuReader(gpuhealth.load_library())
    except NoNvmlError as reason:
        pytest.skip(f"no GPU here: {reason}")
    for gpu in reader.read():
        assert gpu.lost == "" and 0 < gpu.temperature_c < 120
