"""A file that its owner alone can read, there whole or as it was before."""

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from localr1.errors import OutputError

PARTIAL: Final = ".partial-"
"""In the name of a file that is being written. One left by a process that died is in nobody's way,
and goes with its session."""

Bytes = bytes | memoryview


def private_directory(path: Path) -> None:
    """Made where it is not there, with its parents. Raises OutputError."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: sessions cannot be kept there",
            found=error.strerror,
            fix="Use --no-session.",
        ) from error


def write_private(path: Path, pieces: Iterable[Bytes]) -> None:
    """Make `path` hold `pieces`, one behind the other, on the disk itself when this returns.
    Whatever fails, the file is as it was. Raises OutputError."""
    partial = path.with_name(f".{path.name}{PARTIAL}{secrets.token_hex(4)}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with open(os.open(partial, flags, 0o600), "wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written",
            found=error.strerror or str(error),
            fix="What was there before is as it was.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
