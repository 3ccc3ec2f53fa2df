"""Downloads that are not finished: what `localr1 pull` and huggingface_hub leave in a cache when
they are cut off."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.strict_json import read_object
from localr1.errors import LocalR1Error
from localr1.hub.cached import BLOB_NAME, BLOBS, SNAPSHOTS, repository_folders
from localr1.hub.partial import DATA_SUFFIX, JOURNAL_SUFFIX, done_bytes

PULL_NAME: Final = "localr1-pull.json"
"""In a repository's folder from a pull's beginning to its end: which commit, which files."""
_THEIRS: Final = re.compile(r"([0-9a-f]{40}|[0-9a-f]{64})(\.[0-9a-f]{8})?\.incomplete")
"""huggingface_hub names each after its blob, since version 1 with eight digits of chance."""
_BLOCK: Final = 512
"""Bytes in the unit of st_blocks (POSIX)."""


@dataclass(frozen=True)
class WantedFile:
    """path: in the snapshot. etag: names its blob."""

    path: str
    size: int
    etag: str


@dataclass(frozen=True)
class Pull:
    """What localr1-pull.json records."""

    repository: str
    commit: str
    revision: str
    files: tuple[WantedFile, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(file.path for file in self.files)


@dataclass(frozen=True)
class PartialFile:
    """A file that is there in part. etag: of the blob it will be. done: bytes of it that are there.
    size: of the whole; None where nothing says it. paths: that belong to it. is_ours: whether
    `localr1 pull` resumes it; huggingface_hub begins its own anew."""

    etag: str
    done: int
    size: int | None
    paths: tuple[Path, ...]
    is_ours: bool

    @property
    def nbytes(self) -> int:
        """That it takes on the disk."""
        return sum(allocated_bytes(path) for path in self.paths)


def read_pull(repository: Path) -> Pull | None:
    """Of a repository's folder; None where no pull is unfinished, or its record is not readable."""
    path = repository / PULL_NAME
    if not path.is_file():
        return None
    try:
        document = read_object(path, str(path))
    except LocalR1Error:
        return None
    listed = document.get("files")
    files = [_wanted(each) for each in listed] if isinstance(listed, list) else []
    return Pull(
        _text(document.get("repository")),
        _text(document.get("commit")),
        _text(document.get("revision")),
        tuple(file for file in files if file is not None),
    )


def partial_files(repository: Path, pull: Pull | None) -> list[PartialFile]:
    """In a repository's folder, by the names of their blobs."""
    blobs = repository / BLOBS
    sizes = {} if pull is None else {file.etag: file.size for file in pull.files}
    found = []
    try:
        names = sorted(os.listdir(blobs))
    except OSError:
        return []
    for name in names:
        path = blobs / name
        if path.is_symlink() or not path.is_file():
            continue
        if name.endswith(DATA_SUFFIX):
            etag = name.removesuffix(DATA_SUFFIX)
            paths = [path, *(each for each in [blobs / (etag + JOURNAL_SUFFIX)] if each.is_file())]
            size = sizes.get(etag, path.stat().st_size)
            found.append(PartialFile(etag, done_bytes(path), size, tuple(paths), True))
        elif (
            name.endswith(JOURNAL_SUFFIX)
            and name.removesuffix(JOURNAL_SUFFIX) + DATA_SUFFIX not in names
        ):
            found.append(PartialFile(name.removesuffix(JOURNAL_SUFFIX), 0, None, (path,), True))
        elif match := _THEIRS.fullmatch(name):
            etag = match[1]
            found.append(PartialFile(etag, path.stat().st_size, sizes.get(etag), (path,), False))
    return found


def allocated_bytes(path: Path) -> int:
    """On disk: of a sparse file less than its length. Where the system does not say: the length."""
    try:
        status = os.lstat(path)
    except OSError:
        return 0
    blocks = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * _BLOCK)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _wanted(value: object) -> WantedFile | None:
    if not isinstance(value, Mapping):
        return None
    fields: Mapping[str, Any] = value
    path, size, etag = fields.get("path"), fields.get("size"), fields.get("etag")
    if isinstance(path, str) and type(size) is int and isinstance(etag, str):
        return WantedFile(path, size, etag)
    return None


@dataclass(frozen=True)
class Download:
    """What of one repository is on its way.

    name: org/name, with @REVISION where that is known and not main. commit: where it is known.
    done, total: bytes of all wanted files; total None where nothing says what was wanted, and then
    done is of the partial files alone. files_done, files_total: of them. partial: those begun.
    is_ours: whether `localr1 pull` recorded it.
    """

    name: str
    repository: str
    commit: str | None
    done: int
    total: int | None
    files_done: int
    files_total: int | None
    partial: tuple[PartialFile, ...]
    is_ours: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "repository": self.repository,
            "commit": self.commit,
            "done_bytes": self.done,
            "total_bytes": self.total,
            "files_done": self.files_done,
            "files_total": self.files_total,
            "partial_files": [
                {
                    "path": str(file.paths[0]),
                    "done_bytes": file.done,
                    "total_bytes": file.size,
                    "by": "localr1" if file.is_ours else "another program",
                }
                for file in self.partial
            ],
            "by": "localr1" if self.is_ours else "another program",
        }


def downloads(hub_cache: Path) -> list[Download]:
    """All that are not finished, of model repositories."""
    found = []
    for name, folder in repository_folders(hub_cache):
        pull = read_pull(folder)
        partial = tuple(partial_files(folder, pull))
        if pull is not None:
            found.append(_recorded(name, folder, pull, partial))
        elif partial:
            done = sum(file.done for file in partial)
            found.append(Download(name, name, None, done, None, 0, None, partial, False))
    return found


def _recorded(name: str, folder: Path, pull: Pull, partial: tuple[PartialFile, ...]) -> Download:
    begun = {file.etag: file.done for file in partial}
    # A blob is one file however many of the snapshot's are alike.
    wanted = {file.etag: file for file in pull.files}
    whole = [etag for etag in wanted if _is_there(folder, pull, wanted[etag])]
    done = sum(wanted[etag].size for etag in whole)
    done += sum(
        min(begun.get(etag, 0), file.size) for etag, file in wanted.items() if etag not in whole
    )
    revision = "" if pull.revision in ("", "main") else f"@{pull.revision}"
    return Download(
        name=name + revision,
        repository=name,
        commit=pull.commit or None,
        done=done,
        total=sum(file.size for file in wanted.values()),
        files_done=len(whole),
        files_total=len(wanted),
        partial=partial,
        is_ours=True,
    )


def _is_there(folder: Path, pull: Pull, file: WantedFile) -> bool:
    """As a blob, or where there are no links in the snapshot itself."""
    if BLOB_NAME.fullmatch(file.etag) and (folder / BLOBS / file.etag).is_file():
        return True
    if not BLOB_NAME.fullmatch(pull.commit) or ".." in file.path.split("/"):
        return False
    return folder.joinpath(SNAPSHOTS, pull.commit, *file.path.split("/")).is_file()
