"""NVIDIA's management library as nvidia-ml-py shows it, with the cards that a test plants."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pynvml

GIB = 1 << 30


class FakeError(Exception):
    """As pynvml.NVMLError: value is the library's number for what failed."""

    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


@dataclass
class Memory:
    total: int
    free: int


@dataclass
class Process:
    pid: int
    usedGpuMemory: int | None  # noqa: N815 (NVML's name)


@dataclass
class FakeCard:
    """pcie: generation at most and now, width at most and now."""

    name: str | bytes = "NVIDIA GeForce RTX 3060"
    uuid: str = "GPU-1"
    capability: tuple[int, int] = (8, 6)
    memory: Memory = field(default_factory=lambda: Memory(12 * GIB, 12 * GIB - (300 << 20)))
    pcie: tuple[int, int, int, int] = (4, 1, 16, 16)
    compute: list[Process] = field(default_factory=list)
    graphics: list[Process] = field(default_factory=list)


class FakeNvml:
    """Only the functions that the doctor calls. untold: names of those that fail as unsupported.
    error: what starting the library fails with."""

    def __init__(
        self,
        *cards: FakeCard,
        driver: str | bytes = "580.82.07",
        cuda: int = 13000,
        error: int | None = None,
        untold: tuple[str, ...] = (),
    ) -> None:
        self.error = error
        self.is_open = False
        answers: dict[str, Callable[..., Any]] = {
            "nvmlDeviceGetCount": lambda: len(cards),
            "nvmlSystemGetDriverVersion": lambda: driver,
            "nvmlSystemGetCudaDriverVersion_v2": lambda: cuda,
            "nvmlDeviceGetHandleByIndex": lambda index: cards[index],
            "nvmlDeviceGetName": lambda card: card.name,
            "nvmlDeviceGetUUID": lambda card: card.uuid,
            "nvmlDeviceGetMemoryInfo": lambda card: card.memory,
            "nvmlDeviceGetCudaComputeCapability": lambda card: card.capability,
            "nvmlDeviceGetMaxPcieLinkGeneration": lambda card: card.pcie[0],
            "nvmlDeviceGetCurrPcieLinkGeneration": lambda card: card.pcie[1],
            "nvmlDeviceGetMaxPcieLinkWidth": lambda card: card.pcie[2],
            "nvmlDeviceGetCurrPcieLinkWidth": lambda card: card.pcie[3],
            "nvmlDeviceGetComputeRunningProcesses": lambda card: card.compute,
            "nvmlDeviceGetGraphicsRunningProcesses": lambda card: card.graphics,
        }
        for name, answer in answers.items():
            # A name that the real library lacks would be a test of nothing.
            assert callable(getattr(pynvml, name)), name
            setattr(self, name, self._refuse if name in untold else answer)

    @staticmethod
    def _refuse(*_: object) -> None:
        raise FakeError(3)

    def nvmlInit(self) -> None:  # noqa: N802
        if self.error is not None:
            raise FakeError(self.error)
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        assert self.is_open
        self.is_open = False
