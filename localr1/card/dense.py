"""The launches of a dense model's step: attention over keys and values, gated MLP, head."""

from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64
from dataclasses import dataclass
from typing import Any

from localr1.card.program import Program, pointer
from localr1.card.weights import CardAttention, CardHead, CardLinear, CardMlp
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
    """A layer's keys and values on the card: addresses of [kv heads, capacity, dim] each. half:
    float16, else float32."""

    keys: int
    values: int
    capacity: int
    half: bool


class StepLaunches:
    """Adds to a program what `tokens` tokens go through. All of it reads and writes the workspace;
    the residual stream is `workspace.x`."""

    def __init__(self, program: Program, workspace: Workspace, rope: CardRope, tokens: int) -> None:
        assert tokens <= workspace.tokens
        self._program, self._rope = program, rope
        self._work = workspace
        self._tokens = tokens

    def attention(self, weights: CardAttention, memory: LayerMemory) -> None:
        w, work, tokens = weights, self._work, self._tokens
        dim, heads, kv_heads = w.head_dim, w.num_heads, w.num_kv_heads
        rows = (heads + 2 * kv_heads) * dim
        self.norm(work.x, w.norm, w.eps, w.o.rows)
        self._products(w.queries_keys_values, work.inputs, work.qkv, rows)
        cache = pointer(memory.keys), pointer(memory.values)
        self._program.launch(
            gpu_launch.rope_append(heads, kv_heads, dim, tokens),
            pointer(work.qkv), c_int32(heads), c_int32(kv_heads), c_int32(dim), pointer(w.q_norm),
            pointer(w.k_norm), c_float(w.eps), *self._rope.arguments, pointer(work.start), *cache,
            c_int64(memory.capacity), c_int32(memory.half), pointer(work.queries),
        )  # fmt: skip
        states = [pointer(each) for each in (work.partial, work.maximum, work.sum)]
        group = heads // kv_heads
        self._program.launch(
            gpu_launch.attend(group, kv_heads, tokens, memory.capacity, (dim, dim), memory.half),
            pointer(work.queries), c_int32(heads), c_int32(group), c_float(w.scale), *cache,
            c_int64(memory.capacity * dim), c_int64(dim), c_int32(dim), c_int32(dim),
            pointer(work.start), *states,
        )  # fmt: skip
        spans = gpu_launch.num_spans(memory.capacity)
        self._program.launch(
            gpu_launch.merge_spans(heads, tokens),
            *states, pointer(work.start), c_int32(spans), c_int32(dim), pointer(work.attended),
        )  # fmt: skip
        self._quantize(work.attended, w.o.columns)
        self._product(w.o, work.inputs, work.x, w.o.rows, accumulate=True)

    def mlp(self, weights: CardMlp) -> None:
        w, work = weights, self._work
        self.norm(work.x, w.norm, w.eps, w.gate.columns)
        self._product(w.gate, work.inputs, work.gate, w.gate.rows)
        self._product(w.up, work.inputs, work.up, w.up.rows)
        groups = self._tokens * w.down.columns // ACTIVATION_GROUP
        self._program.launch(
            gpu_launch.silu_quantize(groups),
            pointer(work.gate), pointer(work.up), c_int64(groups), *_arguments(work.gated),
        )  # fmt: skip
        self._product(w.down, work.gated, work.x, w.down.rows, accumulate=True)

    def head(self, head: CardHead, first: int) -> None:
        """Logits of the tokens from `first` on, as many as `tokens`."""
        hidden = head.matrix.columns
        self.norm(self._work.x + FLOAT * first * hidden, head.norm, head.eps, hidden)
        self._product(head.matrix, self._work.inputs, self._work.logits, head.matrix.rows)

    def norm(self, x: int, weight: int, eps: float, columns: int) -> None:
        """Normed and quantized, into the workspace's inputs."""
        self._program.launch(
            gpu_launch.rms_norm(self._tokens),
            pointer(x), c_int64(columns), pointer(weight), c_float(eps), c_int32(columns),
            pointer(0), *_arguments(self._work.inputs),
        )  # fmt: skip

    def _quantize(self, x: int, columns: int) -> None:
        groups = self._tokens * columns // ACTIVATION_GROUP
        self._program.launch(
            gpu_launch.quantize_activations(groups),
            pointer(x), c_int64(groups), *_arguments(self._work.inputs),
        )  # fmt: skip

    def _products(
        self, linears: Sequence[CardLinear], inputs: Activations, out: int, stride: int
    ) -> None:
        """Side by side: [T, stride]."""
        column = 0
        for linear in linears:
            self._product(linear, inputs, out + FLOAT * column, stride)
            column += linear.rows

    def _product(
        self,
        linear: CardLinear,
        inputs: Activations,
        out: int,
        stride: int,
        *,
        accumulate: bool = False,
    ) -> None:
        self._program.launch(
            gpu_launch.matvec(int(linear.layout.bits), linear.rows, self._tokens),
            linear.layout, pointer(linear.data), *_arguments(inputs), c_int32(self._tokens),
            pointer(linear.bias), pointer(out), c_int64(stride), c_int32(accumulate),
        )  # fmt: skip


def _arguments(activations: Activations) -> tuple[Any, ...]:
    return pointer(activations.codes), pointer(activations.scales), pointer(activations.sums)
