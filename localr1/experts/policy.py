"""How much each expert is worth keeping in fast memory: rankings that caches of experts follow
(residency.py), learned from what the routers chose. Pure numpy, no torch.

An expert is named by layer and number, or by its key, layer * num_experts + expert. Layers count
the model's mixtures from 0. A pass is one run through all layers: a token in decode, a chunk in
prefill.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from localr1.errors import UsageError
from localr1.experts.adaptive import Adaptive
from localr1.experts.batched import Batched, Floats, Keys

if TYPE_CHECKING:
    from localr1.experts.trace import Trace


WORTHLESS: Final = -1e18
"""A score at which nothing is lost with an expert, so that not even its layer's floor keeps it."""


class Ranking(Protocol):
    """The higher an expert's score, the more it is worth keeping.

    horizon: tokens, such that (a's score - b's) * horizon estimates how many more uses there will
    be of a than of b while either is held; infinite where scores are no estimate of uses.
    """

    @property
    def name(self) -> str: ...

    @property
    def horizon(self) -> float: ...

    def observe(self, layer: int, experts: Keys, weights: Floats | None = None) -> None:
        """The distinct experts the running pass chose in a layer, and how many of its tokens chose
        each: one where `weights` is None. The arrays are kept until the pass is over, so they must
        not change."""

    def observe_layers(self, first: int, rows: Sequence[Keys]) -> None:
        """What the running pass, of one token, chose in the layers `first`, `first` + 1 and so on:
        equally many int64 in each. As `observe` for each, in a fraction of the time."""

    def tick(self, tokens: int | None = None) -> None:
        """The pass over `tokens` tokens is over. None: one, or with weights as many as the largest
        of them."""

    @property
    def scores(self) -> Floats:
        """[num_layers, num_experts], with what the running pass chose so far."""

    def score(self, keys: Keys) -> Floats:
        """The scores of these keys alone."""

    @property
    def passes(self) -> int:
        """How many are over."""

    @property
    def version(self) -> int:
        """Another number after every `observe` and `tick`."""

    @property
    def last_pass(self) -> Keys:
        """[keys]: the pass, counted from 0, that chose each last; below 0 for none. What `observe`
        was told counts from the next score or `tick` on."""

    @property
    def chosen(self) -> Keys:
        """The distinct keys of the last pass that is over."""

    @property
    def chosen_scores(self) -> Floats:
        """Of `chosen`."""


class Lru(Batched):
    """Least recently used: the score is when an expert was chosen last, in choices."""

    name: Final = "lru"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._last = np.zeros(self.num_keys)
        self._choices = 0

    def _apply(self, keys: Keys, weights: Floats | None) -> None:
        # A repeated key keeps its last assignment, its latest choice.
        self._last[keys] = np.arange(self._choices + 1, self._choices + 1 + len(keys))
        self._choices += len(keys)

    def _score(self, keys: Keys | None) -> Floats:
        return self._last.copy() if keys is None else self._last[keys]


class Lfu(Batched):
    """Least frequently used: the score is how often an expert was chosen, held or not."""

    name: Final = "lfu"

    def __init__(self, num_layers: int, num_experts: int) -> None:
        super().__init__(num_layers, num_experts)
        self._counts = np.zeros(self.num_keys)

    def _apply(self, keys: Keys, weights: Floats | None) -> None:
        self._counts[keys] += 1.0 if weights is None else weights

    def _score(self, keys: Keys | None) -> Floats:
        return self._counts.copy() if keys is None else self._counts[keys]


class StaticPopularity(Batched):
    """A fixed order: `popularity` [num_layers, num_experts], or where none is given how often the
    first pass (a prompt's first chunk) chose each."""

    name: Final = "static"

    def __init__(self, num_layers: int, num_experts: int, popularity: Floats | None = None) -> None:
        super().__init__(num_layers, num_experts)
        self._fixed = None if popularity is None else popularity.astype(np.float64).reshape(-1)

    def _end_pass(self, keys: Keys, weights: Floats | None, tokens: int) -> None:
        if self._fixed is None and len(keys):
            self._fixed = np.zeros(self.num_keys)
            self._fixed[keys] = 1.0 if weights is None else weights

    def _score(self, keys: Keys | None) -> Floats:
        if self._fixed is None:
            return np.zeros(self.num_keys if keys is None else len(keys))
        return self._fixed.copy() if keys is None else self._fixed[keys]


class Belady(Batched):
    """The oracle: an expert is worth the more, the sooner the trace chooses it next (Belady 1966,
    "A study of replacement algorithms for a virtual-storage computer"). No policy that brings in
    what is missing when it is missing has more hits. The passes must be those of the
    trace."""

    name: Final = "belady"

    def __init__(self, trace: "Trace") -> None:
        tokens, layers, per_token = trace.experts.shape
        super().__init__(layers, trace.num_experts)
        # When each choice is repeated, in steps of a layer: far away where it never is.
        self._never = float((tokens + 1) * layers)
        self._repeats = np.empty((tokens, layers, per_token))
        self._next = np.full(self.num_keys, self._never)
        first_keys = (np.arange(layers) * trace.num_experts)[:, None]
        steps = np.arange(layers, dtype=np.float64)[:, None]
        for token in range(tokens - 1, -1, -1):
            keys = trace.experts[token] + first_keys
            self._repeats[token] = self._next[keys]
            self._next[keys] = token * layers + steps
        self._trace = trace
        self._token = 0

    def _apply(self, keys: Keys, weights: Floats | None) -> None:
        layers = np.unique(keys // self.num_experts)
        tokens = 1
        if weights is not None:
            of_first = keys // self.num_experts == layers[0]
            tokens = round(weights[of_first].sum() / self._trace.experts_per_token)
        first_keys = layers[:, None] * self.num_experts
        assert self._token + tokens <= len(self._repeats), "more passes than the trace has tokens"
        for token in range(self._token, self._token + tokens):
            chosen = self._trace.experts[token, layers] + first_keys
            self._next[chosen] = self._repeats[token, layers]

    def _end_pass(self, keys: Keys, weights: Floats | None, tokens: int) -> None:
        self._token += tokens

    def _score(self, keys: Keys | None) -> Floats:
        return -self._next if keys is None else -self._next[keys]


RANKINGS: Final = ("static", "lru", "lfu", "adaptive")
"""What `make_ranking` makes; an oracle needs a trace."""


def make_ranking(name: str, num_layers: int, num_experts: int) -> Ranking:
    """Raises UsageError for a name that is none of RANKINGS."""
    made: dict[str, Callable[[int, int], Ranking]] = {
        "static": StaticPopularity,
        "lru": Lru,
        "lfu": Lfu,
        "adaptive": Adaptive,
    }
    if name not in made:
        raise UsageError("policy", expected=f"one of {', '.join(RANKINGS)}", found=repr(name)[:40])
    return made[name](num_layers, num_experts)
