"""A directory that is there whole or not at all.

Files are written into a hidden directory beside the final one, `.NAME.partial-*`, made durable
(fsync), and only then renamed to the final name. A lock file beside both is held meanwhile: the
operating system lets go of it when the process dies, however that happens, so whoever holds it
knows that every partial directory he finds was left by the dead. He removes it, or goes on with it
where it has a journal (journal.py).

    .NAME.partial-1a2b3c4d/result/      becomes NAME
    .NAME.partial-1a2b3c4d/*            what going on needs; removed with the rest
"""

import contextlib
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from localr1.errors import OutputError, UsageError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


def open_file(path: Path) -> BinaryIO:
    """A file to write to at any place, made if it is not there, kept as it is if it is. Unbuffered:
    an error of the disk is raised by the write it belongs to."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)


class AtomicDirectory:
    """`path`, filled through `open` and made visible by `commit`; use it in a `with`.

    Leaving the block without a commit removes everything that was written, unless `keep` is set.
    Raises OutputError when `path` exists, when another process is writing it, and for every failure
    of the disk. open_file: as `open_file` above; a test passes one that fails.

    resumes: the name of a file beside the result; a partial directory that has one is gone on with,
    and `keep` is set then.
    """

    def __init__(
        self,
        path: Path,
        open_file: Callable[[Path], BinaryIO] = open_file,
        resumes: str | None = None,
    ) -> None:
        self.path = Path(os.path.abspath(path))
        if not self.path.name:
            raise UsageError(f"{path}", expected="the name of a new directory")
        self.keep = False
        self._open_file = open_file
        self._resumes = resumes
        self._partial_prefix = f".{self.path.name}.partial-"
        self._lock_path = self.path.parent / f".{self.path.name}.lock"
        self._lock: int | None = None
        self._partial: Path | None = None

    def check(self, nbytes: int) -> None:
        """Refuse at once what could only fail later. nbytes: what will be written."""
        if os.path.lexists(self.path):
            raise OutputError(
                f"{self.path} exists",
                expected="the name of a new directory",
                fix="Remove it or choose another name.",
            )
        parent = self._existing_parent()
        if not parent.is_dir():
            raise OutputError(f"{parent} is not a directory")
        free = shutil.disk_usage(parent).free
        if free < nbytes:
            raise OutputError(
                f"{self.path}: the disk is too small",
                expected=f"{nbytes:,} bytes free",
                found=f"{free:,}",
                fix="Free some space or choose another disk.",
            )

    @property
    def device(self) -> int:
        """Of the disk it lies on, as os.stat has it."""
        return os.stat(self._existing_parent()).st_dev

    def _existing_parent(self) -> Path:
        parent = self.path.parent
        while not parent.exists():
            parent = parent.parent
        return parent

    def __enter__(self) -> "AtomicDirectory":
        with self.errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _take_lock(self._lock_path)
        if self._lock is None:
            raise OutputError(
                f"{self.path} is being written by another process",
                fix="Wait for it to end, or choose another name.",
            )
        try:
            self.check(0)
            found = self.find()
            with self.errors():
                for entry in self._partials():
                    if entry != found:
                        shutil.rmtree(entry)
                self.keep = found is not None
                # Not tempfile.mkdtemp, which makes a directory that only its owner may read.
                self._partial = found or self.path.parent / (
                    self._partial_prefix + secrets.token_hex(4)
                )
                self.resolve("").mkdir(parents=True, exist_ok=True)
                sync_directory(self.path.parent)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.keep:
            with contextlib.suppress(OSError):
                for entry in self._partials():
                    shutil.rmtree(entry)
        self._partial = None
        if self._lock is not None:
            _release_lock(self._lock, self._lock_path)
            self._lock = None

    def find(self) -> Path | None:
        """The partial directory that would be gone on with."""
        if self._resumes is None or not self.path.parent.is_dir():
            return None
        with self.errors():
            able = [entry for entry in self._partials() if (entry / self._resumes).exists()]
            return able[0] if able else None

    def resolve(self, name: str) -> Path:
        """Where the file `name` lies until the commit."""
        return self.beside("result") / name

    def beside(self, name: str) -> Path:
        """A file or directory that does not become part of the result."""
        assert self._partial is not None
        return self._partial / name

    def empty(self) -> None:
        """Remove all files that were there when it was gone on with."""
        with self.errors():
            for path in [*self.resolve("").iterdir(), *self.beside("").iterdir()]:
                if path.is_file():
                    path.unlink()

    def sync(self) -> None:
        """Make the names of all files durable."""
        with self.errors():
            sync_directory(self.resolve(""))
            sync_directory(self.beside(""))

    def open(self, name: str) -> BinaryIO:
        """A file to write to, new or not; give it to `close`."""
        return self.open_path(self.resolve(name))

    def open_path(self, path: Path) -> BinaryIO:
        """The same of a path that `resolve` or `beside` returned."""
        with self.errors():
            return self._open_file(path)

    def close(self, file: BinaryIO) -> None:
        """Make a file durable and close it."""
        with self.errors():
            try:
                os.fsync(file.fileno())
            finally:
                file.close()

    def write(self, name: str, data: bytes) -> None:
        """A whole new file at once."""
        self.write_path(self.resolve(name), data)

    def write_path(self, path: Path, data: bytes | memoryview) -> None:
        """The same of a path that `resolve` or `beside` returned."""
        file = self.open_path(path)
        try:
            with self.errors():
                write_all(file, memoryview(data))
        except BaseException:
            file.close()
            raise
        self.close(file)

    def commit(self, name: str = "") -> None:
        """name: of the one file that is the result instead of the directory."""
        result = self.resolve(name)
        with self.errors():
            sync_directory(result)
            os.rename(result, self.path)
            try:
                sync_directory(self.path.parent)
            except OSError:
                os.rename(self.path, result)
                raise
            self.keep = False

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turns an OSError into an OutputError that names the directory."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written",
                found=error.strerror or str(error),
                fix="What was done is kept: the same command goes on from there."
                if self.keep
                else "Nothing was left under that name.",
            ) from error

    def damaged(self, name: str) -> OutputError:
        """What to raise for a file whose bytes are not those that were written to it."""
        return OutputError(
            f"{self.path}: {name} read back",
            expected="what was written to it",
            found="other bytes",
            fix="The disk is failing, or another program wrote there. Begin anew with --restart, "
            "better on another disk.",
        )

    def _partials(self) -> list[Path]:
        return sorted(
            entry
            for entry in self.path.parent.iterdir()
            if entry.name.startswith(self._partial_prefix)
        )


def write_all(file: BinaryIO, data: memoryview) -> None:
    """An unbuffered file may take less than it was given; write until all is taken."""
    while len(data):
        data = data[file.write(data) :]


def _take_lock(path: Path) -> int | None:
    """A descriptor that holds the lock, or None while another process holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if sys.platform == "win32":
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # What POSIX and Windows call "held by another".
            os.close(descriptor)
            return None
        except OSError:
            os.close(descriptor)
            raise
        # The one who held it may have removed the file between our open and our lock.
        try:
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def _release_lock(descriptor: int, path: Path) -> None:
    if sys.platform == "win32":
        os.close(descriptor)  # An open file cannot be removed; another may hold it by now.
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        with contextlib.suppress(OSError):  # An empty file is in nobody's way.
            path.unlink()
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Windows has no such call: its file systems journal."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
