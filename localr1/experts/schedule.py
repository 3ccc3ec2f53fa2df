"""Where the experts of a pass are computed: on the device that holds some of them, on the CPU, or
on the device after a copy over the link. Pure Python, no torch.

Two machines work at the same time and the pass waits for the slower one, so what is looked for is
the least maximum of their times (Graham 1969, "Bounds on multiprocessing timing anomalies", has the
problem for equal machines). Every expert has a time on each; they are put in the order of the ratio
of the two, and the best cut through that order is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from localr1.experts.trial import Trial

POINTS: Final = (1, 4, 16, 64)
"""Tokens of an expert at which its time is known; between them it is a straight line."""
LEARNING: Final = 0.05
"""Share of a new measurement in what is believed."""
MIN_STREAM_TOKENS: Final = 2
"""Of an expert, to be streamed: in decode a cold expert is cheaper to compute where it lies than
to copy, and what the link carries is promotions."""


@dataclass
class Curve:
    """Seconds of one expert for n tokens, as measured at POINTS and corrected while running."""

    seconds: list[float]
    factor: float = 1.0

    def __call__(self, tokens: int) -> float:
        return self.factor * self._measured(tokens)

    def first_of(self, counts: Sequence[int]) -> float:
        """Seconds of experts of so many tokens each, one after another, as measured at first."""
        return sum(map(self._measured, counts))

    def observe(self, counts: Sequence[int], seconds: float) -> None:
        """Experts of so many tokens each took so long, one after another."""
        expected = self.first_of(counts)
        if expected > 0.0 and seconds > 0.0:
            ratio = min(max(seconds / expected, 0.1), 10.0)
            self.factor += LEARNING * (ratio - self.factor)

    def _measured(self, tokens: int) -> float:
        points, seconds = POINTS, self.seconds
        after = next((i for i, point in enumerate(points) if point >= tokens), len(points) - 1)
        if after == 0:
            return seconds[0]
        low, high = points[after - 1], points[after]
        slope = (seconds[after] - seconds[after - 1]) / (high - low)
        return max(seconds[after - 1] + slope * (tokens - low), 0.0)


@dataclass
class Rates:
    """Seconds of an expert by its tokens. device: of one that lies there; streamed: of one that is
    copied there first, while the one before is computed. link: seconds of such a copy by itself.
    streaming: whether it pays at all: what copies take from all else, such as the bandwidth of RAM
    or the cores that make them, is in none of the curves."""

    cpu: Curve
    device: Curve
    streamed: Curve
    link: float
    streaming: Trial = field(default_factory=Trial)

    def observe_link(self, count: int, seconds: float) -> None:
        if count:
            self.link += LEARNING * (min(seconds / count, 10.0 * self.link) - self.link)

    def observe_layer(self, uses: "Sequence[Use]", seconds: float) -> None:
        """A layer whose experts were split took so long in all."""
        if any(map(is_streamable, uses)) and all(use.in_ram or use.on_device for use in uses):
            # By the work there was, as layers and prompts differ.
            self.streaming.measured(seconds / self.cpu.first_of([use.tokens for use in uses]))


@dataclass(frozen=True)
class Use:
    """An expert that `tokens` of a pass chose. on_device, in_ram: where it lies, if anywhere but in
    its file."""

    expert: int
    tokens: int
    on_device: bool
    in_ram: bool


@dataclass
class Split:
    """device: computed where they lie. streamed: copied to the device first. cpu: the rest."""

    device: list[Use] = field(default_factory=list)
    streamed: list[Use] = field(default_factory=list)
    cpu: list[Use] = field(default_factory=list)


def split(uses: Sequence[Use], rates: Rates, *, max_streamed: int) -> Split:
    """An expert that lies only on the device is computed there, one that lies only in its file on
    the CPU; all others where the pass ends soonest, at most `max_streamed` of them streamed, and
    none where `rates.streaming` is off."""
    max_streamed = max_streamed if rates.streaming.is_on else 0
    result = Split()
    device_seconds = cpu_seconds = 0.0
    # By the ratio of the two times: on the device, and on the CPU.
    free: list[tuple[float, float, Use]] = []
    streamable: list[tuple[float, float, Use]] = []
    for use in uses:
        on_device, on_cpu = rates.device(use.tokens), rates.cpu(use.tokens)
        if use.on_device and not use.in_ram:
            result.device.append(use)
            device_seconds += on_device
        elif use.on_device:
            free.append((on_device, on_cpu, use))
        elif is_streamable(use):
            streamable.append((rates.streamed(use.tokens), on_cpu, use))
        else:
            result.cpu.append(use)
            cpu_seconds += on_cpu
    streamable.sort(key=_ratio)
    for _, on_cpu, use in streamable[max_streamed:]:
        result.cpu.append(use)
        cpu_seconds += on_cpu
    free = sorted(free + streamable[:max_streamed], key=_ratio)
    cpu_seconds += sum(on_cpu for _, on_cpu, _ in free)
    best, cut = max(device_seconds, cpu_seconds), 0
    for index, (on_device, on_cpu, _) in enumerate(free, 1):
        device_seconds += on_device
        cpu_seconds -= on_cpu
        longest = max(device_seconds, cpu_seconds)
        # Of equal ends the one with more on the device: the CPU has other work.
        if longest <= best:
            best, cut = longest, index
    for _, _, use in free[:cut]:
        (result.device if use.on_device else result.streamed).append(use)
    result.cpu += [use for _, _, use in free[cut:]]
    return result


def is_streamable(use: Use) -> bool:
    """Whether copying it to the device is worth a thought."""
    return use.in_ram and not use.on_device and use.tokens >= MIN_STREAM_TOKENS


def _ratio(times: tuple[float, float, Use]) -> float:
    on_device, on_cpu, _ = times
    return on_device / on_cpu if on_cpu > 0.0 else float("inf")
