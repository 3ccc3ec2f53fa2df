"""The host's share of a token that goes through layers on cards, computed in the order of the
cards' streams, without Python (cuda/cpu/host_mixtures.h)."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localr1.errors import KernelError
from localr1.kernels.checks import check_outputs
from localr1.kernels.gpu_driver import HostFunction
from localr1.kernels.native_experts import NativeExperts
from localr1.kernels.native_weight import _native

_ELSEWHERE: Final = ctypes.CFUNCTYPE(None, ctypes.c_int64)


class Way(Enum):
    """Of a token's layers: NOTHING is computed; all are given to Python; or those alone of which an
    expert lies neither in RAM nor on a card."""

    NOTHING = 0
    PYTHON = 1
    NATIVE = 2


@dataclass(frozen=True)
class HostResult:
    """Of a layer that was computed without Python. chosen: int64 [k], all of its experts, wherever
    they were computed. seconds: of those computed here, 0 where there were none, begun `ago`
    seconds before it was told."""

    layer: int
    chosen: NDArray[np.int64]
    seconds: float
    ago: float


class HostMixtures:
    """python: is given the number of a layer, in the thread that runs its function; must raise
    nothing. Functions run one after another; all else is called while none runs, `go` from `python`
    too. Until the first `go` the way is NOTHING."""

    def __init__(self, native: _native.Kernels, python: Callable[[int], None]) -> None:
        self._python = _ELSEWHERE(python)
        address = ctypes.cast(self._python, ctypes.c_void_p).value
        assert address is not None
        self._native = native.host_mixtures(address)
        self._kept: list[object] = []

    def function(
        self,
        layer: int,
        experts: NativeExperts,
        on_card: NDArray[np.bool_],
        x: Tensor,
        chosen: Tensor,
        outputs: Tensor,
    ) -> HostFunction:
        """Computes a layer's experts of one token that lie in RAM, as its table says when it runs,
        and on no card: `Kernels.expert_outputs` of x [1, hidden], chosen int32 [1, k] and outputs
        [1, k, hidden]. on_card: [experts]. Raises KernelError for sizes that do not fit."""
        check_outputs(x, chosen.to(torch.int64), experts, outputs)
        assert chosen.dtype is torch.int32
        assert chosen.is_contiguous()
        assert on_card.shape == (experts.num_experts,)
        assert on_card.flags.c_contiguous
        try:
            record = self._native.add(
                layer,
                experts.layout,
                experts.table.data_ptr(),
                experts.num_experts,
                on_card.ctypes.data,
                chosen.shape[1],
                (chosen.data_ptr(), x.data_ptr(), outputs.data_ptr()),
            )
        except _native.RefusedError as error:
            raise KernelError(f"host_mixtures: {error}") from None
        self._kept += experts, on_card, x, chosen, outputs
        return HostFunction(_native.HostMixtures.run, record, self)

    def go(self, way: Way) -> None:
        """From now on."""
        self._native.go(way.value)

    def take(self) -> list[HostResult]:
        """Of what was computed without Python since the last time, in the order of work."""
        return [
            HostResult(layer, np.frombuffer(chosen, np.int64), seconds, ago)
            for layer, chosen, seconds, ago in self._native.take()
        ]
