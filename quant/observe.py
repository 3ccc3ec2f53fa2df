"""Layers whose matrices are in memory a few rows at a time, while they are applied and measured.

Products and sums are in float64, then rounded, and every block of a matrix is one thread's work:
float32 sums depend on the machine and all sums on the number of threads, and a quantized model's
bytes should not.
"""

import queue
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional

from localr1.checkpoint.rows import row_ranges
from localr1.checkpoint.stored import CheckpointInPieces
from localr1.errors import NumericsError
from localr1.kernels.api import Routing
from localr1.kernels.mixture import pairs_by_expert
from localr1.kernels.reference import ReferenceKernels
from localr1.layers.linear import Linear
from localr1.layers.moe import ExpertMatrices
from localr1.layers.norm import rms_norm
from localr1.models.config import LAYER_PREFIX
from localr1.models.weights import WeightLoader
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.hessians import ExpertHessians, HessianSums
from localr1.quant.moments import Columns, ExpertMoments
from localr1.quant.stored_rows import PIECE_BYTES, float_pieces, rows_at

BLOCK_VALUES = 1 << 20
"""Widened to float64 at a time by a thread: 8 MB."""

HELD_BYTES = 512 << 20
"""Of matrices that are kept for the next window of a text; those beyond are read once a window."""

LAYER = re.compile(rf"{re.escape(LAYER_PREFIX)}\d+\.")


class RowBlocks:
    """Matrices of any floats in float64, a few rows at a time, in buffers that stay, one a thread:
    blocks allocated one by one lie in memory for good, as the allocator does not find the room of
    the last one again (measured: 90 MB in 24 layers)."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._buffers: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        self.clear()

    def clear(self) -> None:
        """Give the buffers back, until a matrix comes again."""
        while not self._buffers.empty():
            self._buffers.get()
        for _ in range(self._threads):
            self._buffers.put(torch.empty(0, dtype=torch.float64))

    def map(
        self, pieces: Iterable[Tensor], work: Callable[[Tensor, slice], Tensor | None]
    ) -> Iterator[Tensor | None]:
        """`work` on each block [n, columns] with the rows it has in the matrix; it may change the
        block and must not keep it. pieces: the matrix, in rows of any number: blocks are the same.
        Yields in the order of the rows, whichever was done first. No more pieces are taken than
        what the threads have in hand needs."""

        def run(start: int, rows: Tensor) -> Tensor | None:
            buffer = self._buffers.get()
            if rows.numel() > len(buffer):
                size = max(_rows_of_block(rows) * rows.shape[1], BLOCK_VALUES)
                buffer = torch.empty(size, dtype=torch.float64)
            block = buffer[: rows.numel()].view(rows.shape).copy_(rows)
            result = work(block, slice(start, start + len(rows)))
            self._buffers.put(buffer)
            return result

        blocks = _blocks(pieces)
        first = list(islice(blocks, 2))
        if min(self._threads, len(first)) < 2:
            while first:
                yield run(*first.pop(0))
            for start, rows in blocks:
                yield run(start, rows)
            return
        with ThreadPoolExecutor(self._threads) as pool:
            pending = deque(pool.submit(run, *block) for block in first)
            first.clear()
            for start, rows in blocks:
                pending.append(pool.submit(run, start, rows))
                if len(pending) > self._threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def add_squares(
        self, pieces: Iterable[Tensor], sums: Tensor, counts: Tensor | None = None
    ) -> None:
        """sums: float64 [columns], to each of which its column's sum of squares is added. counts:
        float64 [rows], how often each row counts."""

        def squares(block: Tensor, rows: slice) -> Tensor:
            block.square_()
            return block.sum(0) if counts is None else counts[rows] @ block

        for part in self.map(pieces, squares):
            assert part is not None
            sums += part


def _rows_of_block(rows: Tensor) -> int:
    return max(BLOCK_VALUES // rows.shape[1], 1)


def _blocks(pieces: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Each with the row it begins at, as if the matrix were whole. What a piece has beyond its last
    whole block is put before the next piece."""
    start, left = 0, None
    for piece in pieces:
        rows = piece if left is None else torch.cat([left, piece])
        step = _rows_of_block(rows)
        whole = len(rows) - len(rows) % step
        for begin in range(0, whole, step):
            yield start + begin, rows[begin : begin + step]
        start += whole
        left = rows[whole:] if whole < len(rows) else None
    if left is not None:
        yield start, left


class StreamedLinear:
    """A matrix [out, in] of any floats, of which a few rows are in memory, while it is applied.

    name: of its tensor. sizes: out and in. read: its rows, in pieces. bias: float32 [out] or None.
    sums: zeros, to which the squares of its inputs at every call and those of its rows at the first
    are added; None: it is not observed. row_order: int64 [out], the stored row that becomes each
    row, or None; the bias is in that order already. keep_inputs: called with the inputs.
    """

    def __init__(
        self,
        name: str,
        sizes: tuple[int, int],
        read: Callable[[], Iterable[Tensor]],
        bias: Tensor | None,
        sums: Columns | None,
        blocks: RowBlocks,
        row_order: Tensor | None = None,
        keep_inputs: Callable[[Tensor], None] | None = None,
    ) -> None:
        self._name = name
        self._sizes = sizes
        self._read = read
        self._bias = bias
        self._sums = sums
        self._blocks = blocks
        self._row_order = row_order
        self._keep_inputs = keep_inputs
        self._is_measured = False

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, in] -> float32 [T, out]. Raises what reading raises, NumericsError for NaN
        or Inf in the matrix."""
        out_features, in_features = self._sizes
        if self._sums is not None:
            self._blocks.add_squares([x], self._sums.inputs)
        if self._keep_inputs is not None:
            self._keep_inputs(x)
        x = x.to(torch.float64)
        y = torch.empty(x.shape[0], out_features)

        def product(block: Tensor, rows: slice) -> Tensor:
            y[:, rows] = functional.linear(x, block)
            return block.square_().sum(0)

        squares = torch.zeros(in_features, dtype=torch.float64)
        for part in self._blocks.map(self._read(), product):
            assert part is not None
            squares += part
        check_finite(squares, self._name)
        if self._sums is not None and not self._is_measured:
            self._sums.weights.copy_(squares)
            self._is_measured = True
        if self._row_order is not None:
            y = y[:, self._row_order]
        return y if self._bias is None else y.add_(self._bias)

    def after_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """This matrix applied to rms_norm(x)."""
        return self(rms_norm(x, norm, eps))

    @property
    def nbytes(self) -> int:
        """Of what stays in memory."""
        return 0 if self._bias is None else self._bias.nbytes


class ObservedExperts:
    """The routed experts of one layer, one after another, each over all tokens that chose it.

    keep_inputs: called with what they read. hessians: given the inputs of down.
    """

    def __init__(
        self,
        experts: Sequence[ExpertMatrices],
        sizes: tuple[int, int],
        blocks: RowBlocks,
        keep_inputs: Callable[[Tensor], None] | None = None,
        hessians: ExpertHessians | None = None,
    ) -> None:
        """sizes: hidden and inner."""
        hidden, inner = sizes
        self._experts = experts
        self._blocks = blocks
        self._keep_inputs = keep_inputs
        self._hessians = hessians
        self._gate_up = torch.zeros(len(experts), hidden, dtype=torch.float64)
        self._down = torch.zeros(len(experts), inner, dtype=torch.float64)
        self._tokens = torch.zeros(len(experts), dtype=torch.int64)
        self._mass = torch.zeros(len(experts), dtype=torch.float64)

    def __call__(self, x: Tensor, routing: Routing, residual: Tensor) -> None:
        """As every ExpertSource; a token's experts are added up in the order of their numbers."""
        chosen_per_token = routing.experts.shape[1]
        if self._keep_inputs is not None:
            self._keep_inputs(x)
        if self._hessians is not None:
            self._hessians.keep(x, routing)
        for number, pairs in pairs_by_expert(routing.experts):
            expert, tokens = self._experts[number], pairs // chosen_per_token
            weights = routing.weights.flatten()[pairs]
            squares = weights.to(torch.float64).square()
            chosen = x[tokens]
            inner = functional.silu(expert.gate(chosen)).mul_(expert.up(chosen))
            self._blocks.add_squares([chosen], self._gate_up[number], squares)
            self._blocks.add_squares([inner], self._down[number], squares)
            if self._hessians is not None:
                self._hessians.add(inner, squares)
            self._tokens[number] += len(tokens)
            self._mass[number] += squares.sum()
            residual[tokens] += expert.down(inner).mul_(weights[:, None])

    def moments(self, prefix: str) -> ExpertMoments:
        mass = self._mass[:, None].clamp_min(torch.finfo(torch.float64).tiny)
        return ExpertMoments(
            prefix, self._gate_up / mass, self._down / mass, self._tokens, self._mass
        )


class ObservingLoader(WeightLoader):
    """Gives linears that are observed, but for those of routed experts, which `ObservedExperts`
    observes. sums: of those since `begin`, by the module's name. observes: whether any are."""

    def __init__(
        self, checkpoint: CheckpointInPieces, threads: int = 1, *, observes: bool = True
    ) -> None:
        # The weights are floats, which no kernels are asked for.
        super().__init__(checkpoint, ReferenceKernels(), separate_experts=True)
        self._source = checkpoint
        self.blocks = RowBlocks(threads)
        self.sums: dict[str, Columns] = {}
        self._observes = observes
        self._hessians: HessianSums | None = None
        columns: dict[str, int] = {"": 0}
        for name, info in checkpoint.tensors.items():
            if observes and len(info.shape) == 2 and EXPERTS_PART not in name:
                layer = LAYER.match(name)
                key = layer[0] if layer else name
                columns[key] = columns.get(key, 0) + info.shape[1]
        # Of one layer at a time, and all at once: small tensors that stay, made between large ones
        # that go, would keep the allocator from putting the next large one where the last was.
        self._room = torch.zeros(2, max(columns.values()), dtype=torch.float64)
        self._taken = 0
        self._held: dict[str, list[Tensor]] | None = None

    def begin(self, hessians: HessianSums | None = None) -> None:
        """Forget what was observed. hessians: given the inputs that come."""
        self.sums = {}
        self._hessians = hessians
        self._room.zero_()
        self._taken = 0

    def hold(self, holds: bool) -> None:
        """Keep each matrix as it is stored from its first use on, up to HELD_BYTES, until this is
        called again: for those that are applied to one window of the text after another."""
        self._held = {} if holds else None

    def observe(self, prefix: str, in_features: int) -> Columns:
        """Zeros, to be filled."""
        inputs, weights = self._room[:, self._taken : self._taken + in_features]
        self._taken += in_features
        self.sums[prefix] = Columns(inputs, weights)
        return self.sums[prefix]

    def linear(
        self,
        prefix: str,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        row_order: Tensor | None = None,
    ) -> Linear:
        added = self.vector(f"{prefix}.bias", out_features) if bias else None
        if added is not None and row_order is not None:
            added = added[row_order]
        observed = self._observes and EXPERTS_PART not in prefix
        return StreamedLinear(
            f"{prefix}.weight",
            (out_features, in_features),
            partial(self._pieces, prefix, out_features, in_features),
            added,
            self.observe(prefix, in_features) if observed else None,
            self.blocks,
            row_order,
            self._hessians.keeper(prefix) if self._hessians and observed else None,
        )

    def vector(self, name: str, size: int) -> Tensor:
        value = super().vector(name, size)
        check_finite(value, name)
        return value

    def embedded(self, prefix: str, vocab_size: int, hidden_size: int, ids: Tensor) -> Tensor:
        """The rows float32 [T, hidden_size] of the token table for ids int64 [T]."""
        if self.is_packed(prefix):
            return self.embedding(prefix, vocab_size, hidden_size, is_head=False)(ids)
        return rows_at(self._stored(prefix, vocab_size, hidden_size), ids)

    def _pieces(self, prefix: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        """The rows of a matrix of any floats, held or read."""
        if self._held is None:
            yield from self._stored(prefix, out_features, in_features)
        elif prefix in self._held:
            yield from self._held[prefix]
        else:
            yield from self._keeping(prefix, self._stored(prefix, out_features, in_features))

    def _keeping(self, prefix: str, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same pieces, which are held from now on, if there is room for all of them."""
        assert self._held is not None
        room = HELD_BYTES - sum(piece.nbytes for kept in self._held.values() for piece in kept)
        kept: list[Tensor] = []
        for piece in pieces:
            room -= piece.nbytes
            if room >= 0:
                kept.append(piece)
            else:
                kept.clear()
            yield piece
        if room >= 0:
            self._held[prefix] = kept

    def _stored(self, prefix: str, out_features: int, in_features: int) -> Iterator[Tensor]:
        """The rows of a matrix, in 16 bits where it is stored so, else float32."""
        if self.is_packed(prefix):
            packed = self._packed(prefix, out_features, in_features)
            assert packed is not None
            row_nbytes = in_features * torch.float32.itemsize
            for begin, end in row_ranges((out_features,), row_nbytes, PIECE_BYTES):
                yield self._kernels.embedding(torch.arange(begin, end), packed)
            return
        name = f"{prefix}.weight"
        self._check_stored(name, (out_features, in_features))
        for rows in float_pieces(self._source, name):
            self._check_is_float(name, rows)
            yield rows.to(torch.float32) if rows.itemsize > 4 else rows


def check_finite(sums: Tensor, name: str) -> None:
    """A damaged tensor is named here: once measured, its NaN would be found in all it reaches."""
    if not sums.isfinite().all():
        raise NumericsError(
            f"{name}: values",
            expected="finite numbers",
            found="NaN or Inf",
            fix="The source checkpoint is damaged: download or convert it again.",
        )
