"""Writes the planned safetensors files, tensor by tensor, each at its offset."""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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

READ_CHUNK = 1 << 20

MAX_OPEN = 8
"""A layer goes into its experts' file and one or two others, so none is closed before its time."""

DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class FileRecord:
    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Settled:
    """checksums: name -> CRC-32C of each tensor that has become durable. files: those that have
    become whole."""

    checksums: Mapping[str, int]
    files: Sequence[FileRecord]


class ShardWriter:
    """Puts tensors, in any order, into the files of a plan; `settle` makes sure of them.

    Holds open the MAX_OPEN files that were last put into, none after `settle`.
    """

    def __init__(self, directory: AtomicDirectory, shards: Sequence[Shard]) -> None:
        self._directory = directory
        self._shards = {shard.file_name: shard for shard in shards}
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self._spec_of = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
        self._missing = {
            shard.file_name: {tensor.name for tensor in shard.tensors} for shard in shards
        }
        self._checksums: dict[str, int] = {}
        self._unsettled: dict[str, list[str]] = {}  # By file, which has at least its header.
        self._begun: set[str] = set()
        self._open: dict[str, BinaryIO] = {}  # The one that was used last at the end.
        self._records: dict[str, FileRecord] = {}

    def put(self, name: str, value: Tensor) -> None:
        """Write one planned tensor."""
        spec, shard = self._spec_of[name], self._shard_of[name]
        assert name in self._missing[shard.file_name], f"{name} is written twice"
        assert value.dtype == DTYPES[spec.dtype], f"{name}: {value.dtype}, planned {spec.dtype}"
        assert tuple(value.shape) == spec.shape, (
            f"{name}: {tuple(value.shape)} planned {spec.shape}"
        )
        data = value.contiguous().view(torch.uint8).reshape(-1).numpy().data
        self._checksums[name] = crc32c(data)
        with self._directory.errors():
            file = self._file(shard)
            file.seek(shard.offsets[name])
            for start in range(0, len(data), WRITE_CHUNK):
                write_all(file, data[start : start + WRITE_CHUNK])
        self._missing[shard.file_name].remove(name)
        self._unsettled[shard.file_name].append(name)

    def settle(self, progress: Callable[[int], None] | None = None) -> Settled:
        """Make durable what was put since the last call, and read it back: whole files for their
        hashes too.

        progress: called with bytes read of whole files. Raises OutputError when a file cannot be
        written or read, and for bytes that are not those that were written.
        """
        while self._open:
            self._close(next(iter(self._open)))
        unsettled, self._unsettled = self._unsettled, {}
        files: list[FileRecord] = []
        with self._directory.errors():
            for file_name, names in unsettled.items():
                if self._missing[file_name]:
                    self.check(file_name, names)
                else:
                    files.append(self.read_back(file_name, progress))
        self._records |= {record.name: record for record in files}
        names_put = [name for names in unsettled.values() for name in names]
        return Settled({name: self._checksums[name] for name in names_put}, files)

    def resume(
        self,
        settled: Iterable[Settled],
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Go on after an interruption, behind what was `settled` before: all of it is read back.
        Files that it says nothing of are removed. Raises as `settle`."""
        for each in settled:
            self._checksums |= each.checksums
            self._records |= {record.name: record for record in each.files}
        put: dict[str, list[str]] = {}
        for name in self._checksums:
            file_name = self._shard_of[name].file_name
            self._missing[file_name].remove(name)
            put.setdefault(file_name, []).append(name)
        self._begun = set(put)
        with self._directory.errors():
            for path in self._directory.resolve("").iterdir():
                if path.name not in self._begun:
                    path.unlink()
            for file_name, names in put.items():
                if self._missing[file_name]:
                    self.check(file_name, names)
                elif self.read_back(file_name, progress) != self._records[file_name]:
                    raise self._directory.damaged(file_name)

    def finish(self, progress: Callable[[int], None] | None = None) -> list[FileRecord]:
        """`settle`, when all is put; returns the records of all files, in the plan's order."""
        missing = [name for names in self._missing.values() for name in names]
        assert not missing, f"not written: {sorted(missing)[:3]}"
        self.settle(progress)
        return [self._records[file_name] for file_name in self._shards]

    def expert_checksums(self) -> dict[str, list[int]]:
        """Name of an expert shard -> the CRC-32C of each expert's range of bytes, by number. Of all
        that was put: a part's is taken from the bytes as they are written, whichever comes first,
        and the range's from those of its parts."""
        return {
            shard.file_name: [self._joined(parts) for parts in shard.experts]
            for shard in self._shards.values()
            if shard.experts
        }

    def check(self, file_name: str, names: Iterable[str]) -> None:
        """Read tensors back. Raises OSError, OutputError as `settle`."""
        shard = self._shards[file_name]
        with open(self._directory.resolve(file_name), "rb", buffering=0) as file:
            for name in sorted(names, key=shard.offsets.__getitem__):
                file.seek(shard.offsets[name])
                self._check_tensor(file, self._spec_of[name], _ignore)

    def read_back(
        self, file_name: str, progress: Callable[[int], None] | None = None
    ) -> FileRecord:
        """Read a whole file back, in the order of its bytes. Raises as `check`."""
        shard = self._shards[file_name]
        digest = hashlib.sha256()

        def take(block: bytes) -> None:
            digest.update(block)
            if progress is not None:
                progress(len(block))

        with open(self._directory.resolve(file_name), "rb", buffering=0) as file:
            header = _read(file, len(shard.header))
            if header != shard.header:
                raise self._directory.damaged(file_name)
            take(header)
            for tensor in shard.tensors:
                self._check_tensor(file, tensor, take)
            if file.read(1):
                raise self._directory.damaged(file_name)
        return FileRecord(file_name, shard.nbytes, digest.hexdigest())

    def _check_tensor(
        self, file: BinaryIO, tensor: TensorSpec, take: Callable[[bytes], None]
    ) -> None:
        """The file stands where the tensor begins."""
        checksum, left = 0, tensor.nbytes
        while left:
            block = _read(file, min(left, READ_CHUNK))
            if not block:
                break
            checksum = crc32c(block, checksum)
            take(block)
            left -= len(block)
        if left or checksum != self._checksums[tensor.name]:
            raise self._directory.damaged(self._shard_of[tensor.name].file_name)

    def _joined(self, parts: Sequence[TensorSpec]) -> int:
        value = 0
        for part in parts:
            value = crc32c_joined(value, self._checksums[part.name], part.nbytes)
        return value

    def _file(self, shard: Shard) -> BinaryIO:
        name = shard.file_name
        file = self._open.pop(name, None)
        if file is None:
            while len(self._open) >= MAX_OPEN:
                self._close(next(iter(self._open)))
            file = self._directory.open(name)
        self._open[name] = file
        self._unsettled.setdefault(name, [])
        if name not in self._begun:
            write_all(file, memoryview(shard.header))
            self._begun.add(name)
        return file

    def _close(self, name: str) -> None:
        self._directory.close(self._open.pop(name))

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._open.values():  # Left in the middle: what they hold is not settled.
            with contextlib.suppress(OSError):
                file.close()
        self._open.clear()


def _ignore(block: bytes) -> None:
    return


def _read(file: BinaryIO, size: int) -> bytes:
    """`size` bytes, fewer only where the file ends."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


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
