"""The experts that a pass needs of a layer, computed where they lie.

The device computes those it holds, and copies over those that are worth it. The CPU meanwhile
computes those in RAM, then each that arrives from its file, while others are read and reads for the
next layer begin. Which of them computed what changes no bit (docs/arithmetic.md).
"""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localr1.experts.accounting import Accounting
from localr1.experts.choices import only
from localr1.experts.device import DeviceTimes, Streamed
from localr1.experts.ram import RamTier
from localr1.experts.read_ahead import ReadAhead
from localr1.experts.schedule import Split, Use, split
from localr1.experts.tiers import DeviceTiers, rates_of
from localr1.kernels.api import Routing
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import NativeExperts


class LayerCompute:
    """banks: by layer, of what lies in RAM. on_device: bool [layers, experts], what lies on any of
    `hot`. It moves nothing between tiers but what it reads."""

    def __init__(
        self,
        kernels: NativeKernels,
        banks: Sequence[NativeExperts],
        ram: RamTier,
        hot: DeviceTiers | None,
        on_device: NDArray[np.bool_],
        read_ahead: ReadAhead,
        accounting: Accounting,
    ) -> None:
        self._kernels = kernels
        self._banks = banks
        self._ram = ram
        self._hot = hot
        self._on_device = on_device
        self._read_ahead = read_ahead
        self._accounting = accounting

    def find(self, layer: int, experts: Sequence[int], counts: Sequence[int]) -> list[Use]:
        """Where each lies, by now. counts: tokens that chose it."""
        self._ram.collect((), layer, block=False)
        on_device = self._on_device[layer]
        return [
            Use(expert, count, bool(on_device[expert]), self._ram.holds(layer, expert))
            for expert, count in zip(experts, counts, strict=True)
        ]

    def mix(
        self,
        layer: int,
        x: Tensor,
        routing: Routing,
        residual: Tensor,
        experts: Sequence[int],
        counts: Sequence[int],
    ) -> None:
        """`ExpertSource` of a layer, of all tiers. experts: the distinct ones of the routing, each
        chosen by so many tokens as `counts` says. Raises what reading raises, and DeviceError."""
        begin = time.perf_counter()
        uses = self.find(layer, experts, counts)
        parts = Split(cpu=uses)
        rates = rates_of(self._hot, layer)
        if rates is not None:
            # What is streamed keeps its slot until the device is done, and others need some.
            parts = split(uses, rates, max_streamed=self._ram.room // 2)
        self._accounting.usage.spared += sum(use.on_device for use in parts.cpu)
        outputs = x.new_empty(*routing.experts.shape, x.shape[1])
        with self._ram.pinned(layer, [use.expert for use in parts.streamed]):
            running = self._begin_on_device(layer, x, routing.experts, parts, outputs)
            try:
                self.on_host(layer, x, routing.experts, parts.cpu, outputs, residual)
            finally:
                # Also after an error: the device writes into the outputs and reads what is
                # streamed.
                if running is not None:
                    waits = time.perf_counter()
                    times = running.result()
                    waited = time.perf_counter() - waits
                    self._accounting.count_device_share(layer, parts, times, waited)
        self._kernels.combine_experts(outputs, routing.weights, residual)
        if rates is not None:
            rates.observe_layer(uses, time.perf_counter() - begin)

    def on_host(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        uses: Sequence[Use],
        outputs: Tensor,
        residual: Tensor,
    ) -> None:
        """The outputs [T, k, hidden] of `uses`, which are some of those chosen int64 [T, k]; of all
        others what was there before. What lies in RAM comes first, then each that arrives from its
        file, while others are read. residual: for a guess of what the next layer needs."""
        ram = self._ram
        here = [use.expert for use in uses if use.in_ram]
        absent = [use.expert for use in uses if not use.in_ram]
        # Read ahead, or begun by a pass that ended in an error.
        waiting = {expert for expert in absent if ram.is_reading(layer, expert)}
        queue = deque(expert for expert in absent if expert not in waiting)
        tokens = {use.expert: use.tokens for use in uses}
        self._accounting.count_uses(layer, here, absent)

        def compute(experts: Sequence[int]) -> None:
            counts = [tokens[expert] for expert in experts]
            self._compute(layer, x, chosen, experts, counts, outputs)

        def ask() -> None:
            while queue and ram.room > 0:
                expert = queue.popleft()
                ram.request(layer, expert)
                waiting.add(expert)

        if queue:
            self._accounting.tell()
        with ram.pinned(layer, here):
            ask()
            if not queue:
                self._read_ahead(layer, residual)
            if here:
                compute(here)
        while queue or waiting:
            ask()
            if not waiting:
                assert ram.num_reading, "a slot is free, or will be when a read is over"
                ram.wait_for_any()
                continue
            arrived = ram.collect(waiting, layer, block=True)
            waiting.difference_update(arrived)
            with ram.pinned(layer, arrived):
                ask()
                compute(arrived)

    def _begin_on_device(
        self, layer: int, x: Tensor, chosen: Tensor, parts: Split, outputs: Tensor
    ) -> "Future[DeviceTimes] | None":
        """None where it has nothing to do."""
        used = [use.expert for use in (*parts.device, *parts.streamed)]
        if not used:
            return None
        assert self._hot is not None
        streamed = [
            Streamed(use.expert, self._ram.address(layer, use.expert)) for use in parts.streamed
        ]
        some = only(chosen, used, self._on_device.shape[1])
        return self._hot.of_layer(layer).device.compute(layer, x, some, streamed, outputs)

    def _compute(
        self,
        layer: int,
        x: Tensor,
        chosen: Tensor,
        experts: Sequence[int],
        counts: Sequence[int],
        outputs: Tensor,
    ) -> None:
        """Of experts that RAM holds, each for so many tokens as `counts` says."""
        begin = time.perf_counter()
        some = only(chosen, experts, self._on_device.shape[1])
        self._kernels.expert_outputs(x, some, self._banks[layer], outputs)
        self._accounting.count_computed(layer, counts, begin, time.perf_counter() - begin)
