"""Runs the kernels of cuda/gpu on the NVIDIA card of this machine, through cuda-core."""

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu_model import KERNELS, Changes
from torch import Tensor

from localr1.kernels.gpu_launch import Launch

if TYPE_CHECKING:
    from gpu_cases import Gpu

MARGIN = 256
"""Bytes of sentinels on either side of a buffer."""
SENTINEL = 0xA5


@dataclass(eq=False)
class CardBuffer:
    name: str
    memory: Any
    nbytes: int


class CardGpu:
    """Launches on the current device, one kernel at a time; sentinels around every buffer."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._stream = device.create_stream()
        self._buffers: list[CardBuffer] = []

    def upload(self, name: str, value: Tensor) -> Any:
        data = value.contiguous().flatten().view(torch.uint8)
        whole = torch.full((data.numel() + 2 * MARGIN,), SENTINEL, dtype=torch.uint8)
        whole[MARGIN : MARGIN + data.numel()] = data
        memory = self._device.allocate(whole.numel(), stream=self._stream)
        self._stream.sync()  # memory is there in the stream's order, the copy runs outside of it
        _copy(int(memory.handle), whole.data_ptr(), whole.numel(), to_card=True)
        buffer = CardBuffer(name, memory, data.numel())
        self._buffers.append(buffer)
        return buffer

    def _whole(self, buffer: CardBuffer) -> Tensor:
        whole = torch.empty(buffer.nbytes + 2 * MARGIN, dtype=torch.uint8)
        self._stream.sync()
        _copy(whole.data_ptr(), int(buffer.memory.handle), whole.numel(), to_card=False)
        return whole

    def download(self, buffer: Any, like: Tensor) -> Tensor:
        inner = self._whole(buffer)[MARGIN : MARGIN + buffer.nbytes]
        return inner.clone().view(like.dtype).view(like.shape)

    def address(self, buffer: Any) -> int:
        return int(buffer.memory.handle) + MARGIN

    def launch(
        self, launch: Launch, *arguments: object, rows: int = 16, changes: Changes = ()
    ) -> None:
        from cuda.bindings import driver

        assert not changes, "planted errors run on the model only"
        kernel = launch.kernel
        function = _function(launch.file, rows, kernel, int(self._device.arch))
        values = [
            ctypes.c_void_p(self.address(argument) if isinstance(argument, CardBuffer) else 0)
            if argument is None or isinstance(argument, CardBuffer)
            else argument
            for argument in arguments
        ]
        addresses = (ctypes.c_void_p * len(values))(
            *(ctypes.addressof(value) for value in values)  # type: ignore[arg-type]
        )
        grid, block = [*launch.grid, 1, 1][:3], (launch.threads, 1, 1)
        stream, parameters = self._stream.handle, ctypes.addressof(addresses)
        error = driver.cuLaunchKernel(function.handle, *grid, *block, 0, stream, parameters, 0)[0]
        assert error == driver.CUresult.CUDA_SUCCESS, f"{kernel}: {error}"
        self._stream.sync()
        for buffer in self._buffers:
            whole = self._whole(buffer)
            margins = torch.cat((whole[:MARGIN], whole[MARGIN + buffer.nbytes :]))
            assert (margins == SENTINEL).all(), f"{kernel} wrote outside {buffer.name}"


def _copy(target: int, source: int, nbytes: int, *, to_card: bool) -> None:
    from cuda.bindings import driver

    copy = driver.cuMemcpyHtoD if to_card else driver.cuMemcpyDtoH
    result = copy(target, source, nbytes)
    error = result[0] if isinstance(result, tuple) else result
    assert error == driver.CUresult.CUDA_SUCCESS, error


@functools.cache
def _function(file: str, rows: int, kernel: str, capability: int) -> Any:
    from cuda.core import ObjectCode

    from localr1.kernels.gpu_program import architecture, compile_program

    arch = architecture(capability)
    cubin = compile_program(KERNELS.parent, file, arch, rows).cubin
    return ObjectCode.from_cubin(cubin).get_kernel(kernel)


def cards() -> "Iterator[Gpu]":
    """The first card; skips the test where there is none."""
    core = pytest.importorskip("cuda.core", reason="needs cuda-core and an NVIDIA GPU")
    try:
        device = core.Device()
        device.set_current()
    except Exception as error:  # without a driver: an error of the loader
        pytest.skip(f"no NVIDIA GPU: {type(error).__name__}")
    yield CardGpu(device)
