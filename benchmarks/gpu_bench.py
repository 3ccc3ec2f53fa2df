"""What the benchmarks of graphics cards share: a clock in the card's own time, the rate at which it
copies its memory, and where results go."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from localr1.kernels.gpu_driver import MODEL_PROGRAMS, Driver, open_card
from localr1.kernels.gpu_program import kept_programs
from localr1.kernels.native import NativeKernels
from localr1.settings import Settings

RESULTS = Path(__file__).resolve().parent / "results"
COPIED_BYTES = 1 << 30
"""Far beyond any card's second-level cache."""
REPETITIONS = 15
INT8_OF_SM = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 4096, 120: 1024}
"""Multiplications of int8 that an SM's tensor cores do a clock, by compute capability: worked out
from NVIDIA's data sheets, for dense matrices."""


class Clock(Protocol):
    def seconds(self, work: Callable[[], None]) -> float:
        """Between the beginning and the end of what `work` gives to the stream."""
        ...

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Within the card's memory, in the stream's order."""
        ...


@dataclass
class BenchCard:
    """stream: the clock's, which everything is to be given to. int8_peak: products and sums of int8
    that the tensor cores do a second at the card's highest clock, None where that is not known."""

    driver: Driver
    stream: Any
    clock: Clock
    rows_per_block: int
    int8_peak: float | None = None

    def median(self, work: Callable[[], None], repetitions: int = REPETITIONS) -> float:
        """Seconds, after a repetition that does not count."""
        self.clock.seconds(work)
        return statistics.median(self.clock.seconds(work) for _ in range(repetitions))

    def copy_rate(self, nbytes: int = COPIED_BYTES) -> float:
        """Bytes a second that a copy within the card's memory reads and writes, both counted."""
        source, target = self.driver.allocate(nbytes), self.driver.allocate(nbytes)
        try:
            seconds = self.median(lambda: self.clock.copy(target, source, nbytes))
        finally:
            self.driver.free(source)
            self.driver.free(target)
        return 2 * nbytes / seconds


class EventClock:
    """By events of NVIDIA's driver, of which those of `Driver` keep no time."""

    def __init__(self, stream: Any) -> None:
        from cuda.bindings import driver as api

        self._api, self._stream = api, stream
        self._begin, self._end = (self._call("cuEventCreate", 0) for _ in range(2))

    def seconds(self, work: Callable[[], None]) -> float:
        self._call("cuEventRecord", self._begin, self._stream)
        work()
        self._call("cuEventRecord", self._end, self._stream)
        self._call("cuEventSynchronize", self._end)
        return float(self._call("cuEventElapsedTime", self._begin, self._end)) / 1e3

    def copy(self, target: int, source: int, nbytes: int) -> None:
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, self._stream)

    def int8_peak(self) -> float | None:
        """`BenchCard.int8_peak` of the first card."""
        names = self._api.CUdevice_attribute
        major, minor, count, kilohertz = (
            int(self._call("cuDeviceGetAttribute", attribute, 0))
            for attribute in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                names.CU_DEVICE_ATTRIBUTE_CLOCK_RATE,
            )
        )
        of_sm = INT8_OF_SM.get(10 * major + minor)
        return None if of_sm is None else 2.0 * of_sm * count * 1e3 * kilohertz

    def _call(self, function: str, *arguments: Any) -> Any:
        code, *values = getattr(self._api, function)(*arguments)
        if code != self._api.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{function}: {code}")
        return values[0] if values else None


def open_bench_card() -> BenchCard:
    """This machine's first card. Raises KernelError, in one sentence, where there is none."""
    rows = NativeKernels(threads=1).rows_per_block
    driver = open_card(kept_programs(Settings.from_environment(), print), rows, MODEL_PROGRAMS)
    driver.enter()
    stream = driver.stream()
    clock = EventClock(stream)
    return BenchCard(driver, stream, clock, rows, clock.int8_peak())


def write_results(name: str, card: str, lines: list[str], data: dict[str, Any]) -> None:
    """Print a table and keep it, as text and for programs, under the card's name."""
    stem = f"{name}-{'-'.join(card.lower().split())}"
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"kept as {RESULTS / stem}.md and .json")
