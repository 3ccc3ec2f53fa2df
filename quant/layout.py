"""Where every byte of the output lies, known before the first weight is read.

A safetensors file is an 8-byte little-endian header length, a JSON header, and the data without
holes. The header is padded with spaces, which the format allows, so that the data starts on a
4096-byte boundary. Pure Python: never imports torch.

The routed experts of a layer have a file of their own, an expert shard: one after another from the
data's first byte on, each one contiguous range of bytes, so that an expert is one read. Where its
size is a multiple of 4096, each begins on a page.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

DATA_ALIGNMENT = 4096
SHARD_BYTES = 4 << 30
"""The most bytes of data in one file, unless one matrix alone is larger."""

BYTES_OF = {"I64": 8, "I32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype: safetensors' name, one of BYTES_OF."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BYTES_OF[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file. header: its first bytes, length field and padding included. offsets: name -> first
    byte of a tensor in the file. tensors: in the order of their data. experts: of an expert shard
    the tensors of each expert's range, in that order too."""

    file_name: str
    header: bytes
    tensors: tuple[TensorSpec, ...]
    offsets: dict[str, int]
    experts: tuple[tuple[TensorSpec, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def plan_shards(units: Sequence[Sequence[TensorSpec]], limit: int = SHARD_BYTES) -> list[Shard]:
    """Files `dense-00001-of-00002.safetensors`, ... holding the units in order, none split."""
    files: list[list[TensorSpec]] = []
    size = 0
    for unit in units:
        nbytes = sum(tensor.nbytes for tensor in unit)
        if not files or size + nbytes > limit:
            files.append([])
            size = 0
        files[-1].extend(unit)
        size += nbytes
    # Readers view the bytes in place, so each tensor must start on a multiple of its item size:
    # 8-byte items first, and what is no multiple of 4 bytes (an odd number of scales) last.
    return [
        plan_file(
            f"dense-{number:05d}-of-{len(files):05d}.safetensors",
            sorted(tensors, key=lambda tensor: (tensor.dtype != "I64", tensor.nbytes % 4 != 0)),
        )
        for number, tensors in enumerate(files, 1)
    ]


def plan_expert_shard(layer: int, experts: Sequence[Sequence[Sequence[TensorSpec]]]) -> Shard:
    """The file `experts-LLL.safetensors`. experts: by number, of each gate, up and down, of each of
    these weight_packed, weight_scale and weight_shape.

    An expert's range holds packed gate, up, down, then the scales of gate, up, down. The small
    weight_shape tensors of all experts lie behind the last expert: before the first they would
    push it off its page, inside they would break the range. All sizes are multiples of 64 bytes,
    as hidden and inner size are multiples of a group, so every tensor is aligned where it lies.
    """
    ranges = tuple(
        (*(packed for packed, _, _ in matrices), *(scale for _, scale, _ in matrices))
        for matrices in experts
    )
    tensors = [tensor for parts in ranges for tensor in parts]
    tensors += [shape for matrices in experts for _, _, shape in matrices]
    return replace(plan_file(f"experts-{layer:03d}.safetensors", tensors), experts=ranges)


def plan_file(
    file_name: str, tensors: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
) -> Shard:
    """One file, its tensors in this order. metadata: of the header, as safetensors takes it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    starts: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        assert tensor.name not in starts, "a plan names each tensor once"
        assert end % BYTES_OF[tensor.dtype] == 0
        starts[tensor.name] = end
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    padded = text.ljust(-(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8)
    header = len(padded).to_bytes(8, "little") + padded
    offsets = {name: len(header) + start for name, start in starts.items()}
    return Shard(file_name, header, tuple(tensors), offsets)


def index_json(shards: Sequence[Shard]) -> dict[str, object]:
    """model.safetensors.index.json: which file holds a tensor, and the bytes of all tensors."""
    return {
        "metadata": {"total_size": sum(t.nbytes for shard in shards for t in shard.tensors)},
        "weight_map": {
            tensor.name: shard.file_name for shard in shards for tensor in shard.tensors
        },
    }
