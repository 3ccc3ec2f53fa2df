"""The lowest tier: experts in the files of their checkpoint."""

import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.direct_file import PAGE, DirectFile, page_range
from localr1.checkpoint.expert_ranges import (
    DOWN,
    GATE,
    UP,
    ExpertLocator,
    ExpertRanges,
    MatrixRanges,
)
from localr1.checkpoint.hf_directory import HuggingFaceDirectory
from localr1.checkpoint.index import FileRange
from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.safetensors_file import DTYPES
from localr1.errors import CheckpointError, NumericsError, TensorError
from localr1.kernels.api import PackedExpert, PackedWeight
from localr1.kernels.checksum import crc32c
from localr1.kernels.codes import widened
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_experts import ExpertForm, SlotArena
from localr1.qtypes import QuantScheme

Array = np.ndarray[Any, Any]

_EXPONENTS: Final[dict[torch.dtype, np.unsignedinteger[Any]]] = {
    torch.bfloat16: np.uint16(0x7F80),
    torch.float16: np.uint16(0x7C00),
    torch.float32: np.uint32(0x7F800000),
}
"""Bits of an exponent, all set in NaN and Inf alone."""


class CheckpointExperts:
    """Reads packed experts, one at a time. An expert that is one range of its file, as
    `localr1 quantize` writes it, is one direct read, checked against its checksum; any other is
    read part by part.

    names: of the experts' modules, by layer. The checkpoint stays open until `close`, which closes
    it.
    """

    def __init__(
        self, checkpoint: Checkpoint, kernels: NativeKernels, names: Sequence[Sequence[str]]
    ) -> None:
        self._checkpoint = checkpoint
        self._reader = PackedReader(checkpoint, kernels.numbers_of_bits)
        self._kernels = kernels
        self._names = names
        self.forms = [ExpertForm.of(self._packed(layer[0])) for layer in names]
        """Of each layer's experts; read from its first one."""
        self._layouts = [kernels.expert_layout(form) for form in self.forms]
        self._ranges = [
            _ranges(checkpoint, layer, form, kernels.numbers_of_bits)
            for layer, form in zip(names, self.forms, strict=True)
        ]
        self._files: dict[Path, DirectFile] = {}
        self._opening = threading.Lock()
        self._buffers = threading.local()

    def read(self, layer: int, expert: int, arena: SlotArena, slot: int) -> int:
        """`ExpertFiles.read`."""
        name, ranges = self._names[layer][expert], self._ranges[layer]
        if ranges is not None and _is_one_read(ranges[expert]):
            return self._read_whole(layer, name, ranges[expert], arena, slot)
        packed = self._packed(name)
        form = ExpertForm.of(packed)
        if form != self.forms[layer]:
            raise TensorError(
                f"expert {name}", expected=f"as the layer's first: {self.forms[layer]}", found=form
            )
        self._kernels.place_expert(self._layouts[layer], arena, slot, packed)
        return sum(
            part.nbytes
            for weight in (packed.gate, packed.up, packed.down)
            for part in (weight.packed, weight.scale)
        )

    def close(self) -> None:
        """No thread may be reading."""
        for file in self._files.values():
            file.close()
        self._checkpoint.close()

    def _read_whole(
        self, layer: int, name: str, found: ExpertRanges, arena: SlotArena, slot: int
    ) -> int:
        whole = found.whole
        assert whole is not None
        buffer = self._buffer(page_range(whole.offset, whole.nbytes)[1])
        data = self._file(whole.path).read_range(whole.offset, whole.nbytes, buffer)
        if found.checksum is not None and crc32c(data) != found.checksum:
            raise CheckpointError(
                f"{whole.path}: expert {name}",
                expected=f"bytes with the checksum {found.checksum:08x}",
                found=f"{crc32c(data):08x}",
                fix="The file was damaged or changed; download or quantize the model again.",
            )
        values = np.frombuffer(data, dtype=np.uint8)
        start = values.ctypes.data - whole.offset
        for matrix in found.matrices:
            begin = matrix.scale.offset - whole.offset
            scales = values[begin : begin + matrix.scale.nbytes]
            if not _are_finite(scales, matrix.layout.scale.dtype):
                raise NumericsError(
                    f"tensor {matrix.layout.scale.name}",
                    expected="finite scales",
                    found="NaN or Inf",
                    fix="The file is damaged; download or quantize the model again.",
                )
        held = self.forms[layer].schemes
        if any(m.layout.scheme != scheme for m, scheme in zip(found.matrices, held, strict=True)):
            packed = PackedExpert(
                *(
                    _held_in(scheme, matrix, values, whole.offset)
                    for matrix, scheme in zip(found.matrices, held, strict=True)
                )
            )
            self._kernels.place_expert(self._layouts[layer], arena, slot, packed)
            return whole.nbytes
        addresses = [(start + m.packed.offset, start + m.scale.offset, 0) for m in found.matrices]
        self._kernels.place_expert_at(self._layouts[layer], arena, slot, addresses)
        return whole.nbytes

    def _buffer(self, nbytes: int) -> memoryview:
        """Of this thread, on a page."""
        buffer: memoryview | None = getattr(self._buffers, "own", None)
        if buffer is None or len(buffer) < nbytes:
            memory = np.empty(nbytes + PAGE, dtype=np.uint8)
            first = -memory.ctypes.data % PAGE
            buffer = memory[first : first + nbytes].data
            self._buffers.own = buffer
        return buffer

    def _file(self, path: Path) -> DirectFile:
        with self._opening:
            if path not in self._files:
                self._files[path] = DirectFile(path)
            return self._files[path]

    def _packed(self, name: str) -> PackedExpert:
        gate, up, down = (self._reader.read(f"{name}.{part}") for part in (GATE, UP, DOWN))
        if gate is None or up is None or down is None:
            raise TensorError(f"tensor {name}.{GATE}.weight_packed is missing")
        sizes = (gate.out_features, gate.in_features)
        shapes = ((up.out_features, up.in_features), (down.in_features, down.out_features))
        if shapes != (sizes, sizes):
            raise TensorError(
                f"expert {name}: sizes of gate, up and transposed down",
                expected=f"{list(sizes)} each",
                found=" and ".join(str(list(shape)) for shape in shapes),
            )
        return PackedExpert(gate, up, down)


def _ranges(
    checkpoint: Checkpoint,
    names: Sequence[str],
    form: ExpertForm,
    numbers_of_bits: Collection[int],
) -> list[ExpertRanges] | None:
    """Where a layer's experts lie; None where their checkpoint is not made of files that can be
    read so."""
    if not isinstance(checkpoint, HuggingFaceDirectory):
        return None
    prefix = names[0].rpartition(".")[0]
    found = ExpertLocator(checkpoint).locate(
        prefix, range(len(names)), inner_size=form.inner, hidden_size=form.hidden
    )
    for name, ranges in zip(names, found, strict=True):
        layouts = [matrix.layout for matrix in ranges.matrices]
        stored = [
            (layout.scheme.held_in(numbers_of_bits), DTYPES[layout.scale.dtype])
            for layout in layouts
        ]
        alike = list(zip(form.schemes, form.scale_dtypes, strict=True))
        if stored != alike:
            raise TensorError(
                f"expert {name}", expected=f"as the layer's first: {alike}", found=stored
            )
    return found


def _is_one_read(ranges: ExpertRanges) -> bool:
    """A scale a row is repeated for its groups, which is done matrix by matrix."""
    by_row = any(matrix.layout.by_row for matrix in ranges.matrices)
    return ranges.whole is not None and not by_row


def _held_in(held: QuantScheme, matrix: MatrixRanges, values: Array, begin: int) -> PackedWeight:
    """values: uint8, the file's from `begin` on."""
    layout = matrix.layout
    rows, columns = layout.out_features, layout.in_features

    def part(found: FileRange, dtype: torch.dtype) -> Tensor:
        start = found.offset - begin
        return torch.from_numpy(values[start : start + found.nbytes]).view(dtype).view(rows, -1)

    packed = widened(part(matrix.packed, torch.int32), layout.scheme, held)
    scale = part(matrix.scale, DTYPES[layout.scale.dtype])
    return PackedWeight(packed, scale, None, held, rows, columns)


def _are_finite(data: Array, dtype: str) -> bool:
    """By the exponents' bits, in a tenth of the time of torch's, whose threads would take the cores
    of those that compute."""
    exponent = _EXPONENTS[DTYPES[dtype]]
    return bool((data.view(exponent.dtype) & exponent).max() != exponent)
