"""From a model in RAM to one whose first layers are on a card."""

import contextlib
from dataclasses import replace

import torch

from localr1.card.decoder import CardDecoder
from localr1.card.fit import Needs, Share, share_of_card
from localr1.card.layers import CardLayers, DenseLayer, Head, place_cache, place_rope
from localr1.card.region import bytes_of
from localr1.card.workspace import FLOAT, TOKENS_OF_HEAD, Sizes, place_workspace
from localr1.errors import KernelError, MemoryLimitError
from localr1.kernels.gpu_driver import Driver
from localr1.layers.attention import FusedAttention
from localr1.layers.linear import PackedLinear
from localr1.layers.mlp import FusedMlp
from localr1.models.decoder import Decoder


def computable_layers(model: Decoder) -> list[DenseLayer]:
    """The first layers, up to one that the card has no kernels for."""
    found: list[DenseLayer] = []
    for attention, mlp in model.layers:
        if not (isinstance(attention, FusedAttention) and isinstance(mlp, FusedMlp)):
            break
        found.append(DenseLayer(attention.weights, mlp.weights))
    return found


def computable_head(model: Decoder) -> Head | None:
    head = model.head
    return (
        Head(model.norm, head, model.config.rms_norm_eps)
        if isinstance(head, PackedLinear)
        else None
    )


def sizes_of(layers: list[DenseLayer], capacity: int) -> Sizes:
    """Of a workspace for all of them, without a head."""
    attentions = [layer.attention for layer in layers]
    hidden = attentions[0].q.in_features
    return Sizes(
        hidden=hidden,
        columns=max(hidden, *(each.o.in_features for each in attentions)),
        inner=max(layer.mlp.down.in_features for layer in layers),
        heads=max(each.num_heads for each in attentions),
        rows=max((each.num_heads + 2 * each.num_kv_heads) * each.head_dim for each in attentions),
        dim=max(each.head_dim for each in attentions),
        capacity=capacity,
        vocabulary=0,
    )


def put_on_card(
    model: Decoder,
    driver: Driver,
    memory: int,
    capacity: int,
    asked: int | None = None,
) -> CardDecoder:
    """Copy as many layers as fit, or as were asked for, and the head behind all of them. memory:
    bytes of the card that may be taken. capacity: positions of the longest cache.

    The driver is the model's from now on; on an error it stays the caller's. Raises KernelError for
    a model of which the card can compute nothing, MemoryLimitError and UsageError as
    `share_of_card`, DeviceError.
    """
    computable, head = computable_layers(model), computable_head(model)
    if not computable:
        raise KernelError(
            "--device cuda",
            expected="a model whose matrices are quantized: the card computes no others",
            found="a first layer that is not, or not wholly",
            fix="Quantize the model with `localr1 quantize`, or leave --device out.",
        )
    share = _share(model, computable, head, memory, capacity, asked, driver.name)
    sizes = sizes_of(computable[: share.num_layers], capacity)
    if share.has_head:
        sizes = replace(sizes, vocabulary=model.config.vocab_size)
    driver.enter()
    layers = CardLayers(driver, sizes, model.rope_table(capacity), model.cache_dtype)
    try:
        _fill(layers, computable[: share.num_layers], head if share.has_head else None, asked)
    except BaseException:
        layers.free()
        raise
    return CardDecoder(model, driver, layers)


def _fill(
    layers: CardLayers, computable: list[DenseLayer], head: Head | None, asked: int | None
) -> None:
    """Memory that ends on the way, since other programs took it, means fewer layers; but for the
    first one and for those that were asked for."""
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


def _share(
    model: Decoder,
    computable: list[DenseLayer],
    head: Head | None,
    memory: int,
    capacity: int,
    asked: int | None,
    name: str,
) -> Share:
    sizes = sizes_of(computable, capacity)
    half = model.cache_dtype == torch.float16
    rope = model.rope_table(capacity)

    def layer_bytes(layer: DenseLayer) -> int:
        shape = layer.attention.num_kv_heads, layer.attention.head_dim
        cache = bytes_of(lambda region: place_cache(shape, capacity, half, region))
        return bytes_of(layer.place) + cache

    head_bytes = None
    if head is not None:
        rows = min(sizes.most_tokens, TOKENS_OF_HEAD)
        head_bytes = bytes_of(head.place) + FLOAT * rows * model.config.vocab_size
    fixed = bytes_of(lambda region: place_workspace(sizes, region))
    fixed += bytes_of(lambda region: place_rope(rope, capacity, region))
    needs = Needs([layer_bytes(each) for each in computable], head_bytes, fixed, len(model.layers))
    return share_of_card(needs, memory, asked, name)
