"""Where the routed experts of a checkpoint lie in its files, for a reader that fetches one by one.

Everything is checked here but the bytes themselves: that each matrix is packed, with all its parts
in the right dtypes and shapes. Of the tensors only the 16 bytes of each weight_shape are read.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from localr1.checkpoint.hf_directory import HuggingFaceDirectory
from localr1.checkpoint.index import FileRange
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.packed import PackedLayout, PackedReader
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError, TensorError

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class MatrixRanges:
    """One packed matrix. layout: its sizes, scheme, and the dtypes of its parts. zero_point: None
    when symmetric."""

    layout: PackedLayout
    packed: FileRange
    scale: FileRange
    zero_point: FileRange | None


@dataclass(frozen=True)
class ExpertRanges:
    """One expert. gate, up: [inner, hidden]; down: [hidden, inner].

    whole: the one range that holds exactly packed gate, up, down, then the scales of gate, up,
    down, as `localr1 quantize` lays them out; None where the parts lie otherwise, or have zero
    points. checksum: CRC-32C of that range as localr1.json records it; None where it does not.
    """

    gate: MatrixRanges
    up: MatrixRanges
    down: MatrixRanges
    whole: FileRange | None
    checksum: int | None

    @property
    def matrices(self) -> tuple[MatrixRanges, MatrixRanges, MatrixRanges]:
        return self.gate, self.up, self.down

    @property
    def nbytes(self) -> int:
        """Of all its parts together."""
        return sum(part.nbytes for part in self.parts())

    def parts(self) -> Iterator[FileRange]:
        """Packed gate, up, down; their scales; their zero points."""
        yield from (matrix.packed for matrix in self.matrices)
        yield from (matrix.scale for matrix in self.matrices)
        yield from (m.zero_point for m in self.matrices if m.zero_point is not None)


class ExpertLocator:
    """The experts of one open checkpoint, whose quantization_config and localr1.json are read once.

    Raises FormatError, ConfigError and UnsupportedError for either when it is malformed or not
    honoured.
    """

    def __init__(self, checkpoint: HuggingFaceDirectory) -> None:
        self._checkpoint = checkpoint
        self._packed = PackedReader(checkpoint)
        self._checksums = checkpoint.expert_checksums()

    def locate(
        self, prefix: str, numbers: Sequence[int], *, inner_size: int, hidden_size: int
    ) -> list[ExpertRanges]:
        """Experts `numbers` of the module `prefix` ("model.layers.3.mlp.experts").

        Raises TensorError for a matrix that is not there, not packed or not of these sizes, and
        for parts that are missing or do not fit; UnsupportedError for parts that are not honoured;
        FormatError when localr1.json knows the file but not the expert.
        """
        return [self._expert(prefix, number, inner_size, hidden_size) for number in numbers]

    def _expert(self, prefix: str, number: int, inner: int, hidden: int) -> ExpertRanges:
        name = f"{prefix}.{number}"
        gate = self._matrix(f"{name}.{GATE}", inner, hidden)
        up = self._matrix(f"{name}.{UP}", inner, hidden)
        down = self._matrix(f"{name}.{DOWN}", hidden, inner)
        scattered = ExpertRanges(gate, up, down, None, None)
        whole = _joined(list(scattered.parts()))
        if whole is None or any(matrix.zero_point for matrix in scattered.matrices):
            return scattered
        return ExpertRanges(gate, up, down, whole, self._checksum(whole, number))

    def _matrix(self, prefix: str, rows: int, columns: int) -> MatrixRanges:
        layout = self._packed.layout(prefix)
        if layout is None:
            raise TensorError(
                f"tensor {prefix}.weight_packed is missing",
                expected=f"a packed matrix {[rows, columns]}",
                found="an unpacked one"
                if f"{prefix}.weight" in self._checkpoint.tensors
                else "no such matrix",
                fix="Quantize the model with `localr1 quantize`, or download it again.",
            )
        found = [layout.out_features, layout.in_features]
        if found != [rows, columns]:
            raise TensorError(
                f"tensor {prefix}.weight_packed",
                expected=f"shape {[rows, columns]}",
                found=f"{found}",
                fix="config.json and the weights do not belong together.",
            )
        location = self._checkpoint.location
        zero_point = layout.zero_point
        return MatrixRanges(
            layout,
            location(layout.packed.name),
            location(layout.scale.name),
            None if zero_point is None else location(zero_point.name),
        )

    def _checksum(self, whole: FileRange, number: int) -> int | None:
        recorded = self._checksums.get(whole.file_name)
        if recorded is None:
            return None
        if number >= len(recorded):
            raise FormatError(
                f"{self._checkpoint.path / MANIFEST_NAME}: checksums of {quoted(whole.file_name)}",
                expected=f"one of expert {number}",
                found=f"{len(recorded)} of them",
                fix="Files of different models may be mixed; download the model again.",
            )
        return recorded[number]


def _joined(parts: Sequence[FileRange]) -> FileRange | None:
    """The range they make when each begins where the one before ends."""
    first = parts[0]
    end = first.offset
    for part in parts:
        if part.path != first.path or part.offset != end:
            return None
        end = part.end
    return FileRange(first.file_name, first.path, first.offset, end - first.offset)
