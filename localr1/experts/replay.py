"""A trace's tokens sent past a cache, to count its hits. Pure numpy, no torch."""

from typing import TYPE_CHECKING

import numpy as np

from localr1.experts.residency import ABSENT, Residency

if TYPE_CHECKING:
    from localr1.experts.trace import Trace


def replay_demand(trace: "Trace", residency: Residency) -> int:
    """Hits where an absent expert comes in when it is chosen, as into the RAM tier above files."""
    ranking = residency.ranking
    hits = 0
    for token in trace.experts.astype(np.int64):
        for layer, experts in enumerate(token):
            ranking.observe(layer, experts)
            is_held = residency.slot_of[layer, experts] != ABSENT
            held, absent = experts[is_held].tolist(), experts[~is_held].tolist()
            hits += len(held)
            # What the layer uses stays until the layer is done.
            for expert in held:
                residency.pin(layer, expert)
            for expert in absent:
                residency.demand(layer, expert)
                residency.pin(layer, expert)
            for expert in (*held, *absent):
                residency.unpin(layer, expert)
        ranking.tick()
    return hits


def replay_promotion(trace: "Trace", residency: Residency) -> tuple[int, int]:
    """(hits, promotions) where what a pass missed may be promoted after it, and is there for the
    next: the device tier, if copies took no time."""
    ranking = residency.ranking
    layers = np.arange(trace.experts.shape[1])[:, None]
    hits = promoted = 0
    for token in trace.experts.astype(np.int64):
        hits += int((residency.slot_of[layers, token] != ABSENT).sum())
        ranking.observe_layers(0, list(token))
        ranking.tick()
        for promotion in residency.promotions():
            residency.complete(promotion)
            promoted += 1
    return hits, promoted
