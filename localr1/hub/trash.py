"""Deleting what may be large: first out of sight by one rename, which the system does wholly or not
at all, then away. What a kill leaves in between is found by its name and deleted by the next run.
"""

import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

TRASH_PREFIX: Final = ".localr1-trash-"


def move_to_trash(path: Path) -> Path:
    """Rename to a name of the trash beside it, and return that. Raises OSError."""
    trash = new_trash(path.parent)
    os.rename(path, trash)
    return trash


def new_trash(folder: Path) -> Path:
    return folder / f"{TRASH_PREFIX}{secrets.token_hex(4)}"


def left_trash(folder: Path) -> Iterator[Path]:
    """What earlier runs left in a directory."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return
    yield from (folder / name for name in names if name.startswith(TRASH_PREFIX))


def delete(path: Path) -> None:
    """A file, a link (not what it leads to) or a directory with all in it; that it is gone already
    is no error, for another process may be clearing the same. Raises OSError."""
    try:
        is_directory = stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return
    if is_directory:
        shutil.rmtree(path, onerror=_go_on)
        return
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except PermissionError:
        _make_writable(path)
        path.unlink(missing_ok=True)


def _go_on(function: Any, path: str, reason: Any) -> None:
    error = reason[1]
    if isinstance(error, FileNotFoundError):
        return
    if isinstance(error, PermissionError) and function in (os.unlink, os.rmdir):
        _make_writable(Path(path))
        function(path)
        return
    raise error


def _make_writable(path: Path) -> None:
    """Windows deletes no file that is marked read-only."""
    if os.name == "nt":
        os.chmod(path, stat.S_IWRITE)
