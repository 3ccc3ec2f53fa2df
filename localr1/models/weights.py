"""From a checkpoint's tensors to layers: one at a time, each checked, none left over."""

import re
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.packed import PackedReader
from localr1.errors import MemoryLimitError, TensorError
from localr1.kernels.api import ExpertBank, Kernels, PackedExpert, PackedWeight, Weight
from localr1.kernels.large_pages import LargePages
from localr1.layers.linear import (
    Embedding,
    FloatEmbedding,
    FloatLinear,
    Linear,
    PackedEmbedding,
    PackedLinear,
)

FLOAT_TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
REQUIRED_PARTS = ("weight_packed", "weight_scale", "weight_shape")
PACKED_PARTS = (*REQUIRED_PARTS, "weight_zero_point")
HARMLESS_LEFTOVER = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old checkpoints saved and config.json determines."""


class WeightLoader:
    """Reads the weights of one model and remembers which tensors it used.

    leaves_experts: routed experts that are packed alike are not read, but left to a source that
    reads them when it wants. separate_experts: they are not put together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        *,
        leaves_experts: bool = False,
        separate_experts: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self.leaves_experts = leaves_experts
        self.separate_experts = separate_experts
        self._packed_matrices = PackedReader(checkpoint, kernels.numbers_of_bits)
        self._kernels = kernels
        self._pages = LargePages()
        self._used: set[str] = set()
        self.nbytes = 0
        """Bytes of everything loaded so far, as it lies in memory."""

    def vector(self, name: str, size: int) -> Tensor:
        """float32 [size]."""
        return self._float(name, (size,))

    def linear(
        self,
        prefix: str,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        row_order: Tensor | None = None,
    ) -> Linear:
        """The matrix `prefix`.weight or its packed form, with its bias if it must have one.

        row_order: int64 [out_features], the stored row that becomes each row. A packed row moves
        whole, so its values stay the same.
        """
        added = self.vector(f"{prefix}.bias", out_features) if bias else None
        if added is not None and row_order is not None:
            added = added[row_order]
        packed = self._packed(prefix, out_features, in_features, row_order)
        if packed is not None:
            return PackedLinear(self._kernels, packed, added)
        return FloatLinear(self.matrix(prefix, out_features, in_features, row_order), added)

    def matrix(
        self, prefix: str, out_features: int, in_features: int, row_order: Tensor | None = None
    ) -> Tensor:
        """`prefix`.weight, float32 [out, in], which must not be packed."""
        value = self._float(f"{prefix}.weight", (out_features, in_features))
        return value if row_order is None else value[row_order]

    def unpacked(self, prefix: str, out_features: int, in_features: int, *, widen: bool) -> Tensor:
        """`prefix`.weight [out, in] as float32 or, unless widen, in 16 bits where it is stored so;
        if it is packed, the float32 values it stands for."""
        if not self.is_packed(prefix):
            return self._float(f"{prefix}.weight", (out_features, in_features), widen=widen)
        before = self.nbytes
        packed = self._packed(prefix, out_features, in_features)
        assert packed is not None
        value = self._kernels.embedding(torch.arange(out_features), packed)
        self.nbytes = before + value.nbytes
        return value

    def at_hand(self, value: Tensor) -> Tensor:
        """A copy, contiguous, where every token finds it soonest."""
        return self._pages.copy_of(value)

    def stack(self, prefixes: list[list[str]], out_features: int, in_features: int) -> Tensor:
        """Matrices of the same size as one float32 tensor: a row of `prefixes` are matrices one
        above the other, [len(prefixes), len(prefixes[0]) * out, in]. Never holds them twice."""
        shape = (len(prefixes), len(prefixes[0]), out_features, in_features)
        try:
            stacked = torch.empty(shape)
        except RuntimeError as error:  # What torch's CPU allocator raises; nothing else can fail.
            raise MemoryLimitError(
                f"the matrices {prefixes[0][0]} and their like",
                expected=f"{4 * prod(shape) / 2**30:.1f} GiB as float32",
                found="less free memory",
                fix="Quantize the model with `localr1 quantize`.",
            ) from error
        for matrices, row in zip(prefixes, stacked, strict=True):
            for prefix, place in zip(matrices, row, strict=True):
                place.copy_(self.matrix(prefix, out_features, in_features))
        return stacked.flatten(1, 2)

    def is_packed(self, prefix: str) -> bool:
        """Whether the matrix is stored in packed form."""
        return f"{prefix}.weight_packed" in self._checkpoint.tensors

    def packed_form(self, prefix: str) -> tuple[Hashable, str] | None:
        """Scheme and dtype of the scales of a packed matrix, read from config and headers only;
        None for one that is not packed."""
        scale = self._checkpoint.tensors.get(f"{prefix}.weight_scale")
        if scale is None or not self.is_packed(prefix):
            return None
        return self._packed_matrices.scheme(prefix), scale.dtype

    def leave(self, prefixes: Iterable[str]) -> None:
        """These packed matrices are read by another; here only their headers are looked at.

        Raises TensorError when a part is missing, or not of the shape and dtype that the same
        matrix of the first expert has.
        """
        first: dict[str, TensorInfo] = {}
        for prefix in prefixes:
            matrix = prefix.rpartition(".")[2]
            for part in PACKED_PARTS:
                name = f"{prefix}.{part}"
                info = self._checkpoint.tensors.get(name)
                like = first.get(f"{matrix}.{part}")
                if info is None:
                    if like is not None or part in REQUIRED_PARTS:
                        raise TensorError(f"tensor {name} is missing")
                    continue
                self._used.add(name)
                self.nbytes += info.nbytes
                like = first.setdefault(f"{matrix}.{part}", info)
                if (info.dtype, info.shape) != (like.dtype, like.shape):
                    raise TensorError(
                        f"tensor {name}",
                        expected=f"{like.dtype} {list(like.shape)}, as {like.name}",
                        found=f"{info.dtype} {list(info.shape)}",
                    )

    def packed(self, prefix: str, out_features: int, in_features: int) -> PackedWeight:
        """The matrix as it is stored. Raises TensorError when it is not packed."""
        packed = self._read_packed(prefix, out_features, in_features)
        if packed is None:
            raise TensorError(f"tensor {prefix}.weight_packed is missing")
        return packed

    def expert_bank(self, experts: Iterable[PackedExpert], count: int) -> ExpertBank:
        """The experts of one layer, each prepared before the next is read."""
        bank = self._kernels.prepare_experts(experts, count)
        self.nbytes += bank.nbytes
        return bank

    def embedding(
        self, prefix: str, vocab_size: int, hidden_size: int, *, is_head: bool
    ) -> Embedding:
        """The token table; is_head: the output head shares it, so a float one is widened."""
        packed = self._packed(prefix, vocab_size, hidden_size)
        if packed is not None:
            return PackedEmbedding(self._kernels, packed)
        shape = (vocab_size, hidden_size)
        return FloatEmbedding(self._float(f"{prefix}.weight", shape, widen=is_head))

    def check_duplicate(self, prefix: str, original: str) -> None:
        """`prefix` may be stored besides `original`, of which it must be a copy: a tied model whose
        head differs from its embedding is two models, and neither may be chosen in silence."""
        names = [name for name in self._checkpoint.tensors if name.startswith(prefix + ".")]
        for name in names:
            other = original + name.removeprefix(prefix)
            same = other in self._checkpoint.tensors and torch.equal(
                self._checkpoint.read(name), self._checkpoint.read(other)
            )
            if not same:
                raise TensorError(
                    f"tensor {name}",
                    expected=f"a copy of {other}, since config.json ties the two",
                    found="other values",
                    fix="Correct tie_word_embeddings in config.json.",
                )
        self._used.update(names)

    def finish(self, is_left_out: Callable[[str], bool]) -> None:
        """Raise TensorError if the checkpoint holds a tensor that the model did not use, unless
        the model leaves it out knowingly."""
        left = [
            name
            for name in self._checkpoint.tensors
            if name not in self._used
            and not HARMLESS_LEFTOVER.search(name)
            and not is_left_out(name)
        ]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise TensorError(
                f"tensor {min(left)}{more}",
                expected="only tensors that the architecture in config.json uses",
                found="one that would be ignored",
                fix="config.json and the weights do not belong together.",
            )

    def _packed(
        self, prefix: str, out_features: int, in_features: int, row_order: Tensor | None = None
    ) -> Weight | None:
        packed = self._read_packed(prefix, out_features, in_features)
        if packed is None:
            return None
        if row_order is not None:
            zero_point = packed.zero_point
            packed = replace(
                packed,
                packed=packed.packed[row_order],
                scale=packed.scale[row_order],
                zero_point=None if zero_point is None else zero_point[row_order],
            )
        weight = self._kernels.prepare(packed)
        self.nbytes += weight.nbytes
        return weight

    def _read_packed(self, prefix: str, out_features: int, in_features: int) -> PackedWeight | None:
        packed = self._packed_matrices.read(prefix)
        if packed is None:
            return None
        self._used.update(f"{prefix}.{part}" for part in PACKED_PARTS)
        found = (packed.out_features, packed.in_features)
        self._check_shape(f"{prefix}.weight_packed", (out_features, in_features), found)
        return packed

    def _float(self, name: str, shape: tuple[int, ...], *, widen: bool = True) -> Tensor:
        self._check_stored(name, shape)
        stored = self._checkpoint.read(name)
        self._check_is_float(name, stored)
        self._used.add(name)
        value = stored.to(torch.float32) if widen or stored.itemsize > 4 else stored
        self.nbytes += value.nbytes
        return value

    def _check_stored(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises TensorError unless there is such a tensor of this shape. Reads the headers."""
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise TensorError(
                f"tensor {name}",
                expected=f"shape {list(shape)}",
                found="no such tensor",
                fix="The checkpoint is incomplete, or config.json belongs to another model.",
            )
        self._check_shape(name, shape, info.shape)

    @staticmethod
    def _check_is_float(name: str, stored: Tensor) -> None:
        if stored.dtype not in FLOAT_TYPES:
            raise TensorError(
                f"tensor {name}", expected="floating-point values", found=str(stored.dtype)
            )

    @staticmethod
    def _check_shape(name: str, expected: tuple[int, ...], found: tuple[int, ...]) -> None:
        if expected != found:
            raise TensorError(
                f"tensor {name}",
                expected=f"shape {list(expected)}",
                found=f"{list(found)}",
                fix="config.json and the weights do not belong together.",
            )
