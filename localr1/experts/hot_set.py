"""Which experts were held in fast memory, to be held there again."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from localr1.experts.policy import Ranking

Numbers = NDArray[np.int64]


class Reader(Protocol):
    """Tensors by name."""

    def __call__(self, name: str) -> Tensor: ...

    def __contains__(self, name: str) -> bool: ...


@dataclass(frozen=True)
class HotSet:
    """counts: [layers, experts], how many tokens chose each. ram, device: keys (policy.py) of what
    lay in each tier, sorted. None of anything for a model without a store of experts."""

    counts: Numbers
    ram: Numbers
    device: Numbers

    @staticmethod
    def empty() -> "HotSet":
        nothing = np.zeros(0, np.int64)
        return HotSet(np.zeros((0, 0), np.int64), nothing, nothing)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "experts.counts", torch.from_numpy(self.counts)
        yield "experts.ram", torch.from_numpy(self.ram)
        yield "experts.device", torch.from_numpy(self.device)

    @staticmethod
    def read(read: Reader) -> "HotSet":
        """What `tensors` gave, by its names; empty where it is not there."""
        if "experts.counts" not in read:
            return HotSet.empty()
        counts, ram, device = (
            read(f"experts.{name}").to(torch.int64).numpy() for name in ("counts", "ram", "device")
        )
        return HotSet(counts, ram.reshape(-1), device.reshape(-1))

    def fits(self, num_layers: int, num_experts: int) -> bool:
        """Whether it speaks of a store of these sizes."""
        keys = np.concatenate([self.ram, self.device])
        in_range = not keys.size or (keys.min() >= 0 and keys.max() < num_layers * num_experts)
        return self.counts.shape == (num_layers, num_experts) and bool(in_range)


def learn(hot: HotSet | None, counts: Numbers, ranking: Ranking, experts_per_token: int) -> HotSet:
    """`hot`, once `counts` and the ranking have at least what was chosen then, as if a prompt of so
    many tokens had chosen it just now; nothing where it is of other sizes."""
    if hot is None or not hot.fits(*counts.shape):
        return HotSet.empty()
    np.maximum(counts, hot.counts, out=counts)
    for layer, row in enumerate(hot.counts):
        chosen = np.flatnonzero(row)
        if len(chosen):
            ranking.observe(layer, chosen, row[chosen].astype(np.float64))
    ranking.tick(max(1, int(hot.counts[0].sum()) // experts_per_token))
    return hot
