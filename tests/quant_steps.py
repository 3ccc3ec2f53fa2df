"""Every step a quantization takes on the disk, as events that a test can count, fail or die at."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from unittest import mock

from localr1.quant.atomic import open_file as really_open_file


class CountedFile:
    """A file whose writes, and nothing else, are announced."""

    def __init__(self, file: BinaryIO, announce: Callable[[str], None]) -> None:
        self._file = file
        self._announce = announce

    def write(self, data: Any) -> int:
        self._announce("write")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def count_steps(
    at_step: Callable[[int, str], None],
) -> Iterator[Callable[[Path], BinaryIO]]:
    """Calls at_step(number, name) before each opening, write, fsync, mkdir, rename and removal;
    yields the `open_file` to give to `quantize`."""
    steps = 0

    def announce(name: str) -> None:
        nonlocal steps
        steps += 1
        at_step(steps - 1, name)

    def open_file(path: Path) -> BinaryIO:
        announce("open")
        return CountedFile(really_open_file(path), announce)  # type: ignore[return-value]

    really_make = os.mkdir

    def make_directory(path: Any, *args: Any, **options: Any) -> None:
        if not os.path.isdir(path):  # One that is there already is not a step.
            announce("mkdir")
        really_make(path, *args, **options)

    def announced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            announce(name)
            return function(*args, **options)

        return call

    with (
        mock.patch("os.fsync", announced("fsync", os.fsync)),
        mock.patch("os.rename", announced("rename", os.rename)),
        mock.patch("os.replace", announced("replace", os.replace)),
        mock.patch("os.unlink", announced("unlink", os.unlink)),
        mock.patch("os.mkdir", make_directory),
    ):
        yield open_file
