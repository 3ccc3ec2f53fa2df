"""The one place that turns a name written in a checkpoint into a file to open.

A name is resolved inside the model's directory or refused. Symbolic links may lead to another file
of the directory, or, in the Hugging Face cache, from `models--*/snapshots/REVISION/` into that
model's own `blobs/`, and from there into the store that huggingface_hub 2 shares between the
cache's repositories (`blobs/XX/HASH` beside them, marked as such); nowhere else.
"""

import os
import re
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from localr1.errors import FormatError, NotFoundError

COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_NAME_LENGTH = 1024
WINDOWS_DEVICES = frozenset(
    ["con", "prn", "aux", "nul"] + [f"{port}{n}" for port in ("com", "lpt") for n in range(10)]
)
SHARED_STORE, SHARED_MARK, SHARED_VERSION = "blobs", ".huggingface-shared-blobs", "1\n"
"""Of huggingface_hub 2: the folder in the cache, the file in it that says whose it is, its text."""
SHARED_NAME = re.compile("[0-9a-f]{64}")


def quoted(text: object, limit: int = 80) -> str:
    """`text` from a file as it may be shown: control characters escaped, cut to `limit`."""
    shown = repr(text[: limit + 1]) if isinstance(text, str) else reprlib.repr(text)
    return shown if len(shown) <= limit else shown[:limit] + "…"


def model_root(directory: Path) -> Path:
    """The real path of a model's directory. Raises NotFoundError when there is none."""
    root = Path(os.path.realpath(directory))
    if not root.is_dir():
        raise NotFoundError(f"{directory}: there is no such directory")
    return root


def resolve(root: Path, name: str) -> Path:
    """The regular file that `name` (relative, "/" between parts) means inside `root`.

    root: as `model_root` returned it. Raises FormatError for a name that could leave the directory
    or is no regular file, NotFoundError when nothing is there.
    """
    check_name(name)
    real = Path(os.path.realpath(root.joinpath(*name.split("/"))))
    if not real.is_relative_to(root) and not _is_cache_blob(real, root):
        raise FormatError(
            f"file name {quoted(name)}",
            expected="a file inside the model's directory",
            found=f"a link to {real}",
            fix="Copy the file into the directory if you trust it.",
        )
    check_regular(real, name)
    return real


def check_regular(path: Path, shown: str) -> None:
    """Raise unless `path` is a regular file: opening a pipe can hang, a device can do anything."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(
            f"{quoted(shown, 300)} is not there", expected=f"a file at {path}"
        ) from None
    except OSError as error:
        raise NotFoundError(
            f"{quoted(shown, 300)} cannot be looked at", found=error.strerror
        ) from error
    if not stat.S_ISREG(mode):
        raise FormatError(f"{path}", expected="a regular file", found=_kind(mode))


def check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME_LENGTH:
        raise FormatError(
            "file name", expected=f"1 to {MAX_NAME_LENGTH} characters", found=f"{len(name)}"
        )
    if any(ord(char) < 32 or ord(char) == 127 or char in '\\:*?"<>|' for char in name):
        raise FormatError(
            f"file name {quoted(name)}",
            expected='a relative name without control characters or any of \\ : * ? " < > |',
        )
    parts = name.split("/")
    for part in parts:
        # Windows drops trailing dots and spaces, so "..." and ".. " could become "..".
        if part != part.rstrip(". ") or part == "":
            raise FormatError(
                f"file name {quoted(name)}",
                expected="a relative name inside the model's directory",
                found=f"the part {quoted(part)}",
            )
        if PurePosixPath(part).name.split(".")[0].strip().lower() in WINDOWS_DEVICES:
            raise FormatError(f"file name {quoted(name)}", found="a device name of Windows")


@dataclass(frozen=True)
class HubOrigin:
    """repository: "org/name". commit: 40 hexadecimal digits."""

    repository: str
    commit: str


def hub_origin(root: Path) -> HubOrigin | None:
    """What a snapshot in the Hugging Face cache is of, by its place; None for any other directory.
    root: as `model_root` returned it."""
    if not _is_snapshot(root) or not COMMIT.fullmatch(root.name):
        return None
    folder = root.parent.parent.name
    return HubOrigin(folder.removeprefix("models--").replace("--", "/"), root.name)


def _is_snapshot(root: Path) -> bool:
    return root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--")


def _is_cache_blob(real: Path, root: Path) -> bool:
    """Whether `real` is a blob that the snapshot `root` of a Hugging Face cache may link to: its
    repository's own, or one of the shared store."""
    repository = root.parent.parent
    if not _is_snapshot(root):
        return False
    if real.parent == repository / "blobs":
        return True
    return is_shared_blob(real, repository.parent)


def is_shared_blob(real: Path, cache: Path) -> bool:
    """Whether `real` lies in the shared store of the Hugging Face cache at `cache` (a real path):
    at blobs/XX/HASH, where the store bears its mark."""
    store = cache / SHARED_STORE
    if not SHARED_NAME.fullmatch(real.name) or real.parent != store / real.name[:2]:
        return False
    try:
        return (store / SHARED_MARK).read_text() == SHARED_VERSION
    except (OSError, UnicodeDecodeError):
        return False


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISCHR, "a character device"),
        (stat.S_ISBLK, "a block device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for test, name in kinds if test(mode)), "a special file")
