"""Reading ranges of a large file past the system's page cache, into memory of the caller's own.

Weights that are fetched while a model runs are kept by whoever fetches them; a second copy in the
page cache would push out the first. Linux reads so with O_DIRECT (open(2)), which wants offset,
length and address in whole pages: ranges are rounded outward. Where the file system refuses, and
on other systems, reads are plain.
"""

import contextlib
import errno
import os
import stat
import sys
import threading
from io import FileIO
from pathlib import Path

import numpy as np

from localr1.checkpoint.files import OPEN_FLAGS, READ_CHUNK
from localr1.checkpoint.paths import check_regular
from localr1.errors import CheckpointError, FormatError, TruncatedError

if sys.platform != "win32":
    import fcntl

PAGE = 4096
"""What every block device's sector size divides, and the least page of memory."""


def page_range(offset: int, length: int) -> tuple[int, int]:
    """(offset, length) of the whole pages around a range."""
    start = offset // PAGE * PAGE
    return start, -(-(offset + length) // PAGE) * PAGE - start


class DirectFile:
    """A regular file, open for reading from any thread, that must stay as it is while it is open.
    Should another take its place under its name, the one that was opened is read on.

    size: bytes when it was opened. is_direct: whether reads pass the page cache by.
    Raises NotFoundError, FormatError (not a regular file), CheckpointError (not readable).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._handles = threading.local()
        self._opened: list[FileIO] = []
        self._identity: tuple[int, ...] | None = None
        self.is_direct = False
        check_regular(path, str(path))
        self._shared = self._open_shared() if hasattr(os, "preadv") else self._handle()
        try:
            status = os.fstat(self._shared.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path}", expected="a regular file")
        except BaseException:
            self.close()
            raise
        self.size = status.st_size
        self._identity = _identity(status)

    def read_range(self, offset: int, length: int, buffer: memoryview) -> memoryview:
        """The part of `buffer` that holds the `length` bytes from `offset`, which were read into
        it. buffer: writable bytes that begin on a page, at least those of `page_range`.

        Raises TruncatedError when the file ends early, CheckpointError when it cannot be read or
        has changed since it was opened.
        """
        end = offset + length
        start, room = page_range(offset, length)
        _check_buffer(buffer, room)
        if end > self.size:
            raise self._truncated(end, self.size)
        try:
            self._fill(start, end, buffer[:room])
            self._check_unchanged(end)
        except OSError as error:
            raise CheckpointError(
                f"{self.path}: cannot be read at byte {offset:,}", found=error.strerror
            ) from error
        return buffer[offset - start : end - start]

    def close(self) -> None:
        """No thread may be reading."""
        with self._lock:
            for handle in self._opened:
                handle.close()

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _fill(self, start: int, end: int, buffer: memoryview) -> None:
        done = 0  # Whole pages, since a direct read cannot go on in the middle of one.
        while start + done < end:
            count = self._read_once(start + done, buffer[done : done + READ_CHUNK])
            if start + done + count >= end:
                return
            if count < PAGE:
                found = os.fstat(self._shared.fileno()).st_size
                if found < end:
                    raise self._truncated(end, found)
                raise OSError(errno.EIO, "the system reads less than a page at a time")
            done += count // PAGE * PAGE

    def _read_once(self, offset: int, buffer: memoryview) -> int:
        if hasattr(os, "preadv"):
            was_direct = self.is_direct  # Before the call: another thread may change it meanwhile.
            try:
                return os.preadv(self._shared.fileno(), [buffer], offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not was_direct:
                    raise
            # Some file systems take the flag and refuse the read.
            self._read_through_cache()
            return os.preadv(self._shared.fileno(), [buffer], offset)
        handle = self._handle()
        handle.seek(offset)
        return handle.readinto(buffer) or 0

    def _open_shared(self) -> FileIO:
        direct = getattr(os, "O_DIRECT", 0)
        if direct:
            with contextlib.suppress(CheckpointError):
                handle = self._open(OPEN_FLAGS | direct)
                self.is_direct = True
                return handle
        return self._open(OPEN_FLAGS)

    def _handle(self) -> FileIO:
        """Windows: a handle has one position, so every thread has a handle."""
        handle: FileIO | None = getattr(self._handles, "own", None)
        if handle is None:
            handle = self._open(OPEN_FLAGS)
            if self._identity not in (None, _identity(os.fstat(handle.fileno()))):
                raise self._changed()
            self._handles.own = handle
        return handle

    def _open(self, flags: int) -> FileIO:
        try:
            handle = FileIO(os.open(self.path, flags), "rb", closefd=True)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened", found=error.strerror) from error
        with self._lock:
            self._opened.append(handle)
        return handle

    def _read_through_cache(self) -> None:
        if sys.platform != "win32":
            descriptor = self._shared.fileno()
            with self._lock:
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
                fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))
                self.is_direct = False

    def _check_unchanged(self, end: int) -> None:
        """After a read, so that a change in the middle of it is seen too."""
        status = os.fstat(self._shared.fileno())
        if status.st_size < end:
            raise self._truncated(end, status.st_size)
        if _identity(status) != self._identity:
            raise self._changed()

    def _changed(self) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: the file was changed while it was open",
            expected="the size and time of modification it was opened with",
            found="others",
            fix="Start again, and leave the model's files alone while it runs.",
        )

    def _truncated(self, end: int, found: int) -> TruncatedError:
        return TruncatedError(
            f"{self.path}: the file ends early",
            expected=f"{end:,} bytes",
            found=f"{found:,}",
            fix="Download or copy it again.",
        )


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_buffer(buffer: memoryview, room: int) -> None:
    """Our own mistakes only: no file decides where a buffer lies."""
    assert not buffer.readonly
    assert buffer.itemsize == 1
    assert len(buffer) >= room, f"a buffer of {len(buffer)} bytes for pages of {room}"
    assert np.frombuffer(buffer, dtype=np.uint8).ctypes.data % PAGE == 0, "not on a page"
