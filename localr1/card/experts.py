"""The store's experts in the mixtures that cards compute."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from localr1.card.mixture import Exchange
from localr1.experts.cuda import CudaDevice
from localr1.experts.store import ExpertStore
from localr1.kernels.gpu_driver import HostFunction
from localr1.kernels.gpu_layout import ExpertLayout
from localr1.kernels.host_mixtures import Way


class StoreOnCards:
    """`localr1.card.decoder.RoutedExperts`. devices: the store's, in the order of the cards that
    compute layers, whose drivers are theirs.

    What a token needs of the host is computed without Python as long as all of a layer's experts
    lie on a card or in RAM; the store is told of it afterwards. Else, and where the store reads
    ahead, it is asked itself, by the thread that runs the card's stream.
    """

    def __init__(self, store: ExpertStore, devices: Sequence[CudaDevice]) -> None:
        self._store, self._devices = store, list(devices)
        self._places = {number: place for place, number in enumerate(store.layer_numbers)}
        self._mixtures = store.host_mixtures(self._in_python)
        self._functions: dict[int, tuple[Exchange, HostFunction]] = {}
        self._error: Exception | None = None

    def of_layer(self, card: int, number: int) -> "StoreLayer":
        place = self._places[number]
        return StoreLayer(self, place, *self._devices[card].bank(place))

    def settle(self) -> None:
        self._error = None
        self._mixtures.take()  # Of a token that an interrupt ended.
        needs_python = self._store.prepare_for_cards()
        self._mixtures.go(Way.PYTHON if needs_python else Way.NATIVE)

    def refresh(self, card: int, stream: Any) -> None:
        self._devices[card].refresh(stream)

    def check(self) -> None:
        self._tell()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def lose_card(self) -> None:
        self._tell()
        self._mixtures.go(Way.NOTHING)
        self._error = None
        self._store.lose_device()

    def on_host(self, place: int, exchange: Exchange) -> HostFunction:
        """Of a layer, always the same, as graphs name it."""
        if place not in self._functions:
            in_ram, on_card = self._store.places_of(place)
            self._functions[place] = (
                exchange,
                self._mixtures.function(
                    place, in_ram, on_card, exchange.normed, exchange.chosen, exchange.outputs
                ),
            )
        known, function = self._functions[place]
        assert known is exchange
        return function

    def _in_python(self, place: int) -> None:
        """After an error nothing of the token counts any more."""
        try:
            self._tell()
            exchange, _ = self._functions[place]
            # A copy: the store keeps it until the pass is over.
            chosen = exchange.chosen.to(torch.int64)
            x, residual = exchange.normed, exchange.residual
            self._store.complete(place, x, chosen, residual, exchange.outputs)
        except Exception as error:  # Raised by `check`, in the thread that asked for the token.
            self._error = error
            self._mixtures.go(Way.NOTHING)

    def _tell(self) -> None:
        """The store of the layers that were computed without it, before it is asked for another."""
        results = self._mixtures.take()
        if results:
            self._store.completed(results, time.perf_counter())


@dataclass(frozen=True)
class StoreLayer:
    """`localr1.card.mixture.CardExperts`."""

    owner: StoreOnCards
    place: int
    layout: ExpertLayout
    table: int

    def on_host(self, exchange: Exchange) -> HostFunction:
        return self.owner.on_host(self.place, exchange)
