"""What a model had read of a conversation, in a safetensors file: the token ids, the keys and
values (or latents) of every layer, and which experts were hot. Who takes it up again goes on with
the same bits as if he had stayed.

    ids         I32 [n]
    layer.I.J   tensor J of layer I, as the cache has it, its first n positions
    experts.*   experts/hot_set.py
    checksums   I64: of the header (60 bits of its SHA-256), then CRC-32C of each tensor before it,
                in the order of the file

The metadata says what the values belong to; they are refused where any of it differs.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from localr1.checkpoint.safetensors_file import DTYPES, SafetensorsFile
from localr1.engine.sequence import CachedSequence
from localr1.errors import FormatError, LocalR1Error
from localr1.experts.hot_set import HotSet
from localr1.kernels.checksum import crc32c
from localr1.sessions.private_file import write_private

FORMAT: Final = "localr1-session-1"
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
FIX: Final = "The conversation itself is kept, and is read anew."


@dataclass(frozen=True)
class Origin:
    """What cached values belong to. model: its fingerprint. cache: its form. arithmetic: the
    kernels that computed them: others give other last bits."""

    model: str
    cache: str
    arithmetic: str

    def metadata(self) -> dict[str, str]:
        return {
            "format": FORMAT,
            "model": self.model,
            "cache": self.cache,
            "arithmetic": self.arithmetic,
        }


DIFFERENCES: Final = {
    "format": "it was written by another version of localr1",
    "model": "the model, its revision or its quantization is another",
    "cache": "the cache is of another kind or precision",
    "arithmetic": "it was computed by other kernels",
}


def difference(found: Mapping[str, str], origin: Origin) -> str | None:
    """Why values of `found` are none of `origin`'s; None where they are."""
    for name, value in origin.metadata().items():
        if found.get(name) != value:
            return DIFFERENCES[name]
    return None


def write_snapshot(path: Path, sequence: CachedSequence, origin: Origin, hot: HotSet | None) -> int:
    """Write what `sequence` has read; returns the bytes of the file. Raises OutputError."""
    tensors = dict(_tensors(sequence, hot))
    sums = torch.zeros(1 + len(tensors), dtype=torch.int64)
    header = _header({**tensors, "checksums": sums}, origin)
    sums[0] = _header_sum(hashlib.sha256(header).hexdigest())

    def pieces() -> Iterator[bytes | memoryview]:
        yield header
        for place, tensor in enumerate(tensors.values(), start=1):
            data = _bytes(tensor)
            sums[place] = crc32c(data)
            yield data
        yield _bytes(sums)  # Last, as only now they are known.

    write_private(path, pieces())
    return len(header) + sum(each.nbytes for each in (*tensors.values(), sums))


def snapshot_bytes(sequence: CachedSequence) -> int:
    """About how large a snapshot would be."""
    return sequence.cache.position_bytes * len(sequence.ids)


def read_snapshot(path: Path, sequence: CachedSequence, origin: Origin) -> HotSet | str:
    """Make `sequence` have read what it had read then; returns which experts were hot. A str says
    why it was refused: it belongs to something else. `sequence` has read nothing then, and
    neither has it after an error.

    Raises NotFoundError, and FormatError, TruncatedError and the like for damage.
    """
    sequence.reuse([])
    file = SafetensorsFile(path)
    try:
        if (reason := difference(file.metadata, origin)) is not None:
            return reason
        sums = file.read("checksums")
        names = [name for name in file.tensors if name != "checksums"]
        if sums.dtype != torch.int64 or sums.shape != (1 + len(names),):
            raise FormatError(
                f"{path}: checksums", expected=f"{1 + len(names)}", found=list(sums.shape), fix=FIX
            )
        header_sum, *tensor_sums = sums.tolist()
        if header_sum != _header_sum(file.header_sha256):
            raise _damaged(path, "header")
        read = _Checked(file, dict(zip(names, tensor_sums, strict=True)))
        ids = read("ids")
        if ids.dtype != torch.int32 or ids.dim() != 1:
            raise FormatError(f"{path}: ids", expected="I32 [n]", found=list(ids.shape), fix=FIX)
        if len(ids) > sequence.cache.limit:
            return "it is longer than the context"
        hot = HotSet.read(read)
        _fill(sequence, ids.tolist(), read)
        return hot
    finally:
        file.close()


def read_hot_set(path: Path, model: str) -> HotSet | None:
    """Which experts were hot, before the model is loaded whose fingerprint is `model`. None where
    it is another's, damaged, or not there: `read_snapshot` says so then."""
    try:
        file = SafetensorsFile(path)
        try:
            if file.metadata.get("model") != model:
                return None
            return HotSet.read(_Unchecked(file))
        finally:
            file.close()
    except LocalR1Error:
        return None


@dataclass(frozen=True)
class _Unchecked:
    """Reads what moves experts but changes no result."""

    file: SafetensorsFile

    def __call__(self, name: str) -> Tensor:
        return self.file.read(name)

    def __contains__(self, name: str) -> bool:
        return name in self.file.tensors


@dataclass(frozen=True)
class _Checked:
    """Reads tensors of a file and holds them to their checksums."""

    file: SafetensorsFile
    sums: Mapping[str, int]

    def __call__(self, name: str) -> Tensor:
        tensor = self.file.read(name)
        if crc32c(_bytes(tensor)) != self.sums[name]:
            raise _damaged(self.file.path, f"tensor {name}")
        return tensor

    def __contains__(self, name: str) -> bool:
        return name in self.sums


def _damaged(path: Path, what: str) -> FormatError:
    return FormatError(
        f"{path}: {what}", expected="the bytes that were written", found="others", fix=FIX
    )


def _header_sum(sha256: str) -> int:
    """15 of its digits: as many as a signed number of 64 bits holds."""
    return int(sha256[:15], 16)


def _fill(sequence: CachedSequence, ids: list[int], read: _Checked) -> None:
    cache = sequence.cache
    cache.reserve(len(ids))
    for layer in range(cache.num_layers):
        for part, room in enumerate(cache.tensors(layer)):
            stored = read(f"layer.{layer}.{part}")
            target = room[..., : len(ids), :]
            if stored.dtype != target.dtype or stored.shape != target.shape:
                raise FormatError(
                    f"{read.file.path}: tensor layer.{layer}.{part}",
                    expected=f"{target.dtype} {list(target.shape)}",
                    found=f"{stored.dtype} {list(stored.shape)}",
                    fix=FIX,
                )
            target.copy_(stored)
    cache.advance(len(ids))
    sequence.ids.extend(ids)


def _tensors(sequence: CachedSequence, hot: HotSet | None) -> Iterator[tuple[str, Tensor]]:
    length = len(sequence.ids)
    yield "ids", torch.tensor(sequence.ids, dtype=torch.int32)
    for layer in range(sequence.cache.num_layers):
        for part, tensor in enumerate(sequence.cache.tensors(layer)):
            yield f"layer.{layer}.{part}", tensor[..., :length, :]
    if hot is not None:
        yield from hot.tensors()


def _header(tensors: Mapping[str, Tensor], origin: Origin) -> bytes:
    entries: dict[str, object] = {"__metadata__": origin.metadata()}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    document = json.dumps(entries).encode("ascii")
    document += b" " * (-len(document) % 8)  # Tensors start aligned, as the format asks.
    return len(document).to_bytes(8, "little") + document


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data
