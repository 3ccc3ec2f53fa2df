"""From a model in RAM to one whose first layers are on cards."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from localr1.card.chain import CardChain
from localr1.card.decoder import CardDecoder
from localr1.card.fit import Needs, share_of_cards
from localr1.card.layers import CardLayers
from localr1.card.model import (
    ModelHead,
    ModelLayer,
    computable_head,
    computable_layers,
    place_rope,
    sizes_of,
)
from localr1.card.region import bytes_of
from localr1.card.workspace import head_room, place_workspace
from localr1.errors import DeviceError, KernelError, MemoryLimitError
from localr1.experts.card_rounds import MOST_PAIRS
from localr1.experts.cuda import CudaDevice
from localr1.experts.device import STREAM_SLOTS
from localr1.experts.footprint import Footprint
from localr1.kernels.gpu_driver import Driver
from localr1.models.decoder import Decoder

ROUND_BYTES: Final = 12
"""Of the card's memory, for a value of a pair's hidden state or inner one: what a device's own
computations take (experts/card_rounds.py), and a little."""


@dataclass(frozen=True)
class CardRoom:
    """memory: bytes of the card that may be taken."""

    driver: Driver
    memory: int


def put_on_cards(
    model: Decoder,
    cards: Sequence[CardRoom],
    capacity: int,
    asked: int | None = None,
    *,
    owns_drivers: bool = True,
) -> CardDecoder:
    """Copy as many layers as fit, or as were asked for, and the head behind all of them; of a
    mixture all but the routed experts, which must be unread yet. capacity: positions of the longest
    cache. owns_drivers: whether they are the model's from now on; on an error they stay the
    caller's.

    Raises KernelError for a model of which a card can compute nothing, MemoryLimitError and
    UsageError as `share_of_cards`, DeviceError.
    """
    computable, head = computable_layers(model), computable_head(model)
    if not computable:
        raise KernelError(
            "--device cuda",
            expected="a model whose matrices are quantized: the card computes no others",
            found="a first layer that is not, or not wholly",
            fix="Quantize the model with `localr1 quantize`, or leave --device out.",
        )
    needs = needs_of(model, capacity)
    names = [card.driver.name for card in cards]
    shares = share_of_cards(needs, [card.memory for card in cards], asked, names)
    sizes = sizes_of(computable[: shares[-1].last], capacity)
    placed: list[CardLayers] = []
    try:
        first = 0
        for card, share in zip(cards, shares, strict=True):
            card.driver.enter()
            own = replace(sizes, vocabulary=model.config.vocab_size) if share.has_head else sizes
            rope = model.rope_table(capacity)
            layers = CardLayers(card.driver, own, rope, model.cache_dtype, first)
            placed.append(layers)
            _fill(layers, computable[first : share.last], head if share.has_head else None, asked)
            first = layers.last
    except BaseException:
        CardChain(placed).free()
        raise
    return CardDecoder(model, CardChain(placed), owns_drivers=owns_drivers)


def put_beside_experts(
    model: Decoder,
    devices: Sequence[CudaDevice],
    footprint: Footprint,
    capacity: int,
    asked: int | None,
) -> CardDecoder | None:
    """`put_on_cards` of a mixture whose experts will lie in the devices' slots, for which some of
    the memory of each is left. None where one has no room for a layer, or none was asked for: the
    devices compute experts alone then."""
    if asked == 0:
        return None
    config = model.config
    inner = 0 if config.moe is None else config.moe.intermediate_size
    slots = STREAM_SLOTS + footprint.experts_per_token
    reserved = slots * footprint.expert + ROUND_BYTES * MOST_PAIRS * (config.hidden_size + inner)
    rooms = [CardRoom(device.driver, device.memory - reserved) for device in devices]
    try:
        card = put_on_cards(model, rooms, capacity, asked, owns_drivers=False)
    except (KernelError, MemoryLimitError) as error:
        if asked is not None or isinstance(error, DeviceError):
            raise
        return None
    for device, layers in zip(devices, card.layers.cards, strict=True):
        device.memory -= layers.nbytes
    return card


def _fill(
    layers: CardLayers, computable: list[ModelLayer], head: ModelHead | None, asked: int | None
) -> None:
    """Memory that ends on the way, since other programs took it, means fewer layers, and that the
    next card begins with those; but for the first one and for those that were asked for."""
    for layer in computable:
        try:
            layers.add(layer)
        except MemoryLimitError:
            if asked is not None or not layers.num_layers:
                raise
            break
    if head is not None and layers.num_layers == len(computable):
        with contextlib.suppress(MemoryLimitError):
            layers.add_head(head)
    layers.ready()


def needs_of(model: Decoder, capacity: int) -> Needs:
    """Of a model that has a layer which a card can compute."""
    computable, head = computable_layers(model), computable_head(model)
    sizes = sizes_of(computable, capacity)
    half = model.cache_dtype == torch.float16
    rope = model.rope_table(capacity)

    def layer_bytes(layer: ModelLayer) -> int:
        cache = bytes_of(lambda region: layer.place_cache(capacity, half, region))
        return bytes_of(layer.place) + cache

    head_bytes = None
    if head is not None:
        head_bytes = bytes_of(head.place) + head_room(sizes, model.config.vocab_size)
    fixed = bytes_of(lambda region: place_workspace(sizes, region))
    fixed += bytes_of(lambda region: place_rope(rope, capacity, region))
    return Needs([layer_bytes(each) for each in computable], head_bytes, fixed, len(model.layers))
