"""Reads past the page cache: the same bytes as any other read, and an error for every file that is
no longer what was opened."""

import errno
import mmap
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from localr1.checkpoint import direct_file
from localr1.checkpoint.direct_file import PAGE, DirectFile, page_range
from localr1.errors import CheckpointError, FormatError, NotFoundError, TruncatedError

SIZE = 5 * PAGE + 123
DATA = os.urandom(SIZE)
RANGES = [
    (0, 1), (0, PAGE), (1, PAGE), (PAGE - 1, 2), (PAGE, PAGE), (100, 3 * PAGE), (0, SIZE),
    (SIZE - 1, 1), (5 * PAGE, 123), (5 * PAGE + 100, 23), (3 * PAGE + 7, SIZE - 3 * PAGE - 7),
]  # fmt: skip
HAS_POSITIONED_READS = hasattr(os, "preadv")
positioned = pytest.mark.skipif(not HAS_POSITIONED_READS, reason="Windows reads by handle")


def pages(count: int = SIZE // PAGE + 1) -> memoryview:
    """Memory of its own that begins on a page."""
    return memoryview(mmap.mmap(-1, count * PAGE))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(DATA)
    return path


def without_positioned_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.delattr(os, "preadv", raising=False)


def refuse_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not open a file so."""
    plain, flag = os.open, getattr(os, "O_DIRECT", 0)

    def opened(path: Any, flags: int, *rest: Any) -> int:
        if flag and flags & flag:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", opened)


def refuse_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that opens a file so and then refuses to read it."""
    if not HAS_POSITIONED_READS or not hasattr(os, "O_DIRECT"):
        return
    import fcntl

    plain = os.preadv

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "this one": lambda monkeypatch: None,
    "no positioned reads": without_positioned_reads,
    "refuses the flag": refuse_flag,
    "refuses the reads": refuse_reads,
}
every_system = pytest.mark.parametrize("system", SYSTEMS)


@every_system
def test_every_range(system: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SYSTEMS[system](monkeypatch)
    buffer = pages()
    with DirectFile(path) as file:
        assert file.size == SIZE
        for offset, length in RANGES:
            buffer[:] = bytes(len(buffer))
            start, room = page_range(offset, length)
            assert start % PAGE == room % PAGE == 0
            found = file.read_range(offset, length, buffer[:room])
            assert found == DATA[offset : offset + length], (offset, length)
            # Nothing is written behind the pages of the range.
            assert bytes(buffer[room:]) == bytes(len(buffer) - room)
        if system != "this one":
            assert not file.is_direct


@positioned
def test_this_file_system_is_read_directly_where_it_lets_us(path: Path) -> None:
    """Whether it does is asked of it, not assumed: tmpfs may not."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
        allowed = True
    except (OSError, AttributeError):
        allowed = False
    with DirectFile(path) as file:
        assert file.is_direct == allowed


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs here")
def test_a_file_in_memory() -> None:
    path = Path(f"/dev/shm/localr1-direct-{os.getpid()}")
    path.write_bytes(DATA)
    try:
        with DirectFile(path) as file:
            assert file.read_range(5000, 9000, pages()) == DATA[5000:14000]
    finally:
        path.unlink()


@every_system
def test_many_threads(system: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SYSTEMS[system](monkeypatch)
    wrong: list[tuple[int, int]] = []
    with DirectFile(path) as file:

        def work() -> None:
            buffer = pages()
            for _ in range(40):
                for offset, length in RANGES:
                    if file.read_range(offset, length, buffer) != DATA[offset : offset + length]:
                        wrong.append((offset, length))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@every_system
def test_a_file_cut_while_it_is_open(
    system: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SYSTEMS[system](monkeypatch)
    with DirectFile(path) as file:
        file.read_range(0, PAGE, pages())
        os.truncate(path, 2 * PAGE + 10)
        for offset, length in ((0, SIZE), (2 * PAGE, 11), (4 * PAGE, 1)):
            with pytest.raises(TruncatedError, match=r"ends early: expected .* found 8,202"):
                file.read_range(offset, length, pages())
        with pytest.raises(CheckpointError, match="changed while it was open"):
            file.read_range(0, PAGE, pages())  # Still there, but whose bytes are they?


@every_system
def test_a_file_written_anew_in_its_place(
    system: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SYSTEMS[system](monkeypatch)
    with DirectFile(path) as file:
        path.write_bytes(os.urandom(SIZE))
        os.utime(path, ns=(0, 1))  # Of the same size; some clocks tick slowly.
        with pytest.raises(CheckpointError, match="changed while it was open"):
            file.read_range(0, PAGE, pages())


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be replaced there")
def test_another_file_under_the_same_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that was opened is read on; a thread that would have to open it anew is told."""
    with DirectFile(path) as file:
        replacement = path.with_name("other")
        replacement.write_bytes(os.urandom(SIZE))
        os.replace(replacement, path)
        assert file.read_range(1, SIZE - 1, pages()) == DATA[1:]
    without_positioned_reads(monkeypatch)
    with DirectFile(path) as file:
        path.rename(path.with_name("moved"))
        path.write_bytes(DATA)
        errors: list[Exception] = []

        def work() -> None:
            for _ in range(2):
                try:
                    file.read_range(0, 10, pages())
                except CheckpointError as error:
                    errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert len(errors) == 2


@positioned
@pytest.mark.parametrize("failing", [0, 1, 3])
def test_a_read_that_fails(failing: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th: those before and after it are right."""
    plain, calls = os.preadv, iter(range(1000))

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        if next(calls) == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", read)
    with DirectFile(path) as file:
        for call in range(5):
            if call == failing:
                with pytest.raises(CheckpointError, match=r"cannot be read at byte 77.*"):
                    file.read_range(77, 5000, pages())
            else:
                assert file.read_range(77, 5000, pages()) == DATA[77:5077]


@positioned
@pytest.mark.parametrize("most", [PAGE, PAGE + 512, 2 * PAGE, 3 * PAGE + 1])
def test_short_reads(most: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may give less than was asked for, and a direct read goes on at whole pages."""
    plain, offsets = os.preadv, []

    def read(descriptor: int, buffers: Any, offset: int) -> int:
        offsets.append(offset)
        count = plain(descriptor, buffers, offset)
        return min(most, count)

    monkeypatch.setattr(os, "preadv", read)
    with DirectFile(path) as file:
        for offset, length in RANGES:
            assert file.read_range(offset, length, pages()) == DATA[offset : offset + length]
    assert not any(offset % PAGE for offset in offsets)


@positioned
@pytest.mark.parametrize("given", [0, 5])
def test_a_system_that_gives_nothing(
    given: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error, not an endless loop: the file is as long as it was."""
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: given)
    with DirectFile(path) as file, pytest.raises(CheckpointError, match="less than a page"):
        file.read_range(0, PAGE, pages())


def test_reads_of_many_calls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_file, "READ_CHUNK", PAGE)
    with DirectFile(path) as file:
        assert file.read_range(9, SIZE - 9, pages()) == DATA[9:]


def test_what_is_no_range_of_the_file(path: Path) -> None:
    with DirectFile(path) as file:
        with pytest.raises(TruncatedError, match=r"expected 20,604 bytes, found 20,603"):
            file.read_range(SIZE, 1, pages())
        with pytest.raises(AssertionError, match="not on a page"):
            file.read_range(0, 10, pages()[1:])
        with pytest.raises(AssertionError, match="for pages of 8192"):
            file.read_range(PAGE - 1, 2, pages(1))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        DirectFile(tmp_path / "nothing")
    with pytest.raises(FormatError, match="regular file"):
        DirectFile(tmp_path)
