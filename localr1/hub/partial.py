"""A file that is being downloaded: its bytes so far, and a journal of which they are.

The bytes lie in a sparse file of the final length. The journal beside it holds, after a header that
names the file, one record a block: whether it is there, and its CRC-32C. A record is written after
its block. So a killed process loses the blocks it was receiving and nothing else; after a power
cut, when records may have reached the disk without their blocks, the checksums tell which are
missing. Never imports torch.
"""

import contextlib
import os
import struct
import threading
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Final

from localr1.errors import OutputError
from localr1.kernels.checksum import crc32c

BLOCK: Final = 512 << 10
"""Bytes of a block, what a connection can lose."""

DATA_SUFFIX: Final = ".localr1-partial"
JOURNAL_SUFFIX: Final = ".localr1-blocks"
_HEADER: Final = struct.Struct("<8sQQ64s")  # Magic, bytes of the file and of a block, its etag.
_RECORD: Final = struct.Struct("<II")  # PRESENT, CRC-32C.
_MAGIC: Final = b"localr1\x01"
_PRESENT: Final = 0x4C523031  # A torn or foreign record is not taken for one.


def partial_paths(blob: Path) -> tuple[Path, Path]:
    """The files of the bytes so far and of their journal, for the blob they will become."""
    return blob.with_name(blob.name + DATA_SUFFIX), blob.with_name(blob.name + JOURNAL_SUFFIX)


def done_bytes(data: Path) -> int:
    """How much of a partial file its journal says is there; 0 where it has none or another's."""
    blob = data.with_name(data.name.removesuffix(DATA_SUFFIX))
    try:
        journal = partial_paths(blob)[1].read_bytes()
        size = data.stat().st_size
    except OSError:
        return 0
    blocks = _read_journal(journal, size, blob.name)
    return sum(_block_length(size, index) for index, crc in enumerate(blocks) if crc is not None)


def _block_length(size: int, index: int) -> int:
    return min(BLOCK, size - index * BLOCK)


def _read_journal(journal: bytes, size: int, etag: str) -> list[int | None]:
    """CRC-32C of each block that is there; of none where the journal is another file's."""
    blocks: list[int | None] = [None] * -(-size // BLOCK)
    header = _HEADER.pack(_MAGIC, size, BLOCK, etag.encode())
    if journal[: _HEADER.size] != header:
        return blocks
    whole = (len(journal) - _HEADER.size) // _RECORD.size
    records = _RECORD.iter_unpack(journal[_HEADER.size :][: whole * _RECORD.size])
    for index, (mark, crc) in zip(range(len(blocks)), records, strict=False):
        if mark == _PRESENT:
            blocks[index] = crc
    return blocks


class PartialFile:
    """The blob's bytes so far. `write` may be called from several threads, each for blocks of its
    own, beside one that calls the rest.

    Raises OutputError, from every method, for what the disk refuses.
    """

    def __init__(self, blob: Path, size: int) -> None:
        """blob: where the finished file will lie, named by its etag. size: its bytes."""
        self.blob, self.size = blob, size
        self.data_path, self.journal_path = partial_paths(blob)
        self._lock = threading.Lock()
        with self._disk_errors():
            blob.parent.mkdir(parents=True, exist_ok=True)
            self._crc = self._resume()
            self._data = _open(self.data_path)
            self._journal = _open(self.journal_path)
            self._reader = _open(self.data_path)
            self._data.truncate(size)
            if not any(crc is not None for crc in self._crc):
                self._begin_journal()
        self.resumed = frozenset(i for i, crc in enumerate(self._crc) if crc is not None)
        """Blocks an earlier process left: to be checked before they are trusted."""
        self.done_bytes = sum(map(self.length, self.resumed))
        """Bytes that are there."""

    @property
    def num_blocks(self) -> int:
        return len(self._crc)

    def has(self, index: int) -> bool:
        return self._crc[index] is not None

    def length(self, index: int) -> int:
        """Bytes of a block; the last may be shorter."""
        return _block_length(self.size, index)

    def write(self, index: int, block: memoryview) -> None:
        """All bytes of one block."""
        assert len(block) == self.length(index)
        crc = crc32c(block)
        with self._disk_errors(), self._lock:
            _write_at(self._data, index * BLOCK, block)
            self._record(index, _PRESENT, crc)
            self._crc[index] = crc
            self.done_bytes += len(block)

    def read(self, index: int, buffer: memoryview) -> memoryview:
        """A block's bytes, in the beginning of `buffer`."""
        block = buffer[: self.length(index)]
        with self._disk_errors():
            self._reader.seek(index * BLOCK)
            filled = 0
            while filled < len(block) and (count := self._reader.readinto(block[filled:])):
                filled += count
        return block[:filled]

    def is_intact(self, index: int, block: memoryview) -> bool:
        """Whether a block that was read is the one that was written."""
        return len(block) == self.length(index) and crc32c(block) == self._crc[index]

    def forget(self, index: int) -> None:
        """The block is not there after all."""
        with self._disk_errors(), self._lock:
            self._record(index, 0, 0)
            self._crc[index] = None
            self.done_bytes -= self.length(index)

    def forget_all(self) -> None:
        with self._disk_errors(), self._lock:
            self._begin_journal()
            self._crc = [None] * self.num_blocks
            self.done_bytes = 0
        self.resumed = frozenset()

    def finish(self) -> None:
        """Makes the bytes durable and gives them the blob's name. The journal goes last, so that
        at no point bytes lie there that nobody knows."""
        assert all(crc is not None for crc in self._crc)
        with self._disk_errors():
            os.fsync(self._data.fileno())
            self.close()
            os.replace(self.data_path, self.blob)
            self.journal_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes what was fetched."""
        self.close()
        with self._disk_errors():
            self.data_path.unlink(missing_ok=True)
            self.journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """What was fetched stays for the next time."""
        for file in (self._data, self._journal, self._reader):
            file.close()

    def _resume(self) -> list[int | None]:
        try:
            journal = self.journal_path.read_bytes()
            found = self.data_path.stat().st_size
        except FileNotFoundError:
            return [None] * -(-self.size // BLOCK)
        # A file cut since then has lost its last blocks; the checksums find which.
        return _read_journal(journal if found else b"", self.size, self.blob.name)

    def _begin_journal(self) -> None:
        self._journal.truncate(0)
        header = _HEADER.pack(_MAGIC, self.size, BLOCK, self.blob.name.encode())
        _write_at(self._journal, 0, memoryview(header))

    def _record(self, index: int, mark: int, crc: int) -> None:
        position = _HEADER.size + index * _RECORD.size
        _write_at(self._journal, position, memoryview(_RECORD.pack(mark, crc)))

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.data_path.parent}: {error.strerror or error}",
                fix="What has been fetched is kept: make room or mend the disk and give the same "
                "command again.",
            ) from error


def _open(path: Path) -> FileIO:
    """For reading and writing at any place, unbuffered; there afterwards, and as it was."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
    return FileIO(os.open(path, flags, 0o666), "r+")


def _write_at(file: FileIO, position: int, data: memoryview) -> None:
    file.seek(position)
    while data:
        data = data[file.write(data) :]
