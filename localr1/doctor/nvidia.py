"""What NVIDIA's driver says of its cards, asked through its management library (NVML).

It works without CUDA and without torch: the library comes with the driver, and nvidia-ml-py only
calls it. That either is absent is a finding like any other.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

VENDORS: Final = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}
"""By the number that PCI gives them."""
_DISPLAY_CLASS: Final = "0x03"
# nvml.h, nvmlReturn_t.
_DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND, _VERSION_MISMATCH, _NO_PERMISSION = 9, 12, 18, 4


class DriverState(StrEnum):
    READY = "ready"
    NO_PACKAGE = "nvidia-ml-py is missing"
    NO_DRIVER = "no driver"
    NOT_LOADED = "driver not loaded"
    MISMATCH = "driver and library differ"
    NO_PERMISSION = "no permission"
    FAILED = "failed"


@dataclass(frozen=True)
class CardProcess:
    """memory: bytes of the card's memory; None where the driver does not tell (Windows)."""

    pid: int
    name: str
    memory: int | None


@dataclass(frozen=True)
class Card:
    """index: the driver's, from which CUDA's may differ; uuid tells which is which. memory in
    bytes. capability: None where the driver does not tell, as all PCIe figures. The current
    generation drops while a card idles."""

    index: int
    name: str
    uuid: str
    capability: tuple[int, int] | None
    memory: int
    memory_free: int
    generation: int | None = None
    generation_now: int | None = None
    width: int | None = None
    width_now: int | None = None
    processes: tuple[CardProcess, ...] = ()


@dataclass(frozen=True)
class NvidiaFacts:
    """cuda: the newest CUDA that the driver speaks. detail: what a failure said. displays: makers
    of the graphics cards on the PCI bus, with or without a driver; only Linux lists them."""

    state: DriverState
    detail: str = ""
    driver: str = ""
    cuda: tuple[int, int] | None = None
    cards: tuple[Card, ...] = ()
    displays: tuple[str, ...] = ()


def read_nvidia(load: Callable[[], Any] | None = None, root: Path = Path("/")) -> NvidiaFacts:
    """load: gives the module pynvml, or raises ImportError."""
    displays = _displays(root)
    try:
        nvml = (load or _pynvml)()
    except ImportError as error:
        return NvidiaFacts(DriverState.NO_PACKAGE, str(error), displays=displays)
    try:
        nvml.nvmlInit()
    except Exception as error:  # Besides NVMLError, what loading a broken library raises.
        return NvidiaFacts(_state_of(error), str(error)[:200], displays=displays)
    try:
        count = int(nvml.nvmlDeviceGetCount())
        cuda = _ask(nvml.nvmlSystemGetCudaDriverVersion_v2)
        return NvidiaFacts(
            DriverState.READY,
            driver=_text(_ask(nvml.nvmlSystemGetDriverVersion)),
            cuda=None if cuda is None else (cuda // 1000, cuda % 1000 // 10),
            cards=tuple(_card(nvml, index) for index in range(count)),
            displays=displays,
        )
    except Exception as error:
        return NvidiaFacts(_state_of(error), str(error)[:200], displays=displays)
    finally:
        _ask(nvml.nvmlShutdown)


def _pynvml() -> Any:
    import pynvml

    return pynvml


def _state_of(error: Exception) -> DriverState:
    return {
        _LIBRARY_NOT_FOUND: DriverState.NO_DRIVER,
        _DRIVER_NOT_LOADED: DriverState.NOT_LOADED,
        _VERSION_MISMATCH: DriverState.MISMATCH,
        _NO_PERMISSION: DriverState.NO_PERMISSION,
    }.get(getattr(error, "value", 0), DriverState.FAILED)


def _card(nvml: Any, index: int) -> Card:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    capability = _ask(nvml.nvmlDeviceGetCudaComputeCapability, handle)
    return Card(
        index=index,
        name=_text(_ask(nvml.nvmlDeviceGetName, handle)) or "NVIDIA card",
        uuid=_text(_ask(nvml.nvmlDeviceGetUUID, handle)),
        capability=None if capability is None else (int(capability[0]), int(capability[1])),
        memory=int(memory.total),
        memory_free=int(memory.free),
        generation=_ask(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
        generation_now=_ask(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
        width=_ask(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        width_now=_ask(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
        processes=_processes(nvml, handle),
    )


def _processes(nvml: Any, handle: Any) -> tuple[CardProcess, ...]:
    """Largest first. A program that both draws and computes is in both lists."""
    memory: dict[int, int | None] = {}
    for ask in (
        nvml.nvmlDeviceGetComputeRunningProcesses,
        nvml.nvmlDeviceGetGraphicsRunningProcesses,
    ):
        for process in _ask(ask, handle) or ():
            used = process.usedGpuMemory
            memory[int(process.pid)] = None if used is None else int(used)
    found = [CardProcess(pid, _process_name(pid), used) for pid, used in memory.items()]
    return tuple(sorted(found, key=lambda each: -(each.memory or 0)))


def _process_name(pid: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        return str(psutil.Process(pid).name())[:60]
    return "another user's or container's"


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    """None for what this card or driver does not tell: in WSL and on virtual cards, most of it."""
    try:
        return function(*arguments)
    except Exception:
        return None


def _text(value: Any) -> str:
    """Older releases of the library answer in bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "" if value is None else str(value)


def _displays(root: Path) -> tuple[str, ...]:
    found = []
    for folder in sorted((root / "sys" / "bus" / "pci" / "devices").glob("*")):
        with contextlib.suppress(OSError):
            if (folder / "class").read_text(encoding="ascii").startswith(_DISPLAY_CLASS):
                vendor = (folder / "vendor").read_text(encoding="ascii").strip()
                found.append(VENDORS.get(vendor, f"maker {vendor[:10]}"))
    return tuple(found)
