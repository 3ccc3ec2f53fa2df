"""How long an expert takes on the CPU, on the device and on the link between, measured with the
model's own experts before anything runs."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import numpy as np
import torch
from torch import Tensor

from localr1.experts.device import Streamed
from localr1.experts.hot import DeviceTier
from localr1.experts.ram import ExpertFiles, RamTier
from localr1.experts.schedule import POINTS, Curve, Rates
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import NativeExperts, SlotArena

MEASURED_READS: Final = 256
MEASURED: Final = 4
"""Experts that are used at most: together they do not stay in the processor's cache."""

COPIES: Final = 3


def measure_rates(
    kernels: NativeKernels, banks: Sequence[NativeExperts], ram: RamTier, hot: DeviceTier
) -> Rates:
    """banks: by layer, of what lies in RAM. Takes some milliseconds; both tiers hold something."""
    cold_layer, cold = _of_one_layer(ram.residency.resident_keys.tolist(), banks)
    hot_layer, there = _of_one_layer(hot.residency.resident_keys.tolist(), banks)

    def on_cpu(x: Tensor, chosen: Tensor, outputs: Tensor) -> float:
        begin = time.perf_counter()
        kernels.expert_outputs(x, chosen, banks[cold_layer], outputs)
        return time.perf_counter() - begin

    def on_device(x: Tensor, chosen: Tensor, outputs: Tensor) -> float:
        return hot.device.compute(hot_layer, x, chosen, (), outputs).result().compute

    passing = [Streamed(expert, ram.address(cold_layer, expert)) for expert in cold]

    def streaming(x: Tensor, chosen: Tensor, outputs: Tensor) -> float:
        times = hot.device.compute(cold_layer, x, chosen, passing, outputs).result()
        return times.streamed + times.link

    def copy() -> float:
        return hot.device.upload(passing[0].address, ram.arena.slot_bytes, None).result()

    return Rates(
        cpu=Curve(_seconds_by_tokens(on_cpu, cold, banks[cold_layer].hidden_size)),
        device=Curve(_seconds_by_tokens(on_device, there, banks[hot_layer].hidden_size)),
        streamed=Curve(_seconds_by_tokens(streaming, cold, banks[cold_layer].hidden_size)),
        # The first copies touch the memory for the first time.
        link=min(copy() for _ in range(COPIES)),
    )


def measure_reads(
    files: ExpertFiles, slot_bytes: int, shape: tuple[int, int], num_threads: int
) -> float:
    """Bytes a second of experts on their way from their files into slots, so many at once. shape:
    layers, and experts of each."""
    arena = SlotArena(slot_bytes)
    total = shape[0] * shape[1]
    keys = np.linspace(0, total - 1, min(MEASURED_READS, total)).astype(int).tolist()
    slots = arena.resize(min(num_threads, len(keys)))

    def read(thread: int) -> int:
        places = [divmod(key, shape[1]) for key in keys[thread::slots]]
        return sum(files.read(layer, expert, arena, thread) for layer, expert in places)

    with ThreadPoolExecutor(slots) as threads:
        begin = time.perf_counter()
        nbytes = sum(threads.map(read, range(slots)))
    return nbytes / (time.perf_counter() - begin)


def _of_one_layer(keys: list[int], banks: Sequence[NativeExperts]) -> tuple[int, list[int]]:
    """The first key's layer, and at most MEASURED of its experts that are held."""
    places = [divmod(key, banks[0].num_experts) for key in keys]
    layer = places[0][0]
    return layer, [expert for other, expert in places if other == layer][:MEASURED]


def _seconds_by_tokens(
    compute: Callable[[Tensor, Tensor, Tensor], float], experts: Sequence[int], hidden: int
) -> list[float]:
    """Of one expert, at POINTS tokens: the best of three calls that each use all of `experts`.
    compute: of x, chosen and outputs, returns its seconds."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for tokens in POINTS:
        x = torch.randn(tokens, hidden, generator=generator)
        chosen = torch.tensor([list(experts)] * tokens)
        outputs = x.new_empty(*chosen.shape, hidden)
        result.append(min(compute(x, chosen, outputs) for _ in range(3)) / len(experts))
    return result
