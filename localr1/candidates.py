"""The few tokens of a vocabulary that a draw is likely to be among, as a model's device finds them
and the sampler takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

AllLogits = Callable[[], "Tensor"]


@dataclass(frozen=True)
class Sought:
    """depth: how far below the largest logit candidates reach; 0 for the largest alone.
    inverse_temperature: all others are weighed by exp((logit - largest) * inverse_temperature)."""

    depth: float
    inverse_temperature: float


@dataclass(frozen=True, eq=False)
class Candidates:
    """ids: int64 [n], ascending, n >= 1, of all tokens whose logit is at least `floor`: the
    largest less the depth, as float32 subtracts. logits: float32 [n], theirs, all finite. rest: the
    sum of the weights of the num_rest others, good to sampler.TOTAL_ERROR of itself. all_logits:
    gets those of the whole vocabulary, float32 [vocabulary] or [1, vocabulary], where these tokens
    are not enough; until the model's next pass."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    floor: np.float32
    rest: float
    num_rest: int
    all_logits: AllLogits
