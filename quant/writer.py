"""Writes the planned safetensors files, tensor by tensor, each at its offset."""

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from localr1.kernels.checksum import crc32c, crc32c_joined
from localr1.quant.atomic import AtomicDirectory, write_all
from localr1.quant.layout import Shard, TensorSpec

WRITE_CHUNK = 64 << 20
"""Bytes given to one system call."""

DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class FileRecord:
    name: str
    nbytes: int
    sha256: str


class ShardWriter:
    """Puts tensors, in any order, into the files of a plan. Holds one file open at a time."""

    def __init__(self, directory: AtomicDirectory, shards: Sequence[Shard]) -> None:
        self._directory = directory
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._spec_of = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._missing = set(self._spec_of)
        self._checksums = dict.fromkeys(
            (tensor.name for shard in shards for parts in shard.experts for tensor in parts), 0
        )
        self._shards = list(shards)
        self._current: Shard | None = None
        self._file: BinaryIO | None = None

    def put(self, name: str, value: Tensor) -> None:
        """Write one planned tensor. The tensors of a file must come before those of the next."""
        spec, shard = self._spec_of[name], self._shard_of[name]
        assert name in self._missing, f"{name} is written twice"
        assert value.dtype == DTYPES[spec.dtype], f"{name}: {value.dtype}, planned {spec.dtype}"
        assert tuple(value.shape) == spec.shape, (
            f"{name}: {tuple(value.shape)} planned {spec.shape}"
        )
        data = value.contiguous().view(torch.uint8).reshape(-1).numpy().data
        if name in self._checksums:
            self._checksums[name] = crc32c(data)
        with self._directory.errors():
            file = self._open(shard)
            file.seek(shard.offsets[name])
            for start in range(0, len(data), WRITE_CHUNK):
                write_all(file, data[start : start + WRITE_CHUNK])
        self._missing.remove(name)

    def finish(self, progress: Callable[[int], None] | None = None) -> list[FileRecord]:
        """Make all files durable and read them back for their hashes.

        progress: called with bytes read. Raises OutputError when a file cannot be written or read.
        """
        assert not self._missing, f"not written: {sorted(self._missing)[:3]}"
        self._close()
        with self._directory.errors():
            return [
                hash_file(self._directory.resolve(shard.file_name), progress)
                for shard in self._shards
            ]

    def expert_checksums(self) -> dict[str, list[int]]:
        """Name of an expert shard -> the CRC-32C of each expert's range of bytes, by number. Of all
        that was put: a part's is taken from the bytes as they are written, whichever comes first,
        and the range's from those of its parts."""
        assert not self._missing
        return {
            shard.file_name: [self._joined(parts) for parts in shard.experts]
            for shard in self._shards
            if shard.experts
        }

    def _joined(self, parts: Sequence[TensorSpec]) -> int:
        value = 0
        for part in parts:
            value = crc32c_joined(value, self._checksums[part.name], part.nbytes)
        return value

    def _open(self, shard: Shard) -> BinaryIO:
        if self._file is None or shard is not self._current:
            self._close()
            self._file = self._directory.create(shard.file_name)
            self._current = shard
            write_all(self._file, memoryview(shard.header))
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            self._directory.close(file)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:  # Left in the middle of a file: it is of no use to anyone.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> FileRecord:
    """The name, size and SHA-256 of a file."""
    digest = hashlib.sha256()
    size = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
            if progress is not None:
                progress(len(block))
    return FileRecord(path.name, size, digest.hexdigest())
