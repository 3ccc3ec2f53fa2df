"""Routing traces of models that are not at hand: made choices whose reuse resembles the published.
Pure numpy, no torch.

Every expert of a layer has an appeal, and a token takes those of the highest. The appeal is a sum
of normal variables that live for different times: for ever (popularity), for a sequence (its
topic), for some hundred tokens, for some tokens, and for one. The shares of these decide what
recency and frequency are worth; benchmarks/policy.py prints the hit rates of caches of every size
beside those published.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from localr1.experts.trace import Trace


@dataclass(frozen=True)
class SyntheticRouting:
    """Standard deviations of the parts of the appeal; a token's own part has 1. slow_tokens,
    fast_tokens: after which a part has changed to 1/e of its correlation with itself."""

    name: str
    num_layers: int
    num_experts: int
    experts_per_token: int
    popularity: float
    topic: float
    slow: float
    slow_tokens: float
    fast: float
    fast_tokens: float


QWEN3_30B_A3B: Final = SyntheticRouting(
    "synthetic-qwen3-30b-a3b",
    num_layers=48,
    num_experts=128,
    experts_per_token=8,
    popularity=0.62,
    topic=1.10,
    slow=0.70,
    slow_tokens=79.0,
    fast=0.95,
    fast_tokens=8.5,
)
V2_LITE: Final = SyntheticRouting(
    "synthetic-v2-lite",
    num_layers=26,
    num_experts=64,
    experts_per_token=6,
    popularity=0.29,
    topic=0.36,
    slow=0.19,
    slow_tokens=95.0,
    fast=1.05,
    fast_tokens=3.0,
)
R1: Final = replace(
    V2_LITE, name="synthetic-r1", num_layers=58, num_experts=256, experts_per_token=8
)
"""No curve of R1 is published. Its router is a kin of V2-Lite's, from which the appeal is taken."""
ROUTINGS: Final = {routing.name: routing for routing in (QWEN3_30B_A3B, V2_LITE, R1)}
"""Fitted to the hit rates of LRU and of the oracle at 6% to 75% of the experts, as read off the
figures of arXiv 2505.16056."""


def synthetic_trace(
    routing: SyntheticRouting, num_sequences: int, tokens_each: int, seed: int = 0
) -> "Trace":
    """Deterministic for a seed. Half of each sequence is its prompt."""
    from localr1.experts.trace import Trace, expert_type

    random = np.random.default_rng(seed)
    shape = (routing.num_layers, routing.num_experts)
    popularity = routing.popularity * random.standard_normal(shape, np.float32)
    slow = random.standard_normal(shape, np.float32)
    fast = random.standard_normal(shape, np.float32)
    stays = np.exp(-1 / np.array([routing.slow_tokens, routing.fast_tokens], np.float32))
    changes = np.sqrt(1 - stays**2)
    count = num_sequences * tokens_each
    chosen = np.empty((count, routing.num_layers, routing.experts_per_token), np.int64)
    for token in range(count):
        if token % tokens_each == 0:
            topic = routing.topic * random.standard_normal(shape, np.float32)
        slow = stays[0] * slow + changes[0] * random.standard_normal(shape, np.float32)
        fast = stays[1] * fast + changes[1] * random.standard_normal(shape, np.float32)
        appeal = popularity + topic + routing.slow * slow + routing.fast * fast
        appeal += random.standard_normal(shape, np.float32)
        chosen[token] = _highest(appeal, routing.experts_per_token)
    prompt = tokens_each // 2
    return Trace(
        chosen.astype(expert_type(routing.num_experts)),
        np.array([[prompt, tokens_each - prompt]] * num_sequences, np.int32),
        tuple(range(1, routing.num_layers + 1)),
        routing.num_experts,
        routing.name,
    )


def _highest(appeal: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """[layers, count], best first."""
    best = np.argpartition(-appeal, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(appeal, best, axis=1), axis=1)
    return np.take_along_axis(best, order, axis=1)
