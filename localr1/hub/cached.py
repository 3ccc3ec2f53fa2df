"""What lies in the Hugging Face cache, by its directories alone: no file is opened but refs.

huggingface_hub's own `scan_cache_dir` leaves out a whole repository for one dangling link or one
bad ref, and follows links wherever they lead. Here each file that is not there, or is not what the
layout says, is told by itself: a download that was cut off is what a library must show.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from localr1.checkpoint.paths import is_shared_blob
from localr1.errors import CheckpointError

PREFIX: Final = "models--"
SNAPSHOTS, BLOBS, REFS, LOCKS = "snapshots", "blobs", "refs", ".locks"
MAX_REF_BYTES: Final = 256
MAX_DEPTH: Final = 8
"""Of folders in a snapshot."""
OF_THE_SYSTEM: Final = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_WINDOWS_LONG: Final = "\\\\?\\"
BLOB_NAME: Final = re.compile("[0-9a-f]{64}|[0-9a-f]{40}")
"""The SHA-256 of a large file, the git SHA-1 of any other: what the Hub calls its etag."""


@dataclass(frozen=True)
class CachedFile:
    """One file of a snapshot.

    name: in the snapshot, with "/" between its parts. path: there. blob: the entry of the
    repository's blobs that it links to; None where the file itself lies in the snapshot, as on
    systems without links. identity: of the bytes, (device, number), so that none are counted twice;
    None where none are there. nbytes, modified: of them, 0 then. problem: why they cannot be used:
    "missing", or a link that leads out of the cache.
    """

    name: str
    path: Path
    blob: Path | None
    identity: tuple[int, int] | None
    nbytes: int
    modified: float
    problem: str | None = None


@dataclass(frozen=True)
class CachedSnapshot:
    """repository: org/name. revisions: the names that mean this commit: "main", "refs/pr/1"."""

    repository: str
    commit: str
    path: Path
    revisions: tuple[str, ...]
    files: tuple[CachedFile, ...]

    @cached_property
    def by_name(self) -> dict[str, CachedFile]:
        return {file.name: file for file in self.files}

    @property
    def nbytes(self) -> int:
        """On disk, of each blob once."""
        return unique_bytes(self.files)

    @property
    def modified(self) -> float | None:
        times = [file.modified for file in self.files if file.identity is not None]
        return max(times, default=None)


@dataclass(frozen=True)
class CachedRepository:
    """name: org/name. path: models--org--name."""

    name: str
    path: Path
    snapshots: tuple[CachedSnapshot, ...]

    @property
    def main(self) -> CachedSnapshot | None:
        """What the repository's name alone means: the commit of "main", or the only one."""
        for snapshot in self.snapshots:
            if "main" in snapshot.revisions:
                return snapshot
        return self.snapshots[0] if len(self.snapshots) == 1 else None

    def at(self, revision: str) -> CachedSnapshot | None:
        """By the name of a revision, or a commit's first seven digits or more."""
        for snapshot in self.snapshots:
            if revision in snapshot.revisions:
                return snapshot
        found = [each for each in self.snapshots if each.commit.startswith(revision)]
        return found[0] if len(revision) >= 7 and len(found) == 1 else None


def unique_bytes(files: "tuple[CachedFile, ...] | list[CachedFile]") -> int:
    return sum({file.identity: file.nbytes for file in files}.values())


def folder_name(repository: str) -> str:
    """org/name -> models--org--name."""
    return PREFIX + repository.replace("/", "--")


def repository_folders(hub_cache: Path) -> Iterator[tuple[str, Path]]:
    """(org/name, its folder) of every model repository; those of datasets and spaces have another
    prefix. Raises CheckpointError where the cache cannot be read."""
    try:
        for name in _names(hub_cache):
            if name.startswith(PREFIX) and (hub_cache / name).is_dir():
                yield name.removeprefix(PREFIX).replace("--", "/"), hub_cache / name
    except OSError as error:
        raise _unreadable(error) from error


def find_repository(hub_cache: Path, name: str) -> CachedRepository | None:
    """By name in any case, as the Hub takes it; one spelled just so goes first. Raises
    CheckpointError where its directories cannot be read."""
    folders = dict(repository_folders(hub_cache))
    if name not in folders:
        alike = [each for each in folders if each.casefold() == name.casefold()]
        if len(alike) != 1:
            return None
        name = alike[0]
    try:
        return read_repository(name, folders[name])
    except OSError as error:
        raise _unreadable(error) from error


def read_repository(name: str, path: Path) -> CachedRepository:
    """Raises OSError where a directory cannot be read."""
    refs = _read_refs(path / REFS)
    layout = _Layout(path)
    snapshots = []
    for commit in _names(path / SNAPSHOTS):
        folder = path / SNAPSHOTS / commit
        if commit.startswith(".") or commit in OF_THE_SYSTEM or not folder.is_dir():
            continue
        files = tuple(sorted(layout.files(folder), key=lambda file: file.name))
        revisions = tuple(sorted(refs.get(commit, ())))
        snapshots.append(CachedSnapshot(name, commit, folder, revisions, files))
    return CachedRepository(name, path, tuple(snapshots))


def snapshot_of(path: Path) -> tuple[str, str] | None:
    """(repository, commit) of a snapshot's directory, or of a file in one; None elsewhere."""
    path = Path(os.path.abspath(path))
    for folder in (path, *path.parents):
        above = folder.parent
        if above.name == SNAPSHOTS and above.parent.name.startswith(PREFIX):
            return above.parent.name.removeprefix(PREFIX).replace("--", "/"), folder.name
    return None


class _Layout:
    """What belongs to one repository."""

    def __init__(self, repository: Path) -> None:
        self._blobs = Path(os.path.abspath(repository)) / BLOBS
        self._real_blobs = Path(os.path.realpath(self._blobs))
        self._cache = Path(os.path.realpath(repository.parent))

    def files(self, folder: Path, prefix: str = "", depth: int = 0) -> Iterator[CachedFile]:
        for name in _names(folder):
            path = folder / name
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:
                continue  # A download puts a link under its name just now.
            if stat.S_ISDIR(mode):
                if depth < MAX_DEPTH:
                    yield from self.files(path, f"{prefix}{name}/", depth + 1)
            elif name not in OF_THE_SYSTEM:
                yield self._file(path, prefix + name, mode)

    def _file(self, path: Path, name: str, mode: int) -> CachedFile:
        blob = None
        real = path
        if stat.S_ISLNK(mode):
            target = os.readlink(path).removeprefix(_WINDOWS_LONG)
            first = Path(os.path.abspath(path.parent / target))
            if Path(os.path.realpath(first.parent)) != self._real_blobs:
                return _unusable(path, name, None, f"a link to {first}")
            blob = self._blobs / first.name
            real = Path(os.path.realpath(blob))
            if real.parent != self._real_blobs and not is_shared_blob(real, self._cache):
                return _unusable(path, name, blob, f"a link to {real}")
        try:
            status = os.lstat(real)
        except OSError:
            return _unusable(path, name, blob, "missing")
        if not stat.S_ISREG(status.st_mode):
            return _unusable(path, name, blob, "no regular file")
        identity = (status.st_dev, status.st_ino)
        return CachedFile(name, path, blob, identity, status.st_size, status.st_mtime)


def _unreadable(error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{error.filename} cannot be read",
        found=error.strerror,
        fix="Change its owner or its mode, or delete it by hand.",
    )


def _unusable(path: Path, name: str, blob: Path | None, problem: str) -> CachedFile:
    return CachedFile(name, path, blob, None, 0, 0.0, problem)


def _names(folder: Path) -> list[str]:
    """Sorted; of a directory that is not there none."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _read_refs(folder: Path, prefix: str = "", depth: int = 0) -> dict[str, list[str]]:
    """Commit -> the revisions that mean it. What is no ref is passed over."""
    found: dict[str, list[str]] = {}
    for name in _names(folder):
        path = folder / name
        if path.is_dir() and not path.is_symlink() and depth < MAX_DEPTH:
            for commit, names in _read_refs(path, f"{prefix}{name}/", depth + 1).items():
                found.setdefault(commit, []).extend(names)
            continue
        with contextlib.suppress(OSError):
            if stat.S_ISREG(os.lstat(path).st_mode):
                with open(path, "rb") as file:
                    commit = file.read(MAX_REF_BYTES).decode("ascii", "replace").strip()
                found.setdefault(commit, []).append(prefix + name)
    return found
