"""Memory of the card that a step works in, beside weights and cache."""

from dataclasses import dataclass
from typing import Final

from localr1.card.region import Region
from localr1.kernels import gpu_launch
from localr1.qtypes import ACTIVATION_GROUP

MOST_TOKENS: Final = 64
"""Of one run. A prompt takes several; its weights are read once for every 8 tokens anyway."""
ATTENTION_BYTES: Final = 64 << 20
"""That the spans of a run's attention may take: with a long window runs are shorter."""
FLOAT: Final = 4
START_BYTES: Final = 16
"""The position of the first token, before the tokens' values, so that both are one copy."""


@dataclass(frozen=True)
class Sizes:
    """The widest of all layers on the card. columns: of a matrix behind a norm or attention. inner:
    of a gated MLP. heads: of queries; rows: of queries, keys and values together, in values. dim:
    of a value as attention sums it. capacity: positions of the cache. vocabulary: 0 where the head
    is not on the card."""

    hidden: int
    columns: int
    inner: int
    heads: int
    rows: int
    dim: int
    capacity: int
    vocabulary: int

    @property
    def most_tokens(self) -> int:
        """Of one run."""
        return max(1, min(MOST_TOKENS, ATTENTION_BYTES // self._attention_bytes(1)))

    @property
    def spans(self) -> int:
        return gpu_launch.num_spans(self.capacity)

    def _attention_bytes(self, tokens: int) -> int:
        return FLOAT * tokens * self.heads * self.spans * (self.dim + 2)


@dataclass(frozen=True)
class Activations:
    """Quantized, as a product reads them: addresses of codes, scales and sums."""

    codes: int
    scales: int
    sums: int


@dataclass(frozen=True)
class Workspace:
    """Addresses, for T = `tokens` tokens. x: float32 [T, hidden], the residual stream, START_BYTES
    behind `start`. inputs, gated: activations of [T, columns] and [T, inner]. qkv: [T, rows].
    queries, attended: [T, heads * dim]. partial, maximum, sum: of attention's spans. gate, up: [T,
    inner]. logits: [TOKENS_OF_HEAD, vocabulary]."""

    tokens: int
    spans: int
    start: int
    x: int
    inputs: Activations
    gated: Activations
    qkv: int
    queries: int
    attended: int
    partial: int
    maximum: int
    sum: int
    gate: int
    up: int
    logits: int


TOKENS_OF_HEAD: Final = 8
"""Whose logits are computed at once: a row of them is 600 KB where a vocabulary is large."""


def place_workspace(sizes: Sizes, region: Region) -> Workspace:
    s, tokens = sizes, sizes.most_tokens

    def floats(*counts: int) -> int:
        total = FLOAT
        for count in counts:
            total *= count
        return region.reserve(total)

    start = region.reserve(START_BYTES + FLOAT * tokens * s.hidden)
    values = tokens * s.heads * s.dim
    return Workspace(
        tokens=tokens,
        spans=s.spans,
        start=start,
        x=start + START_BYTES,
        inputs=_activations(tokens, s.columns, region),
        gated=_activations(tokens, s.inner, region),
        qkv=floats(tokens, s.rows),
        queries=floats(values),
        attended=floats(values),
        partial=floats(values, s.spans),
        maximum=floats(tokens, s.heads, s.spans),
        sum=floats(tokens, s.heads, s.spans),
        gate=floats(tokens, s.inner),
        up=floats(tokens, s.inner),
        logits=floats(min(tokens, TOKENS_OF_HEAD), s.vocabulary),
    )


def _activations(tokens: int, columns: int, region: Region) -> Activations:
    groups = tokens * columns // ACTIVATION_GROUP
    return Activations(
        region.reserve(tokens * columns),
        region.reserve(FLOAT * groups),
        region.reserve(FLOAT * groups),
    )
