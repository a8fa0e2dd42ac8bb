"""How this machine's GPUs are, from the driver's own library (NVML), for the agent's heartbeats.

It judges nothing: control does (autoscaler/policy/gpuhealth.py). The library is asked in a thread, since it hangs when
a GPU has fallen off the bus: that it does not answer is then what is told. Without the library there is nothing to
tell, and the log says so once. Imports neither the engine nor torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from workers.contract import GpuHealth

log = logging.getLogger(__name__)

READ_EVERY_S: Final = 5.0
HANGS_AFTER_S: Final = 30.0  # a read takes milliseconds
MAX_GPUS: Final = 64
MAX_XIDS: Final = 16  # different ones of a GPU; the first are kept: what follows is mostly their consequence
_MAX_EVENTS: Final = 256  # of one read
# Not supported by this model, not for this user, not in this driver: nothing that the GPU has done.
_NOT_TOLD: Final = (3, 4, 13)
_ERROR_TIMEOUT: Final = 10


class NoNvmlError(Exception):
    """GPUs cannot be asked here; the message says why."""


def load_library() -> Any:
    """The bindings: `pynvml` where it is installed, else the copy that vLLM brings, without importing vLLM."""
    try:
        if importlib.util.find_spec("pynvml") is not None:
            return importlib.import_module("pynvml")
        vllm = importlib.util.find_spec("vllm")
    except ImportError as error:
        raise NoNvmlError(f"its bindings cannot be loaded: {error}") from None
    for folder in (vllm.submodule_search_locations or ()) if vllm else ():
        path = Path(folder) / "third_party" / "pynvml.py"
        if path.is_file():
            return _load(path)
    raise NoNvmlError("no bindings for it are installed: `pip install nvidia-ml-py`")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("corral_pynvml", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # it looks itself up
    spec.loader.exec_module(module)
    return module


class GpuReader:
    """Asks every GPU of the machine. Blocks; one thread at a time. Raises NoNvmlError when there is nothing to ask."""

    def __init__(self, library: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = library
        self._clock = clock
        try:
            library.nvmlInit()
            n_gpus = min(int(library.nvmlDeviceGetCount()), MAX_GPUS)
        except library.NVMLError as error:
            raise NoNvmlError(str(error)) from None
        self._handles: list[Any] = [None] * n_gpus
        self._events: list[Any] = [None] * n_gpus
        self._xids: list[list[int]] = [[] for _ in range(n_gpus)]
        self._hot_since_s: list[float | None] = [None] * n_gpus

    @property
    def n_gpus(self) -> int:
        return len(self._handles)

    def read(self) -> tuple[GpuHealth, ...]:
        """All of them, in order. One that is lost is told, not raised."""
        return tuple(self._read(index) for index in range(self.n_gpus))

    def _read(self, index: int) -> GpuHealth:
        nvml = self._nvml
        try:
            if self._handles[index] is None:
                self._handles[index] = nvml.nvmlDeviceGetHandleByIndex(index)
                self._events[index] = self._listen(self._handles[index])
            gpu = self._handles[index]
            self._hear(index)
            nvml.nvmlDeviceGetUUID(gpu)  # every model tells it: an error here is one of the GPU
            slowdown_c = self._ask(
                nvml.nvmlDeviceGetTemperatureThreshold, gpu, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            )
            shutdown_c = self._ask(
                nvml.nvmlDeviceGetTemperatureThreshold, gpu, nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN
            )
            temperature_c = int(self._ask(nvml.nvmlDeviceGetTemperature, gpu, nvml.NVML_TEMPERATURE_GPU) or 0)
            n_ecc = self._ask(
                nvml.nvmlDeviceGetTotalEccErrors,
                gpu,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            )
            # (corrected, uncorrected, pending, failed); cards before Ampere retire pages instead.
            remapped = self._ask(nvml.nvmlDeviceGetRemappedRows, gpu) or (0, 0, 0, 0)
            retiring = self._ask(nvml.nvmlDeviceGetRetiredPagesPendingStatus, gpu)
        except nvml.NVMLError as error:
            self._forget(index)
            return GpuHealth(index=index, lost=str(error)[:200] or "lost", xids=tuple(self._xids[index]))
        return GpuHealth(
            index=index,
            xids=tuple(self._xids[index]),
            n_ecc_uncorrected=int(n_ecc or 0),
            is_remap_pending=bool(remapped[2]) or bool(retiring),
            has_remap_failed=bool(remapped[3]),
            temperature_c=temperature_c,
            slowdown_c=int(slowdown_c or 0),
            shutdown_c=int(shutdown_c or 0),
            hot_s=self._hot_s(index, temperature_c, int(slowdown_c or 0)),
        )

    def _forget(self, index: int) -> None:
        """What it is asked by: made anew with the next read, so given back now."""
        events = self._events[index]
        self._handles[index] = self._events[index] = None
        if events is not None:
            self._free(events)

    def _free(self, events: Any) -> None:
        with contextlib.suppress(self._nvml.NVMLError):
            self._nvml.nvmlEventSetFree(events)

    def _ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """None where nobody tells that here. Other errors are the GPU's."""
        try:
            return question(*args)
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) in _NOT_TOLD:
                return None
            raise

    def _listen(self, gpu: Any) -> Any:
        """A set of its own for each, so that an event needs no name. None where there are no events to hear."""
        nvml, events = self._nvml, None
        try:
            events = nvml.nvmlEventSetCreate()
            nvml.nvmlDeviceRegisterEvents(gpu, nvml.nvmlEventTypeXidCriticalError, events)
        except nvml.NVMLError as error:
            if events is not None:
                self._free(events)
            if getattr(error, "value", None) in _NOT_TOLD:
                return None
            raise
        return events

    def _hear(self, index: int) -> None:
        """Errors that the driver has noted since the last read."""
        nvml, known = self._nvml, self._xids[index]
        for _ in range(_MAX_EVENTS):
            if self._events[index] is None:
                return
            try:
                event = nvml.nvmlEventSetWait_v2(self._events[index], 0)
            except nvml.NVMLError as error:
                if getattr(error, "value", None) == _ERROR_TIMEOUT:  # no more
                    return
                raise
            xid = int(event.eventData)
            if xid not in known and len(known) < MAX_XIDS:
                log.error("GPU %d: XID %d", index, xid)
                known.append(xid)

    def _hot_s(self, index: int, temperature_c: int, slowdown_c: int) -> float:
        now_s = self._clock()
        if not slowdown_c or temperature_c < slowdown_c:
            self._hot_since_s[index] = None
            return 0.0
        since_s = self._hot_since_s[index]
        if since_s is None:
            self._hot_since_s[index] = since_s = now_s
        return round(now_s - since_s, 1)


class GpuWatch:
    """`run` reads now and then; `health` is the last that is known, and says so when nothing answers any more."""

    def __init__(
        self,
        load: Callable[[], Any] = load_library,
        *,
        every_s: float = READ_EVERY_S,
        hangs_s: float = HANGS_AFTER_S,
    ) -> None:
        self._load, self._every_s, self._hangs_s = load, every_s, hangs_s
        self._last: tuple[GpuHealth, ...] = ()
        self._asked_at_s: float | None = None  # of the read that has not come back

    @property
    def health(self) -> tuple[GpuHealth, ...]:
        asked_at_s = self._asked_at_s
        if asked_at_s is None or time.monotonic() - asked_at_s < self._hangs_s or not self._last:
            return self._last
        silent_s = time.monotonic() - asked_at_s
        return tuple(
            GpuHealth(
                index=each.index, lost=f"the driver has not answered for {silent_s:.0f} s", xids=each.xids
            )
            for each in self._last
        )

    async def run(self) -> None:
        """Until cancelled. The thread is a daemon's: one that hangs in the driver keeps nobody from ending. Bindings
        that are not as we know them end the reading, not the agent."""
        try:
            await self._read_for_ever()
        except NoNvmlError as error:
            log.info("GPU health is not read: %s", error)
        except Exception as error:
            log.error("GPU health is read no more: %s: %s", type(error).__name__, error)
        self._last, self._asked_at_s = (), None
        await asyncio.Event().wait()

    async def _read_for_ever(self) -> None:
        reader = await _in_thread(lambda: GpuReader(self._load()))
        log.info("GPU health is read of %d GPUs every %g s", reader.n_gpus, self._every_s)
        self._last = tuple(GpuHealth(index=index) for index in range(reader.n_gpus))
        while True:
            self._asked_at_s = time.monotonic()
            self._last = await _in_thread(reader.read)
            self._asked_at_s = None
            await asyncio.sleep(self._every_s)


async def _in_thread(call: Callable[[], Any]) -> Any:
    """Unlike asyncio.to_thread, not waited for at exit, and no place of a pool is lost to one that hangs."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not answer.done():
            answer.set_result(result) if error is None else answer.set_exception(error)

    def work() -> None:
        try:
            outcome: tuple[Any, BaseException | None] = (call(), None)
        except Exception as error:
            outcome = (None, error)
        try:
            loop.call_soon_threadsafe(settle, *outcome)
        except RuntimeError:
            return  # the loop has ended meanwhile

    threading.Thread(target=work, name="gpu-health", daemon=True).start()
    return await answer
