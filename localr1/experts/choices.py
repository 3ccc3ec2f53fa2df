"""What routers chose, as the store looks at it: chosen int64 [T, k]."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def distinct(chosen: Tensor) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The experts, and how many tokens chose each. A token's are distinct."""
    values = chosen.numpy()
    if len(values) == 1:
        return values[0], np.ones(values.shape[1], np.int64)
    return np.unique(values, return_counts=True)


def only(chosen: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """chosen, with -1 for all but these experts."""
    kept = torch.zeros(num_experts, dtype=torch.bool)
    kept[list(experts)] = True
    return chosen.where(kept[chosen], -1)
