"""NVML as the agent's probe meets it: an object with the names of the bindings, and GPUs that can be broken."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

NOT_SUPPORTED, TIMEOUT, LIBRARY_NOT_FOUND, NO_FUNCTION, LOST = 3, 10, 12, 13, 15
_ERRORS = {
    3: "Not Supported",
    10: "Timeout",
    12: "NVML Shared Library Not Found",
    13: "Function Not Found",
    15: "GPU is lost",
}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(_ERRORS[value])
        self.value = value


@dataclass
class Gpu:
    temperature_c: int = 50
    n_ecc: int | None = 0  # None: this model does not tell
    remapped: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    retiring: int | None = None
    xids: list[int] = field(default_factory=list)
    lost: bool = False
    lost_to_reads: bool = False  # its handle is given all the same
    is_deaf: bool = False  # its driver knows no events


class FakeNvml:
    """`release` must be set for calls on GPUs to return: cleared, the driver hangs."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU, NVML_TEMPERATURE_THRESHOLD_SHUTDOWN, NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = 0, 0, 1
    NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC = 1, 0
    nvmlEventTypeXidCriticalError = 8  # noqa: N815 - the bindings' name

    def __init__(self, *gpus: Gpu) -> None:
        self.gpus = gpus
        self.n_event_sets = 0
        self.release = threading.Event()
        self.release.set()

    def nvmlInit(self) -> None:
        if not self.gpus:
            raise NVMLError(LIBRARY_NOT_FOUND)

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Gpu:
        return self._alive(self.gpus[index])

    def nvmlDeviceGetUUID(self, gpu: Gpu) -> str:
        self._alive(gpu)
        if gpu.lost_to_reads:
            raise NVMLError(LOST)
        return "GPU-1"

    def nvmlDeviceGetTemperature(self, gpu: Gpu, sensor: int) -> int:
        return gpu.temperature_c

    def nvmlDeviceGetTemperatureThreshold(self, gpu: Gpu, threshold: int) -> int:
        return (92, 87)[threshold]

    def nvmlDeviceGetTotalEccErrors(self, gpu: Gpu, kind: int, counter: int) -> Any:
        return _told(gpu.n_ecc)

    def nvmlDeviceGetRemappedRows(self, gpu: Gpu) -> Any:
        return _told(gpu.remapped)

    def nvmlDeviceGetRetiredPagesPendingStatus(self, gpu: Gpu) -> Any:
        return _told(gpu.retiring)

    def nvmlEventSetCreate(self) -> list[Gpu]:
        self.n_event_sets += 1
        return []

    def nvmlEventSetFree(self, events: list[Gpu]) -> None:
        self.n_event_sets -= 1

    def nvmlDeviceRegisterEvents(self, gpu: Gpu, kinds: int, events: list[Gpu]) -> None:
        if gpu.is_deaf:
            raise NVMLError(NO_FUNCTION)
        events.append(gpu)

    def nvmlEventSetWait_v2(self, events: list[Gpu], timeout_ms: int) -> Any:
        if not events[0].xids:
            raise NVMLError(TIMEOUT)
        return SimpleNamespace(eventData=events[0].xids.pop(0))

    def _alive(self, gpu: Gpu) -> Gpu:
        self.release.wait(30)
        if gpu.lost:
            raise NVMLError(LOST)
        return gpu


def _told(value: Any) -> Any:
    if value is None:
        raise NVMLError(NOT_SUPPORTED)
    return value
