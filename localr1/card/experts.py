"""The store's experts in the mixtures that cards compute."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from localr1.experts.cuda import CudaDevice
from localr1.experts.store import ExpertStore
from localr1.kernels.gpu_layout import ExpertLayout


class StoreOnCards:
    """`localr1.card.decoder.RoutedExperts`. devices: the store's, in the order of the cards that
    compute layers, whose drivers are theirs."""

    def __init__(self, store: ExpertStore, devices: Sequence[CudaDevice]) -> None:
        self._store, self._devices = store, list(devices)
        self._places = {number: place for place, number in enumerate(store.layer_numbers)}
        self._error: Exception | None = None

    def of_layer(self, card: int, number: int) -> "StoreLayer":
        place = self._places[number]
        return StoreLayer(self, place, *self._devices[card].bank(place))

    def settle(self) -> None:
        # What a stream calls must wait for nothing of a card's, as the driver may hold a lock.
        if self._store.hot is not None:
            self._store.hot.await_downloads()

    def refresh(self, card: int, stream: Any) -> None:
        self._devices[card].refresh(stream)

    def check(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error

    def lose_card(self) -> None:
        self._error = None
        self._store.lose_device()

    def complete(
        self, place: int, x: Tensor, chosen: Tensor, residual: Tensor, outputs: Tensor
    ) -> None:
        """After an error nothing of the token counts any more."""
        if self._error is not None:
            return
        try:
            self._store.complete(place, x, chosen, residual, outputs)
        except Exception as error:  # Raised by `check`, in the thread that asked for the token.
            self._error = error


@dataclass(frozen=True)
class StoreLayer:
    """`localr1.card.mixture.CardExperts`."""

    owner: StoreOnCards
    place: int
    layout: ExpertLayout
    table: int

    def complete(self, x: Tensor, chosen: Tensor, residual: Tensor, outputs: Tensor) -> None:
        self.owner.complete(self.place, x, chosen, residual, outputs)
