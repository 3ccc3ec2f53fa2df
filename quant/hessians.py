"""E[x x^T] of the inputs of a layer's matrices: what GPTQ knows of a text.

Half the Hessian of the squared error of a row's outputs (Frantar et al. 2022, "GPTQ", section 3.1).
Matrices that read the same inputs share one: q, k and v; the gate, up and shared matrices of an
MLP or of a mixture, whose every token counts alike. down of a routed expert has its own, which is
computed when it is asked for and held by none: those of R1's 256 experts would be 8.6 GB a layer.

Sums in float64, each block of rows of a sum by one thread: they do not depend on their number.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

from localr1.checkpoint.expert_ranges import DOWN, GATE, UP
from localr1.kernels.api import Routing
from localr1.layers.moe import ExpertMatrices
from localr1.models.config import LAYER_PREFIX
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.moments import RARE_TOKENS
from localr1.quant.one_thread import one_thread_an_operation

ROWS_AT_ONCE = 256
"""Of a sum, by one thread."""

TOKENS_AT_ONCE = 1024
"""Widened to float64."""

ROUNDING = 4
"""Matrices of float64 [in, in] that methods/gptq.py holds beside the sum, at most. Measured: 3.6,
with 4,096 inputs."""

LAYER = re.compile(rf"{re.escape(LAYER_PREFIX)}\d+\.")

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa")


def input_name(module: str) -> str:
    """The same for modules that read the same inputs; of a routed expert's down its own."""
    parent, _, matrix = module.rpartition(".")
    if matrix in ATTENTION_INPUTS:
        return parent
    if matrix in (GATE, UP) and module.startswith(LAYER_PREFIX):
        return module.partition(".mlp.")[0] + ".mlp"
    return module


def hessian_bytes(columns: Mapping[str, int]) -> int:
    """Of memory, at most, that all takes which is [in, in] while a layer is measured and rounded.
    columns: the inputs of each module of whose a Hessian is wanted."""
    layers: dict[str, dict[str, int]] = {}
    for module, number in columns.items():
        layer = LAYER.match(module)
        name = input_name(module)
        if EXPERTS_PART in name:  # Of down: the layer's, while each expert has its turn.
            name = name.partition(EXPERTS_PART)[0]
        layers.setdefault(layer[0] if layer else name, {})[name] = number
    return max(
        8 * (sum(n * n for n in inputs.values()) + ROUNDING * max(inputs.values()) ** 2)
        for inputs in layers.values()
    )


class HessianSums:
    """Of one section, of the modules in `wanted`. keep: called with inputs as they come."""

    def __init__(self, wanted: Collection[str], threads: int) -> None:
        self._wanted = {input_name(module) for module in wanted}
        self._threads = threads
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}
        self._keepers: dict[str, str] = {}
        self._experts: dict[str, ExpertHessians] = {}

    def keeper(self, module: str) -> Callable[[Tensor], None] | None:
        """What to call with the inputs of a module; None where they are not wanted, or come by
        another module that reads them too."""
        name = input_name(module)
        if name not in self._wanted or self._keepers.setdefault(name, module) != module:
            return None

        def keep(x: Tensor) -> None:
            if name not in self._sums:
                size = x.shape[1]
                self._sums[name] = torch.zeros(size, size, dtype=torch.float64)
                self._tokens[name] = 0
            add_gram(self._sums[name], x, None, self._threads)
            self._tokens[name] += len(x)

        return keep

    def expert_keeper(
        self, prefix: str, experts: Sequence[ExpertMatrices], inner: int
    ) -> "ExpertHessians | None":
        """prefix: "model.layers.N.mlp.experts". For the inputs of down; None if not wanted."""
        if not any(f"{prefix}.{number}.{DOWN}" in self._wanted for number in range(len(experts))):
            return None
        self._experts[prefix] = ExpertHessians(experts, inner, self._threads)
        return self._experts[prefix]

    def of(self, module: str) -> Tensor:
        """float64 [in, in], the caller's own."""
        prefix, separator, expert = module.partition(EXPERTS_PART)
        number, _, matrix = expert.partition(".")
        if separator and matrix == DOWN:
            return self._experts[f"{prefix}{EXPERTS_PART}".removesuffix(".")].of(int(number))
        name = input_name(module)
        return self._sums[name] / self._tokens[name]


class ExpertHessians:
    """Of the inputs of down in each expert of one layer: tokens count by the square of the router's
    weight, and rarely chosen experts by their layer's, as ExpertMoments."""

    def __init__(self, experts: Sequence[ExpertMatrices], inner: int, threads: int) -> None:
        self._experts = experts
        self._threads = threads
        self._layer = torch.zeros(inner, inner, dtype=torch.float64)
        self._mass = 0.0
        self._x = torch.empty(0)
        self._routing = Routing(torch.empty(0, dtype=torch.int64), torch.empty(0))

    def keep(self, x: Tensor, routing: Routing) -> None:
        """x float32 [T, hidden], what the experts read; kept as it is."""
        self._x, self._routing = x, routing

    def add(self, inner: Tensor, squares: Tensor) -> None:
        """inner: float32 [n, inner], the inputs of down in one expert. squares: float64 [n]."""
        add_gram(self._layer, inner, squares, self._threads)
        self._mass += float(squares.sum())

    def of(self, number: int) -> Tensor:
        """Runs gate and up of the expert anew."""
        layer = self._layer / max(self._mass, torch.finfo(torch.float64).tiny)
        pairs = (self._routing.experts.flatten() == number).nonzero()[:, 0]
        if not len(pairs):
            return layer
        expert = self._experts[number]
        chosen = self._x[pairs // self._routing.experts.shape[1]]
        squares = self._routing.weights.flatten()[pairs].to(torch.float64).square()
        own = torch.zeros_like(layer)
        with one_thread_an_operation():
            inner = functional.silu(expert.gate(chosen)).mul_(expert.up(chosen))
            add_gram(own, inner, squares, self._threads)
        own /= squares.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return (len(pairs) * own + RARE_TOKENS * layer) / (len(pairs) + RARE_TOKENS)


def add_gram(sums: Tensor, x: Tensor, counts: Tensor | None, threads: int) -> None:
    """sums float64 [n, n] += x^T diag(counts) x, x [T, n] of any floats, counts float64 [T]. Where
    torch computes an operation with one thread (one_thread.py), the same for any `threads`."""
    starts = range(0, len(sums), ROWS_AT_ONCE)
    for begin in range(0, len(x), TOKENS_AT_ONCE):
        part = x[begin : begin + TOKENS_AT_ONCE].to(torch.float64)
        counted = part if counts is None else part * counts[begin : begin + len(part), None]

        def work(start: int, part: Tensor = part, counted: Tensor = counted) -> None:
            rows = slice(start, start + ROWS_AT_ONCE)
            sums[rows].addmm_(counted[:, rows].T, part)

        if min(threads, len(starts)) < 2:
            for start in starts:
                work(start)
        else:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(work, starts):
                    pass
