"""Memory of the card that a step works in, beside weights and cache."""

from dataclasses import dataclass
from typing import Final

from localr1.card.region import Region, bytes_of
from localr1.card.selection import Selection
from localr1.kernels import gpu_launch
from localr1.qtypes import ACTIVATION_GROUP

MOST_TOKENS: Final = 512
"""Of one run, as many as the engine gives at once. A prompt may take several."""
RUN_BYTES: Final = 128 << 20
"""That a run's values may take beside attention's spans: of wide models runs are shorter."""
ATTENTION_BYTES: Final = 64 << 20
"""That the spans of attention may take: with a long window a run's attention comes in parts."""
TOKENS_OF_HEAD: Final = gpu_launch.MATMUL_TOKENS
"""Whose logits are computed at once: a row of them is 600 KB where a vocabulary is large, and so
many tokens are a product in tiles."""
FLOAT: Final = 4
START_BYTES: Final = 16
"""Before the tokens' values, so that all is one copy: the position of the first token, int32, and
what candidates are sought (selection.py), float32 [2]."""


@dataclass(frozen=True)
class Sizes:
    """The largest of all layers on the card, in values a token. inputs: of a matrix behind a norm
    or attention. gated: of down. projected: queries, keys and values together, or what comes before
    latent attention. queries, absorbed: of all heads; absorbed 0 without latents. heads, dim: what
    attention sums up, of a value as the cache has it. expanded: of all heads, 0 without latents.
    capacity: positions of the cache. vocabulary: 0 where the head is not on the card. experts,
    chosen, expert_inner: of a mixture, in all and for a token; 0 without one."""

    hidden: int
    inputs: int
    gated: int
    projected: int
    queries: int
    heads: int
    dim: int
    capacity: int
    absorbed: int = 0
    expanded: int = 0
    vocabulary: int = 0
    experts: int = 0
    chosen: int = 0
    expert_inner: int = 0

    @property
    def selection(self) -> Selection:
        """Of candidates, where the head is on the card."""
        return Selection(self.vocabulary)

    @property
    def most_tokens(self) -> int:
        """Of one run."""
        floats = self.hidden + self.projected + self.queries + self.absorbed + self.expanded
        floats += self.heads * self.dim + 2 * self.gated
        # Codes, and a scale and a sum of each group, twice (`Workspace.turned`).
        bytes_of_token = FLOAT * floats + 3 * (self.inputs + self.gated) // 2
        fitting = RUN_BYTES // bytes_of_token
        if fitting > gpu_launch.TILE:
            fitting -= fitting % gpu_launch.TILE
        return max(1, min(MOST_TOKENS, self.capacity, fitting))

    @property
    def most_states(self) -> int:
        """Of rows in a span: what attention keeps at once, of one token at least."""
        of_token = self.heads * gpu_launch.num_spans(self.capacity)
        fitting = ATTENTION_BYTES // (FLOAT * (self.dim + 2))
        return max(of_token, min(self.most_tokens * of_token, fitting))

    def reach(self, end: int) -> int:
        """Positions that attention's grid is made for where a prompt's run ends before `end`: few
        different numbers, as each is a program, and never many more than there are."""
        spans = gpu_launch.num_spans(end)
        return min(self.capacity, gpu_launch.SPAN << (spans - 1).bit_length())


@dataclass(frozen=True)
class Activations:
    """Quantized, as a product reads them: addresses of codes, scales and sums."""

    codes: int
    scales: int
    sums: int


@dataclass(frozen=True)
class TurnedScales:
    """Of activations, as `by_group` makes them: addresses of scales and sums, [groups, tokens]."""

    scales: int
    sums: int


@dataclass(frozen=True)
class Routed:
    """Addresses, for one token in a mixture of which it is given k experts. normed: float32
    [hidden]; logits: of the router; chosen int32, weights float32 [k]; gated: activations of [k,
    inner]; outputs, elsewhere: float32 [k, hidden]."""

    normed: int
    logits: int
    chosen: int
    weights: int
    gated: Activations
    outputs: int
    elsewhere: int


@dataclass(frozen=True)
class Workspace:
    """Addresses, for T = `tokens` tokens. x: float32 [T, hidden], the residual stream, START_BYTES
    behind `start`. inputs, gated: activations. turned: scales and sums of either, for products in
    tiles. projected, queries, absorbed, expanded: [T, as many values as Sizes says]. attended: [T,
    heads * dim]. partial, maximum, sum: of attention's spans, for `states` rows. gate, up: [T,
    gated]. logits: [TOKENS_OF_HEAD, vocabulary]. selection: of candidates
    among them."""

    tokens: int
    start: int
    x: int
    inputs: Activations
    gated: Activations
    turned: TurnedScales
    projected: int
    queries: int
    absorbed: int
    attended: int
    expanded: int
    states: int
    partial: int
    maximum: int
    sum: int
    gate: int
    up: int
    logits: int
    selection: int
    routed: Routed


def place_workspace(sizes: Sizes, region: Region) -> Workspace:
    s, tokens = sizes, sizes.most_tokens

    def floats(*counts: int) -> int:
        total = FLOAT
        for count in counts:
            total *= count
        return region.reserve(total)

    def turned() -> int:
        if tokens < gpu_launch.MATMUL_TOKENS:
            return 0
        groups = max(s.inputs, s.gated) // ACTIVATION_GROUP
        return floats(groups, gpu_launch.positions_of(tokens))

    start = region.reserve(START_BYTES + FLOAT * tokens * s.hidden)
    return Workspace(
        tokens=tokens,
        start=start,
        x=start + START_BYTES,
        inputs=_activations(tokens * s.inputs, region),
        gated=_activations(tokens * s.gated, region),
        turned=TurnedScales(turned(), turned()),
        projected=floats(tokens, s.projected),
        queries=floats(tokens, s.queries),
        absorbed=floats(tokens, s.absorbed),
        attended=floats(tokens, s.heads, s.dim),
        expanded=floats(tokens, s.expanded),
        states=s.most_states,
        partial=floats(s.most_states, s.dim),
        maximum=floats(s.most_states),
        sum=floats(s.most_states),
        gate=floats(tokens, s.gated),
        up=floats(tokens, s.gated),
        logits=floats(min(tokens, TOKENS_OF_HEAD), s.vocabulary),
        selection=region.reserve(s.selection.nbytes),
        routed=Routed(
            normed=floats(s.hidden if s.experts else 0),
            logits=floats(s.experts),
            chosen=floats(s.chosen),
            weights=floats(s.chosen),
            gated=_activations(s.chosen * s.expert_inner, region),
            outputs=floats(s.chosen, s.hidden),
            elsewhere=floats(s.chosen, s.hidden),
        ),
    )


def head_room(sizes: Sizes, vocabulary: int) -> int:
    """Bytes that a workspace takes the more where the head is on the card."""
    logits = FLOAT * min(sizes.most_tokens, TOKENS_OF_HEAD) * vocabulary
    selection = Selection(vocabulary).nbytes
    return bytes_of(lambda region: (region.reserve(logits), region.reserve(selection)))


def _activations(values: int, region: Region) -> Activations:
    groups = values // ACTIVATION_GROUP
    return Activations(
        region.reserve(values), region.reserve(FLOAT * groups), region.reserve(FLOAT * groups)
    )
