"""The order in which a GPU computes many pairs of tokens and experts (cuda/gpu/expert_tiles.cu)."""

from typing import NamedTuple

import torch
from torch import Tensor

from localr1.kernels.gpu_launch import EXPERT_TILE


class PairOrder(NamedTuple):
    """order: int32 [positions], the number of the pair at each, -1 where a tile is not full.
    experts: int32 [positions / EXPERT_TILE], of each tile."""

    order: Tensor
    experts: Tensor

    @property
    def num_tiles(self) -> int:
        return len(self.experts)


def order_pairs(chosen: Tensor) -> PairOrder:
    """chosen: int64 [T, k], a negative number for none. An expert's pairs stand together, in
    their order, from the beginning of a tile on."""
    numbers = chosen.flatten()
    pairs = numbers.argsort(stable=True)
    pairs = pairs[numbers[pairs] >= 0]
    counts = torch.bincount(numbers[pairs])
    experts = counts.nonzero().flatten()
    counts = counts[experts]
    tiles = (counts + EXPERT_TILE - 1) // EXPERT_TILE
    # By how much an expert's pairs lie behind where they would without gaps.
    gaps = EXPERT_TILE * (tiles.cumsum(0) - tiles) - (counts.cumsum(0) - counts)
    positions = torch.arange(len(pairs)) + gaps.repeat_interleave(counts)
    order = torch.full((EXPERT_TILE * int(tiles.sum()),), -1, dtype=torch.int32)
    order[positions] = pairs.int()
    return PairOrder(order, experts.repeat_interleave(tiles).int())


def most_positions(num_pairs: int, num_experts: int) -> int:
    """Of so many pairs, however they are spread."""
    return num_pairs + min(num_pairs, num_experts) * (EXPERT_TILE - 1)
