"""What passes chose and what computing it took, told to all who learn from it: the usage that users
see, the ranking of experts, the rates by which work is split, and the recorded spans."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from localr1.experts.choices import PassChoices
from localr1.experts.device import DeviceTimes
from localr1.experts.policy import Ranking
from localr1.experts.ram import RamTier
from localr1.experts.schedule import Split
from localr1.experts.tiers import DeviceTiers, rates_of
from localr1.experts.usage import ExpertUsage, Span
from localr1.kernels.host_mixtures import HostResult


class Accounting:
    """usage: what is added to, as `ram` does too. choices: of the running pass. on_device: bool
    [layers, experts], what lies on any of `hot`. spans: what took time, where it is recorded."""

    def __init__(
        self,
        usage: ExpertUsage,
        choices: PassChoices,
        ranking: Ranking,
        on_device: NDArray[np.bool_],
        ram: RamTier,
        hot: DeviceTiers | None,
    ) -> None:
        self.usage = usage
        self.spans: list[Span] | None = None
        self._choices = choices
        self._ranking = ranking
        self._on_device = on_device
        self._ram = ram
        self._hot = hot
        self._slot_bytes = ram.arena.slot_bytes

    def tell(self, *, ranked: bool = True) -> None:
        """What was chosen since the last time: at the end of a pass, and before something has to
        make room for what it needs. Nothing is ranked where nothing ever has to."""
        self._choices.tell(self._ranking if ranked else None)

    def count_results(self, results: Sequence[HostResult], now: float) -> None:
        """Of a token's layers that were computed without the store. now: of time.perf_counter, when
        the results were told."""
        for result in results:
            layer = result.layer
            experts = self._choices.add_token(layer, result.chosen)
            on_device = self._on_device[layer, result.chosen].tolist()
            here = [
                expert for expert, is_there in zip(experts, on_device, strict=True) if not is_there
            ]
            self.count_on_device(len(experts) - len(here))
            self.count_uses(layer, here, ())
            if here:
                begin = now - result.ago
                self.count_computed(layer, [1] * len(here), begin, result.seconds)

    def count_uses(self, layer: int, here: Iterable[int], absent: Sequence[int]) -> None:
        """Of experts in RAM, and of others that are read first, now or since before they were asked
        for: one that was read ahead was read all the same."""
        ahead = sum(self._ram.was_read_ahead(layer, expert) for expert in here)
        on_the_way = sum(self._ram.is_read_ahead(layer, expert) for expert in absent)
        self.usage.prefetch_hits += ahead + on_the_way
        self.usage.reads += ahead + len(absent)
        self.count_in_ram(len(list(here)) - ahead)
        self.usage.ram_bytes += (ahead + len(absent)) * self._slot_bytes

    def count_in_ram(self, count: int) -> None:
        """Of experts that needed no file."""
        self.usage.ram_hits += count
        self.usage.ram_bytes += count * self._slot_bytes

    def count_computed(
        self, layer: int, counts: Sequence[int], begin: float, seconds: float
    ) -> None:
        """Experts from RAM, of so many tokens each."""
        self.usage.ram_seconds += seconds
        rates = rates_of(self._hot, layer)
        if rates is not None:
            rates.cpu.observe(counts, seconds)
        if self.spans is not None:
            self.spans.append(Span("compute", begin, begin + seconds, layer, None))

    def count_on_device(self, count: int) -> None:
        """Of experts that a device computed by itself."""
        self.usage.device_hits += count
        self.usage.device_bytes += count * self._slot_bytes

    def count_device_share(
        self, layer: int, parts: Split, times: DeviceTimes, waited: float
    ) -> None:
        """What a device that was asked has just done of a layer. waited: seconds, for it alone."""
        # The share of the wait that the link is to blame for is that of the device's own.
        whole = times.compute + times.streamed + times.link
        link = waited * times.link / whole if whole > 0.0 else 0.0
        self.usage.link_seconds += link
        self.usage.device_seconds += waited - link
        self.count_on_device(len(parts.device) + len(parts.streamed))
        self.usage.streamed += len(parts.streamed)
        self.usage.link_bytes += len(parts.streamed) * self._slot_bytes
        rates = rates_of(self._hot, layer)
        if rates is not None:
            rates.device.observe([use.tokens for use in parts.device], times.compute)
            streamed = [use.tokens for use in parts.streamed]
            rates.streamed.observe(streamed, times.streamed + times.link)
        if self.spans is not None:
            now = time.perf_counter()
            self.spans.append(Span("device", now - whole, now, layer, None))
