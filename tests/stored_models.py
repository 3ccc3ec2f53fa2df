"""Tiny mixtures whose experts are in an ExpertStore, and checkpoints that fail while they run."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
from packed_models import packed_checkpoint
from tiny_models import MemoryCheckpoint, prompt, tiny_transformer
from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.errors import LocalR1Error
from localr1.experts.cuda import CudaDevice
from localr1.experts.device import Device, SimulatedDevice
from localr1.experts.hosting import Hosting, Slots, host_experts
from localr1.experts.store import ExpertStore
from localr1.experts.store_options import StoreOptions
from localr1.kernels.gpu_driver import Driver
from localr1.kernels.native import NativeKernels, available_isas
from localr1.models.decoder import Decoder
from localr1.models.registry import load_model
from localr1.models.step import Step

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 64,
        "head_dim": 16,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
        "intermediate_size": 96,
    },
    "deepseek_v3": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_hidden_layers": 4,
        "max_position_embeddings": 512,
        "n_routed_experts": 16,
    },
}


@cache
def source(model_type: str) -> MemoryCheckpoint:
    """A packed mixture of random weights: 4 layers; 8 or 16 experts, of which a token gets 3."""
    model = tiny_transformer(model_type, 0, **SIZES[model_type])
    return packed_checkpoint(
        model, 4, keep=lambda prefix: prefix.endswith(".gate") or "kv_b" in prefix
    )


@dataclass
class FailingCheckpoint:
    """Reads of experts fail from the n-th on, `failures` times, with `error`. n counts from 1 and
    from when `arm` is called. pace: set, it holds each read back until it is set."""

    checkpoint: MemoryCheckpoint
    error: LocalR1Error | None = None
    fail_at: int = 0
    failures: int = 1
    reads: int = 0
    closed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Of the checkpoint, which makes them anew every time: reads ask often."""
        return self.checkpoint.tensors

    def arm(self, error: LocalR1Error, fail_at: int, failures: int = 1) -> None:
        self.error, self.fail_at, self.failures, self.reads = error, fail_at, failures, 0

    def read(self, name: str) -> Tensor:
        if ".experts." in name and name.endswith("gate_proj.weight_packed"):
            with self.lock:
                self.reads += 1
                fails = self.error is not None and (
                    self.fail_at <= self.reads < self.fail_at + self.failures
                )
            if fails:
                assert self.error is not None
                raise self.error
        return self.checkpoint.read(name)

    def close(self) -> None:
        self.closed += 1


@dataclass
class Stored:
    """A loaded model and its store."""

    model: Decoder
    store: ExpertStore
    checkpoint: FailingCheckpoint

    def logits(self, ids: Tensor, prefill: int = 24) -> Tensor:
        return run(self.model, ids, prefill)


def run(model: Decoder, ids: Tensor, prefill: int = 24) -> Tensor:
    """Logits of every token: `prefill` tokens in one pass, the rest one by one."""
    memory = model.new_cache(len(ids))
    rows = [model.forward(Step(ids[:prefill], 0, all_logits=True), memory)]
    rows += [
        model.forward(Step(ids[position : position + 1], position), memory)
        for position in range(prefill, len(ids))
    ]
    return torch.cat(rows)


def simulated(
    share: float, num_experts: int, slot_bytes: int, bandwidth: float = 25e9
) -> SimulatedDevice:
    memory = (int(share * num_experts) + 2) * slot_bytes
    return SimulatedDevice(memory, bandwidth, 1e-5, 1, available_isas()[0])


@contextmanager
def stored(
    model_type: str,
    ram: float,
    device: float | None = None,
    options: StoreOptions | None = None,
    *,
    threads: int = 1,
    bandwidth: float = 25e9,
    driver: Callable[[int], Driver] | None = None,
) -> Iterator[Stored]:
    """ram, device: shares of all experts that there is room for; device None for none. driver: of a
    card that is the device, given the rows of a row block; None: the device is simulated."""
    checkpoint = FailingCheckpoint(source(model_type))
    kernels = NativeKernels(threads=threads)
    model = load_model(checkpoint, kernels, leave_experts=True)
    assert isinstance(model, Decoder)
    slot_bytes = 64 * 32 * 3 * 9 // 16  # 4.5 bits a weight; no row block is padded.
    total = model.config.parameter_count // 1  # More than enough: the share decides.
    hardware: Device | None = None
    if device is not None and driver is not None:
        memory = (int(device * total) + 2) * slot_bytes
        hardware = CudaDevice(driver(kernels.rows_per_block), memory, kernels)
    elif device is not None:
        hardware = simulated(device, total, slot_bytes, bandwidth)
    hosting = Hosting(
        slots=lambda _, count: Slots(int(ram * count), [int((device or 0.0) * count)]),
        devices=[] if hardware is None else [hardware],
        options=options or StoreOptions(),
    )
    store = host_experts(model, checkpoint, kernels, hosting)
    assert store is not None
    try:
        yield Stored(model, store, checkpoint)
    finally:
        store.close()


@cache
def expected(model_type: str, length: int, prefill: int = 24) -> Tensor:
    """The logits of the model with all its experts in memory and no store."""
    model = load_model(source(model_type), NativeKernels(threads=1))
    assert isinstance(model, Decoder)
    return run(model, tokens(length), prefill)


def tokens(length: int) -> Tensor:
    return prompt(0, length)
