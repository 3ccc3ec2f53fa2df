"""The launches that layers of all kinds are made of."""

from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64
from dataclasses import dataclass
from typing import Any

from localr1.card.program import Program, pointer
from localr1.card.selection import Selection
from localr1.card.weights import CardHead, CardLinear, CardMlp
from localr1.card.workspace import FLOAT, Activations, Workspace
from localr1.kernels import gpu_launch
from localr1.qtypes import ACTIVATION_GROUP


@dataclass(frozen=True)
class CardRope:
    """Addresses of cos and sin [positions, pairs]."""

    cos: int
    sin: int
    pairs: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        return pointer(self.cos), pointer(self.sin), c_int32(self.pairs)


@dataclass(frozen=True)
class LayerMemory:
    """A layer's cache on the card: addresses of keys and values [kv heads, capacity, dim] each, or
    of latents [capacity, values], which are both. half: float16, else float32."""

    keys: int
    values: int
    capacity: int
    half: bool


@dataclass(frozen=True)
class Heads:
    """What attention reads: queries [T, num, key_dim]; of a cache, kv_num key/value heads, each
    head_stride values behind the one before, of rows of key_dim values of which, or beside which,
    value_dim are summed up."""

    num: int
    kv_num: int
    key_dim: int
    value_dim: int
    head_stride: int
    scale: float


class StepLaunches:
    """Adds to a program what `tokens` tokens go through. All of it reads and writes the workspace;
    the residual stream is `work.x`. reach: positions of the cache that attention's grid is made
    for, behind the last token."""

    def __init__(
        self, program: Program, work: Workspace, rope: CardRope, tokens: int, reach: int
    ) -> None:
        assert tokens <= work.tokens
        self.program = program
        self.work = work
        self.rope = rope
        self.tokens = tokens
        self._reach = reach
        self._in_tiles = tokens >= gpu_launch.MATMUL_TOKENS

    def norm(
        self,
        x: int,
        weight: int,
        eps: float,
        columns: int,
        *,
        stride: int | None = None,
        normed: int = 0,
    ) -> None:
        """Of rows `stride` values apart: quantized into the workspace's inputs, and as floats into
        `normed` where that is given."""
        self.program.launch(
            gpu_launch.rms_norm(self.tokens),
            pointer(x), c_int64(stride or columns), pointer(weight), c_float(eps), c_int32(columns),
            pointer(normed), *arguments_of(self.work.inputs),
        )  # fmt: skip
        self._turn(self.work.inputs, columns)

    def quantize(self, x: int, columns: int) -> None:
        """Into the workspace's inputs."""
        groups = self.tokens * columns // ACTIVATION_GROUP
        self.program.launch(
            gpu_launch.quantize_activations(groups),
            pointer(x), c_int64(groups), *arguments_of(self.work.inputs),
        )  # fmt: skip
        self._turn(self.work.inputs, columns)

    def product(self, linear: CardLinear, inputs: Activations, out: int, stride: int) -> None:
        """Into rows `stride` values apart."""
        self._multiply(linear, inputs, out, stride, accumulate=False)

    def products(
        self, linears: Sequence[CardLinear], inputs: Activations, out: int, stride: int
    ) -> None:
        """Side by side in these rows."""
        for linear in linears:
            self.product(linear, inputs, out, stride)
            out += FLOAT * linear.rows

    def add_product(self, linear: CardLinear, inputs: Activations) -> None:
        """To the residual stream."""
        self._multiply(linear, inputs, self.work.x, linear.rows, accumulate=True)

    def attend(self, queries: int, memory: LayerMemory, heads: Heads) -> None:
        """Into `work.attended`, [T, heads, value_dim]; of as many tokens at once as there is room
        for their spans."""
        spans = gpu_launch.num_spans(self._reach)
        at_once = self.work.states // (heads.num * spans)
        assert at_once
        for first in range(0, self.tokens, at_once):
            count = min(at_once, self.tokens - first)
            self._attend(queries, memory, heads, first, count)

    def _attend(
        self, queries: int, memory: LayerMemory, heads: Heads, first: int, count: int
    ) -> None:
        """Of tokens first .. first + count - 1."""
        work, group, reach = self.work, heads.num // heads.kv_num, self._reach
        dims = heads.key_dim, heads.value_dim
        states = [pointer(each) for each in (work.partial, work.maximum, work.sum)]
        row = FLOAT * first * heads.num
        where = pointer(work.start), c_int32(first)
        self.program.launch(
            gpu_launch.attend(group, heads.kv_num, count, reach, dims, memory.half),
            pointer(queries + row * heads.key_dim), c_int32(heads.num), c_int32(group),
            c_float(heads.scale), pointer(memory.keys), pointer(memory.values),
            c_int64(heads.head_stride), c_int64(heads.key_dim), c_int32(heads.key_dim),
            c_int32(heads.value_dim), *where, c_int32(count), *states,
        )  # fmt: skip
        self.program.launch(
            gpu_launch.merge_spans(heads.num, count),
            *states, *where, c_int32(gpu_launch.num_spans(reach)), c_int32(heads.value_dim),
            pointer(work.attended + row * heads.value_dim),
        )  # fmt: skip

    def mlp(self, weights: CardMlp) -> None:
        """Norm, gate and up, down, added to the residual stream."""
        self.norm(self.work.x, weights.norm, weights.eps, weights.gate.columns)
        self.gated_mlp(weights)

    def gated_mlp(self, weights: CardMlp) -> None:
        """The same of what the workspace's inputs are already."""
        w, work = weights, self.work
        self.product(w.gate, work.inputs, work.gate, w.gate.rows)
        self.product(w.up, work.inputs, work.up, w.up.rows)
        groups = self.tokens * w.down.columns // ACTIVATION_GROUP
        self.program.launch(
            gpu_launch.silu_quantize(groups),
            pointer(work.gate), pointer(work.up), c_int64(groups), *arguments_of(work.gated),
        )  # fmt: skip
        self._turn(work.gated, w.down.columns)
        self.add_product(w.down, work.gated)

    def head(self, head: CardHead, first: int) -> None:
        """Logits of the tokens from `first` on, as many as `tokens`."""
        hidden = head.matrix.columns
        self.norm(self.work.x + FLOAT * first * hidden, head.norm, head.eps, hidden)
        self.product(head.matrix, self.work.inputs, self.work.logits, head.matrix.rows)

    def _turn(self, activations: Activations, columns: int) -> None:
        """What every product of tiles with these activations reads."""
        if not self._in_tiles:
            return
        groups, tokens = columns // ACTIVATION_GROUP, self.tokens
        stride = gpu_launch.positions_of(tokens)
        self.program.launch(
            gpu_launch.by_group(groups, stride),
            pointer(activations.scales), pointer(activations.sums), c_int32(groups), pointer(0),
            c_int32(1), c_int32(tokens), c_int64(stride), *turned_of(self.work),
        )  # fmt: skip

    def select(self, selection: Selection) -> None:
        """Candidates among the logits of one token."""
        work = self.work
        selection.find(self.program, work.logits, work.start + FLOAT, work.selection)

    def _multiply(
        self, linear: CardLinear, inputs: Activations, out: int, stride: int, *, accumulate: bool
    ) -> None:
        code, tokens = int(linear.layout.code), self.tokens
        matrix = linear.layout, pointer(linear.data)
        target = pointer(linear.bias), pointer(out), c_int64(stride), c_int32(accumulate)
        if self._in_tiles:
            self.program.launch(
                gpu_launch.matmul(code, linear.rows, tokens),
                *matrix, pointer(inputs.codes), *turned_of(self.work),
                c_int64(gpu_launch.positions_of(tokens)), c_int32(tokens), *target,
            )  # fmt: skip
        else:
            self.program.launch(
                gpu_launch.matvec(code, linear.rows, tokens),
                *matrix, *arguments_of(inputs), c_int32(tokens), *target,
            )  # fmt: skip


def arguments_of(activations: Activations) -> tuple[Any, ...]:
    return pointer(activations.codes), pointer(activations.scales), pointer(activations.sums)


def turned_of(work: Workspace) -> tuple[Any, ...]:
    return pointer(work.turned.scales), pointer(work.turned.sums)
