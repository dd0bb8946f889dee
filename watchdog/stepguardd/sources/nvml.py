"""
One look at the GPUs through NVML, as plain values.

Promises that what the driver does not say is None, that a GPU which is lost or partitioned (MIG) is said to
be, and that trouble with the driver as a whole ends in GpuError with one line. A call may block for as long
as the driver likes: `gpu.GpuSense` is what keeps that from anybody. Process numbers are the host's: in a
container with its own pid namespace they match nothing, and memory per process is then unknown.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

THROTTLE_REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
"""Why clocks are held down against the work's will; being idle or set to fixed clocks is no such reason."""

_XID_EVENT = 0x08
_EVENTS_A_LOOK = 64


class GpuError(Exception):
    """The GPUs cannot be asked; the message is one line that says why."""


class NoGpuDriverError(GpuError):
    """There is nothing to ask on this machine, and there will hardly be in a minute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process that holds memory on a GPU; how much is None where the driver does not tell."""

    pid: int
    used_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU at one time. A lost one has fallen off the bus, and everything else of it is unknown."""

    index: int
    uuid: str | None = None
    lost: bool = False
    mig: bool | None = None
    used_bytes: int | None = None
    total_bytes: int | None = None
    busy_percent: int | None = None
    temperature_c: int | None = None
    power_w: float | None = None
    throttled_by: tuple[str, ...] | None = None
    ecc_uncorrected: int | None = None
    processes: tuple[GpuProcess, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Xid:
    """A fault that the driver reported: the GPU's UUID, where known, and the Xid's number."""

    uuid: str | None
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLook:
    """Everything that one look gave: each GPU, and the faults since the last look."""

    gpus: tuple[Gpu, ...]
    xids: tuple[Xid, ...] = field(default=())


class NvmlDriver:
    """The driver, by `pynvml`, for one thread. It is opened at the first look, and again after a failure."""

    def __init__(self) -> None:
        self._nvml: Any = None
        self._events: object | None = None
        self._handles: list[object] = []

    def look(self) -> GpuLook:
        """Ask everything once. Raises GpuError."""
        nvml = self._open() if self._nvml is None else self._nvml
        try:
            gpus = tuple(self._gpu(nvml, index, handle) for index, handle in enumerate(self._handles))
            return GpuLook(gpus=gpus, xids=self._xids(nvml))
        except _errors(nvml) as failed:
            self._close(nvml)
            raise GpuError(f"NVML: {failed}") from None

    def _open(self) -> Any:
        try:
            import pynvml as nvml  # noqa: PLC0415 - an extra, and only machines with GPUs need it
        except ModuleNotFoundError:
            raise NoGpuDriverError("GPUs are not watched: nvidia-ml-py is not installed") from None
        try:
            nvml.nvmlInit()
        except _errors(nvml) as failed:
            absent = getattr(failed, "value", None) == nvml.NVML_ERROR_LIBRARY_NOT_FOUND
            kind = NoGpuDriverError if absent else GpuError
            raise kind(f"GPUs are not watched: {failed}") from None
        try:
            self._handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
            self._events = self._register(nvml)
        except _errors(nvml) as failed:
            self._close(nvml)
            raise GpuError(f"NVML: {failed}") from None
        self._nvml = nvml
        return nvml

    def _close(self, nvml: Any) -> None:
        """Let go of the driver, so that the next look opens it anew: it may have been reloaded."""
        if self._events is not None:
            _ask(nvml, nvml.nvmlEventSetFree, self._events)
        _ask(nvml, nvml.nvmlShutdown)
        self._nvml, self._events, self._handles = None, None, []

    def _register(self, nvml: Any) -> object | None:
        """Ask for the faults to be told; None where no GPU offers that."""
        events: object | None = _ask(nvml, nvml.nvmlEventSetCreate)
        if events is not None:
            for handle in self._handles:
                supported = _ask(nvml, nvml.nvmlDeviceGetSupportedEventTypes, handle)
                if supported is not None and supported & _XID_EVENT:
                    _ask(nvml, nvml.nvmlDeviceRegisterEvents, handle, _XID_EVENT, events)
        return events

    def _xids(self, nvml: Any) -> tuple[Xid, ...]:
        found: list[Xid] = []
        while self._events is not None and len(found) < _EVENTS_A_LOOK:
            event = _ask(nvml, nvml.nvmlEventSetWait_v2, self._events, 0)
            if event is None:
                break
            if event.eventType == _XID_EVENT:
                uuid = _ask(nvml, nvml.nvmlDeviceGetUUID, event.device)
                found.append(Xid(uuid=uuid, number=int(event.eventData)))
        return tuple(found)

    def _gpu(self, nvml: Any, index: int, handle: object) -> Gpu:
        try:
            memory = _memory(nvml, handle)
        except nvml.NVMLError as failed:
            if failed.value == nvml.NVML_ERROR_GPU_IS_LOST:
                return Gpu(index=index, lost=True)
            raise

        def ask(function: Callable[..., Any], *more: object) -> Any:
            return _ask(nvml, function, handle, *more)

        mig = ask(nvml.nvmlDeviceGetMigMode)
        busy = ask(nvml.nvmlDeviceGetUtilizationRates)
        reasons = ask(nvml.nvmlDeviceGetCurrentClocksEventReasons)
        power_mw = ask(nvml.nvmlDeviceGetPowerUsage)
        processes = ask(nvml.nvmlDeviceGetComputeRunningProcesses)
        return Gpu(
            index=index,
            uuid=ask(nvml.nvmlDeviceGetUUID),
            mig=None if mig is None else mig[0] != 0,
            used_bytes=None if memory is None else int(memory.used),
            total_bytes=None if memory is None else int(memory.total),
            busy_percent=None if busy is None else int(busy.gpu),
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power_mw is None else power_mw / 1000,
            throttled_by=None if reasons is None else _throttled_by(reasons),
            ecc_uncorrected=ask(
                nvml.nvmlDeviceGetTotalEccErrors,
                nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
                nvml.NVML_VOLATILE_ECC,
            ),
            processes=None
            if processes is None
            else tuple(
                GpuProcess(pid=int(process.pid), used_bytes=process.usedGpuMemory) for process in processes
            ),
        )


def _memory(nvml: Any, handle: object) -> Any:
    """Ask for the memory; what is wrong with the GPU or the driver as a whole shows here and is raised."""
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError as failed:
        if failed.value in {nvml.NVML_ERROR_NOT_SUPPORTED, nvml.NVML_ERROR_NO_PERMISSION}:
            return None
        raise


def _throttled_by(reasons: int) -> tuple[str, ...]:
    return tuple(name for bit, name in THROTTLE_REASONS.items() if reasons & bit)


def _errors(nvml: Any) -> tuple[type[Exception], ...]:
    return (nvml.NVMLError, nvml.NVMLLibraryMismatchError, UnicodeDecodeError)


def _ask(nvml: Any, function: Callable[..., Any], *arguments: object) -> Any:
    """Ask one thing; None where the driver does not answer it."""
    try:
        return function(*arguments)
    except _errors(nvml):
        return None
