"""How much of a card a dense model's layers will take, from its config and the names, types and
shapes of its tensors: what localr1/card/loading.py finds out from the weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from localr1.card.fit import Needs
from localr1.card.region import Region, bytes_of
from localr1.card.workspace import FLOAT, Sizes, head_room, place_workspace
from localr1.experts.footprint import (
    EMBEDDING,
    HEAD,
    Module,
    modules_of,
    packed_bytes,
)
from localr1.models.config import LAYER_PREFIX, ModelConfig

if TYPE_CHECKING:
    from localr1.checkpoint.api import TensorInfo

CACHED_BYTES = 2
"""Of a value of the cache, where attention is quantized."""


@dataclass(frozen=True)
class CardForecast:
    """needs: as loading has them. cache: bytes of a layer's, which are among them. logits: and
    what is sought among them, of the head's."""

    needs: Needs
    cache: int
    logits: int


def forecast_card(
    tensors: "Iterable[tuple[TensorInfo, int]]",
    config: ModelConfig,
    capacity: int,
    block_rows: tuple[int, ...] | None = None,
) -> CardForecast:
    """tensors: each with how many of the model are like it, itself included. capacity: positions of
    the cache. block_rows: rows of a block that the CPU may have, of which the larger layout counts;
    None for those of every instruction set.
    A card computes layers whose matrices are all packed, up to the first that is not."""
    assert config.moe is None
    assert config.latent is None
    modules = {module.name: module for module in modules_of(tensors, config)}
    cache = bytes_of(lambda region: _place_cache(config, capacity, region))
    layers: list[int] = []
    for index in range(config.num_layers):
        own = _layer_modules(modules, index)
        if not own or not all(_is_computed(module) for module in own.values()):
            break
        layers.append(_layer_bytes(own, block_rows) + cache)
    sizes = _sizes(config, capacity)
    room = head_room(sizes, config.vocab_size)
    matrix, head = modules.get(EMBEDDING if config.tie_embeddings else HEAD), None
    if matrix is not None and matrix.is_packed:
        norm = FLOAT * config.hidden_size
        head = _aligned(packed_bytes(matrix, block_rows, for_card=True)) + _aligned(norm) + room
    rope = FLOAT * capacity * (config.rope_size // 2)
    fixed = bytes_of(lambda region: place_workspace(sizes, region)) + 2 * _aligned(rope)
    return CardForecast(Needs(layers, head, fixed, config.num_layers), cache, room)


def _layer_modules(modules: Mapping[str, Module], index: int) -> dict[str, Module]:
    """By what their names have behind the layer's. Of layers that are all alike the first alone is
    listed."""
    for listed in (f"{LAYER_PREFIX}{index}.", f"{LAYER_PREFIX}0."):
        found = {
            name.removeprefix(listed): module
            for name, module in modules.items()
            if name.startswith(listed)
        }
        if found:
            return found
    return {}


def _is_computed(module: Module) -> bool:
    return module.is_packed or all(len(info.shape) == 1 for info in module.parts.values())


def _layer_bytes(own: Mapping[str, Module], block_rows: tuple[int, ...] | None) -> int:
    """As card/weights.py places it: queries, keys and values side by side where they are alike."""
    sizes = {
        name: packed_bytes(module, block_rows, for_card=True)
        if module.is_packed
        else FLOAT * next(iter(module.parts.values())).shape[0]
        for name, module in own.items()
    }
    together: list[list[str]] = []
    for part in ("", ".bias"):
        names = [f"self_attn.{each}_proj{part}" for each in "qkv"]
        if all(name in own for name in names) and _are_alike([own[name] for name in names]):
            together.append(names)
    joined = [name for names in together for name in names]
    total = sum(_aligned(size) for name, size in sizes.items() if name not in joined)
    return total + sum(_aligned(sum(sizes[name] for name in names)) for names in together)


def _are_alike(modules: Iterable[Module]) -> bool:
    kinds = {
        tuple((part, info.dtype, info.shape[1:]) for part, info in sorted(module.parts.items()))
        for module in modules
    }
    return len(kinds) == 1


def _place_cache(config: ModelConfig, capacity: int, region: Region) -> None:
    for _ in range(2):
        region.reserve(CACHED_BYTES * config.num_kv_heads * capacity * config.head_dim)


def _sizes(config: ModelConfig, capacity: int) -> Sizes:
    """As `localr1.card.model.sizes_of` of its layers."""
    width = config.num_heads * config.head_dim
    return Sizes(
        hidden=config.hidden_size,
        inputs=max(config.hidden_size, width),
        gated=config.intermediate_size,
        projected=width + 2 * config.num_kv_heads * config.head_dim,
        queries=width,
        heads=config.num_heads,
        dim=config.head_dim,
        capacity=capacity,
    )


def _aligned(nbytes: int) -> int:
    return bytes_of(lambda region: region.reserve(nbytes))
