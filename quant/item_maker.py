"""What becomes of a tensor, made piece by piece: a few megabytes of rows are in memory at a time,
however large it is."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from localr1.checkpoint.rows import Rows
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.errors import NumericsError
from localr1.quant.methods import nf4
from localr1.quant.methods.base import (
    CalibratedMethod,
    CalibratedRowMethod,
    Inputs,
    Method,
    RowMethod,
    relative_error,
)
from localr1.quant.methods.registry import method_named
from localr1.quant.packing import pack_codes, pack_zero_points
from localr1.quant.plan import Item, Plan
from localr1.quant.recipe import NF4, Rule
from localr1.quant.smoothing import Smoothing
from localr1.quant.stored_rows import numbers
from localr1.quant.writer import DTYPES

PIECE_BYTES = 16 << 20
"""Of the source's rows that are read at once: an expert of R1, whose matrices have 14.7 MB in FP8,
is not cut."""

CHECKED_VALUES = 1 << 20
"""Looked at together: what is compared takes memory of its own, three times theirs."""

Parts = list[tuple[str, Tensor]]
"""Names of tensors in the output, and of each the rows that come next."""


@dataclass(frozen=True)
class Piece:
    """Rows of the tensor that `item` is made from, the first of them `first_row`."""

    item: Item
    rows: Rows
    first_row: int
    is_last: bool


def read_pieces(checkpoint: StoredCheckpoint, items: Iterator[Item]) -> Iterator[Piece]:
    """All of an item's where its method wants a matrix whole. Raises what reading raises."""
    for item in items:
        if item.rule is not None and not _goes_by_rows(item.rule):
            yield Piece(item, checkpoint.read(item.source.name), 0, is_last=True)
            continue
        first, rows_of_all = 0, item.source.shape[0] if item.source.shape else 1
        for rows in checkpoint.pieces(item.source.name, PIECE_BYTES):
            end = first + (rows.shape[0] if rows.shape else 1)
            yield Piece(item, rows, first, is_last=end == rows_of_all)
            first = end


def _method_of(rule: Rule) -> Method | CalibratedMethod | None:
    """None for NF4, which bitsandbytes encodes."""
    if rule.method == NF4:
        return None
    return method_named(rule.method, symmetric=rule.scheme.symmetric)


def _goes_by_rows(rule: Rule) -> bool:
    method: object = _method_of(rule)
    if isinstance(method, RowMethod):
        return True
    return isinstance(method, CalibratedRowMethod) and rule.scheme.symmetric


class ItemMaker:
    """The parts of one item, as its pieces come, in order. error: the relative squared error of a
    quantized item that is whole; None before, and of a kept one. inputs: of the item, if its method
    chooses by them.

    `make` raises NumericsError for NaN or Inf, and what the method raises."""

    def __init__(self, item: Item, plan: Plan, smooth: Smoothing, inputs: Inputs | None) -> None:
        self._item = item
        self._inputs = inputs
        self._scale_dtype = DTYPES[plan.dtype]
        self._smooth = smooth
        self._errors: list[Tensor] = []
        self._energies: list[Tensor] = []
        self.error: float | None = None

    def make(self, piece: Piece) -> Parts:
        name = self._item.name
        rows = piece.rows
        rule = self._item.rule
        if self._smooth.touches(name):
            rows = self._smooth.applied(name, numbers(rows), piece.first_row)
        if rule is None:
            (spec,) = self._item.specs
            return [(name, _kept(numbers(rows), DTYPES[spec.dtype], self._item.source.name))]
        method = _method_of(rule)
        if method is None:
            encoded = nf4.encode(numbers(rows), name, self._scale_dtype)
            self.error = encoded.relative_error
            return list(encoded.parts.items())
        if _goes_by_rows(rule):
            parts = self._made_by_rows(method, rows)
        else:
            parts = self._made_whole(method, numbers(rows))
        if piece.is_last:
            if self._errors:
                self.error = relative_error(torch.cat(self._errors), torch.cat(self._energies))
            shape = torch.tensor(self._item.source.shape, dtype=torch.int64)
            parts.append((f"{name}.weight_shape", shape))
        return parts

    def _made_by_rows(self, method: Method | CalibratedMethod, rows: Rows) -> Parts:
        assert self._item.rule is not None
        if isinstance(rows, Tensor) and rows.dtype == torch.float64:
            rows = rows.to(torch.float32)
        what = (rows, self._item.rule.scheme, self._scale_dtype, self._item.source.name)
        if isinstance(method, CalibratedRowMethod):
            assert self._inputs is not None
            made = method.quantize_rows_for(self._inputs, *what)
        else:
            assert isinstance(method, RowMethod)
            made = method.quantize_rows(*what)
        self._errors.append(made.error)
        self._energies.append(made.energy)
        return self._named(made.packed, made.scale)

    def _made_whole(self, method: Method | CalibratedMethod, weight: Tensor) -> Parts:
        assert self._item.rule is not None
        scheme = self._item.rule.scheme
        if weight.dtype == torch.float64:
            weight = weight.to(torch.float32)
        what = (weight, scheme, self._scale_dtype, self._item.source.name)
        if isinstance(method, CalibratedMethod):
            assert self._inputs is not None
            made = method.quantize_for(self._inputs, *what)
        else:
            made = method.quantize(*what)
        self.error = made.relative_error
        parts = self._named(pack_codes(made.codes, scheme), made.scale)
        if made.zero_point is not None:
            zero_point = pack_zero_points(made.zero_point, scheme)
            parts.append((f"{self._item.name}.weight_zero_point", zero_point))
        return parts

    def _named(self, packed: Tensor, scale: Tensor) -> Parts:
        name = self._item.name
        return [(f"{name}.weight_packed", packed), (f"{name}.weight_scale", scale)]


def _kept(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    kept = value.to(dtype)
    values = kept.reshape(-1)
    for begin in range(0, len(values), CHECKED_VALUES):
        if not values[begin : begin + CHECKED_VALUES].isfinite().all():
            raise NumericsError(
                f"{name}: values",
                expected=f"finite numbers within the range of {dtype}",
                found="NaN, Inf or a larger number",
                fix="The source checkpoint is damaged: download or convert it again.",
            )
    return kept
