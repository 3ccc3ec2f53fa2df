"""What a routing trace says about caching experts: how even the load is, and how soon an expert is
chosen again. Pure numpy: needs no model."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localr1.experts.trace import Choices, Trace


@dataclass(frozen=True)
class RoutingStatistics:
    """load: float64 [layers, experts], choices of an expert over those of an even choice: 1 is
    average, 0 never. distances: int64 [layers, experts + 1], how many choices had each reuse
    distance: the number of other experts of the layer chosen since this one was. The last column
    counts first choices.

    A cache of c experts a layer that drops the least recently used one hits exactly the choices of
    a distance below c (Mattson et al. 1970, "Evaluation techniques for storage hierarchies").
    """

    load: NDArray[np.float64]
    distances: NDArray[np.int64]

    @property
    def hit_rates(self) -> NDArray[np.float64]:
        """float64 [layers, experts + 1]: share of choices that such a cache of c slots hits, c from
        0 to all of them. First choices are misses at every size."""
        hits = np.cumsum(self.distances[:, :-1], axis=1)
        rates = hits / self.distances.sum(axis=1, keepdims=True).clip(min=1)
        return np.concatenate([np.zeros((len(rates), 1)), rates], axis=1)

    def hit_rate(self, share: float) -> float:
        """Of a cache that holds `share` of every layer's experts, rounded down to whole ones, over
        all layers."""
        slots = int(share * (self.distances.shape[1] - 1) + 1e-9)
        return float(self.hit_rates[:, slots].mean())


def routing_statistics(trace: Trace) -> RoutingStatistics:
    """Sequences follow each other as they would in one process, nothing in between."""
    tokens, layers, per_token = trace.experts.shape
    choices = trace.experts.transpose(1, 0, 2).reshape(layers, tokens * per_token)
    counts = np.stack([np.bincount(row, minlength=trace.num_experts) for row in choices])
    load = counts * trace.num_experts / max(tokens * per_token, 1)
    distances = np.stack([_reuse_distances(row, trace.num_experts) for row in choices])
    return RoutingStatistics(load, distances)


def _reuse_distances(choices: Choices, num_experts: int) -> NDArray[np.int64]:
    """int64 [num_experts + 1], as in RoutingStatistics.distances."""
    counts = [0] * (num_experts + 1)
    recent: list[int] = []  # Most recent first.
    for expert in choices.tolist():
        if expert in recent:
            distance = recent.index(expert)
            del recent[distance]
        else:
            distance = num_experts
        counts[distance] += 1
        recent.insert(0, expert)
    return np.array(counts)
