"""Reading what the next layer will need before its router has said so."""

from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from localr1.experts.choices import distinct
from localr1.experts.ram import RamTier
from localr1.kernels.api import Kernels
from localr1.layers.router import Router

AHEAD_SHARE: Final = 0.25
"""Of the slots, at most, being read into ahead of the router."""


class RoutedLayer(Protocol):
    """What a guess takes of a layer."""

    @property
    def router(self) -> Router: ...
    @property
    def norm(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...


class ReadAhead:
    """on_device: bool [layers, experts], which need not be read. is_wanted: asked every time.
    before_reading: called before something has to make room in RAM."""

    def __init__(
        self,
        kernels: Kernels,
        layers: Sequence[RoutedLayer],
        ram: RamTier,
        on_device: NDArray[np.bool_],
        is_wanted: Callable[[], bool],
        before_reading: Callable[[], None],
    ) -> None:
        self._kernels = kernels
        self._layers = layers
        self._ram = ram
        self._on_device = on_device
        self._is_wanted = is_wanted
        self._before_reading = before_reading

    def __call__(self, layer: int, residual: Tensor) -> None:
        """Begin to read what the next layer's router would choose of what the hidden state is now:
        it changes little from layer to layer. Costs one product of the router's size."""
        ram = self._ram
        if ram.is_complete or layer + 1 == len(self._layers) or not self._is_wanted():
            return
        following = self._layers[layer + 1]
        limit = int(AHEAD_SHARE * ram.residency.num_slots) - ram.num_reading
        # The experts of a token in this layer stay free for it.
        limit = min(limit, ram.room - following.router.rule.experts_per_token)
        if limit <= 0:
            return
        normed = self._kernels.rms_norm(residual, following.norm, following.eps)
        experts, counts = distinct(following.router(normed).experts)
        on_device = self._on_device[layer + 1]
        for expert in experts[np.argsort(-counts, kind="stable")].tolist():
            if limit <= 0:
                break
            if on_device[expert] or ram.holds(layer + 1, expert):
                continue
            if not ram.is_reading(layer + 1, expert):
                self._before_reading()
                ram.request(layer + 1, expert, ahead=True)
                limit -= 1
