"""One forward step, as data."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """token_ids: int64 [T], T >= 1, the tokens to compute. start: tokens already in the cache, the
    position of the first new one. all_logits: logits of every token, not only of the last."""

    token_ids: Tensor
    start: int
    all_logits: bool = False
