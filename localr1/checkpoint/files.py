"""Reading a file by position. Never a memory map: a file cut while open must be an error, not
SIGBUS."""

import os
import stat
import threading
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from localr1.checkpoint.paths import check_regular
from localr1.errors import CheckpointError, FormatError, MemoryLimitError, TruncatedError

if TYPE_CHECKING:
    from torch import Tensor

READ_CHUNK = 1 << 30
"""Bytes asked of one system call: below the 2 GiB that some systems take at most."""

OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_NONBLOCK", 0)  # Should a pipe take the file's place, opening it must not hang.
)


class RandomAccessFile:
    """A regular file, open for reading at any offset, from any thread.

    size: bytes when it was opened. Raises NotFoundError, FormatError (not a regular file),
    CheckpointError (not readable).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path, str(path))
        try:
            descriptor = os.open(path, OPEN_FLAGS)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be opened", found=error.strerror) from error
        self._file = FileIO(descriptor, "rb", closefd=True)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self._file.close()
            raise FormatError(f"{path}", expected="a regular file")
        self.size = status.st_size
        self._lock = threading.Lock()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` (contiguous bytes) from `offset`. Raises TruncatedError when the file
        ends."""
        done = 0
        while done < len(buffer):
            part = buffer[done : done + READ_CHUNK]
            try:
                count = self._read_once(offset + done, part)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot be read", found=error.strerror
                ) from error
            if count == 0:
                raise TruncatedError(
                    f"{self.path}: the file ends early",
                    expected=f"{offset + len(buffer):,} bytes",
                    found=f"{offset + done:,}",
                    fix="Download or copy it again.",
                )
            done += count

    def _read_once(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [buffer], offset)
        with self._lock:  # Windows: one file position, so one reader at a time.
            self._file.seek(offset)
            return self._file.readinto(buffer) or 0

    def read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_tensor(self, offset: int, length: int) -> "Tensor":
        """`length` bytes as uint8 [length] in fresh memory, aligned for every dtype."""
        import torch  # Here, as who reads only JSON and headers should not wait for it.

        try:
            data = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:  # How torch reports that the allocator refused.
            raise MemoryLimitError(
                f"{self.path}: no memory for a tensor of {length:,} bytes",
                fix="Close other programs, or use a machine with more memory.",
            ) from error
        if length:
            self.read_into(offset, data.numpy().data)
        return data

    def close(self) -> None:
        self._file.close()


def read_bounded(path: Path, shown: str, max_bytes: int) -> bytes:
    """The whole of a small file. Raises FormatError when it is larger than `max_bytes`."""
    file = RandomAccessFile(path)
    try:
        if file.size > max_bytes:
            raise FormatError(
                f"{shown}: too large",
                expected=f"at most {max_bytes:,} bytes",
                found=f"{file.size:,}",
            )
        return file.read(0, file.size)
    finally:
        file.close()


def read_text(path: Path, shown: str, max_bytes: int) -> str:
    """A small UTF-8 file. Raises FormatError for anything that is not UTF-8."""
    return decode_utf8(read_bounded(path, shown, max_bytes), shown)


def decode_utf8(data: bytes, shown: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{shown}: is not UTF-8", found=f"the byte {data[error.start]:#04x} at {error.start:,}"
        ) from error
