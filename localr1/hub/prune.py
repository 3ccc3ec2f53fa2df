"""What lies around and serves nobody: unfinished downloads and quantizations, blobs that no
snapshot uses, trash that a kill left, what is cached of an embedded model that was since replaced.
"""

import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from localr1.errors import OutputError
from localr1.hub.cached import BLOB_NAME, BLOBS, read_repository, repository_folders
from localr1.hub.downloads import PULL_NAME, allocated_bytes, partial_files, read_pull
from localr1.hub.library import Library
from localr1.hub.locks import BusyError, blob_lock, held, model_held, repository_lock
from localr1.hub.removal import is_shared_blob_link, let_go_of_shared
from localr1.hub.trash import delete, left_trash
from localr1.hub.verify import DAMAGED_SUFFIX

UNFINISHED_DOWNLOAD: Final = "unfinished download"
UNFINISHED_QUANTIZATION: Final = "unfinished quantization"
UNUSED_BLOB: Final = "blob of no snapshot"
DAMAGED_BLOB: Final = "damaged, moved aside"
TRASH: Final = "half deleted"
OLD_EMBEDDED: Final = "model of another version"
MEASUREMENT: Final = "left by a measurement"
_PARTIAL_MODEL: Final = re.compile(r"\.(.+)\.partial(-[0-9a-f]+)?", re.DOTALL)
_MEASUREMENTS: Final = (".localr1-disk-*", ".hardware.json.*.partial")
_LEFT_AFTER: Final = 3600.0
"""Seconds after which a file of a measurement, which takes one, is nobody's any more."""


@dataclass(frozen=True)
class Leftover:
    """kind: one of the above. of: the model or file it belongs to. paths: all of it. repository:
    the folder in the cache whose lock guards it. model: the directory whose lock does. etag: of
    the blob that another program may be downloading."""

    kind: str
    of: str
    paths: tuple[Path, ...]
    repository: Path | None = None
    model: Path | None = None
    etag: str | None = None

    @property
    def nbytes(self) -> int:
        return sum(_allocated(path) for path in self.paths)

    def to_json(self) -> dict[str, Any]:
        paths = [str(path) for path in self.paths]
        return {"kind": self.kind, "of": self.of, "bytes": self.nbytes, "paths": paths}


def leftovers(library: Library, cache_dir: Path, embedded_digest: str) -> list[Leftover]:
    """embedded_digest: names what is cached of the embedded model as it is now."""
    found = [Leftover(TRASH, path.name, (path,)) for path in left_trash(library.hub_cache)]
    for name, folder in repository_folders(library.hub_cache):
        with contextlib.suppress(OSError):
            found += of_repository(name, folder)
    found += _of_models(library.models_dir)
    embedded = cache_dir / "embedded"
    for path in _entries(embedded):
        if path.name == embedded_digest:
            found += _of_models(path)
        else:
            found.append(Leftover(OLD_EMBEDDED, f"{embedded.name}/{path.name}", (path,)))
    now = time.time()
    for pattern in _MEASUREMENTS:
        for path in sorted(cache_dir.glob(pattern)):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > _LEFT_AFTER:
                    found.append(Leftover(MEASUREMENT, path.name, (path,)))
    return found


def of_repository(name: str, folder: Path) -> Iterator[Leftover]:
    """Raises OSError where it cannot be read."""
    for path in left_trash(folder):
        yield Leftover(TRASH, name, (path,), folder)
    pull = read_pull(folder)
    used = {
        file.blob.name
        for snapshot in read_repository(name, folder).snapshots
        for file in snapshot.files
        if file.blob is not None
    }
    blobs = {path.name: path for path in _entries(folder / BLOBS)}
    unused = {each for each in blobs if BLOB_NAME.fullmatch(each) and each not in used}
    partial = partial_files(folder, pull)
    ours = [path for file in partial if file.is_ours for path in file.paths]
    if pull is not None:
        wanted = {file.etag for file in pull.files} & unused
        unused -= wanted
        ours += [*(blobs[each] for each in sorted(wanted)), folder / PULL_NAME]
    if ours:
        yield Leftover(UNFINISHED_DOWNLOAD, name, tuple(ours), folder)
    for file in partial:
        if not file.is_ours:
            yield Leftover(UNFINISHED_DOWNLOAD, name, file.paths, folder, etag=file.etag)
    for each in sorted(unused):
        yield Leftover(UNUSED_BLOB, name, (blobs[each],), folder, etag=each)
    damaged = tuple(path for each, path in sorted(blobs.items()) if each.endswith(DAMAGED_SUFFIX))
    if damaged:
        yield Leftover(DAMAGED_BLOB, name, damaged, folder)


def prune(leftover: Leftover, library: Library) -> bool:
    """Delete it; False where it is in use after all, or no more what it was. Raises OutputError."""
    try:
        with contextlib.ExitStack() as stack:
            if leftover.repository is not None:
                stack.enter_context(held(repository_lock(leftover.repository), leftover.of))
            if leftover.etag is not None and leftover.repository is not None:
                lock = blob_lock(leftover.repository, leftover.etag)
                stack.enter_context(held(lock, leftover.of))
            if leftover.model is not None:
                stack.enter_context(model_held(leftover.model))
            paths = _still(leftover)
            shared = [path for path in paths if is_shared_blob_link(path)]
            if shared:
                let_go_of_shared(library.hub_cache, shared)
            for path in paths:
                delete(path)
    except BusyError:
        return False
    except OSError as error:
        raise OutputError(f"{error.filename} cannot be deleted", found=error.strerror) from error
    return bool(paths)


def _still(leftover: Leftover) -> list[Path]:
    """Its paths that are left over now that the lock is held: of an unused blob another program may
    have made a snapshot since."""
    if leftover.repository is None:
        return list(leftover.paths)
    now = {path for each in of_repository(leftover.of, leftover.repository) for path in each.paths}
    return [path for path in leftover.paths if path in now]


def _of_models(folder: Path) -> Iterator[Leftover]:
    for path in left_trash(folder):
        yield Leftover(TRASH, path.name, (path,))
    for path in _entries(folder):
        if match := _PARTIAL_MODEL.fullmatch(path.name):
            model = folder / match[1]
            yield Leftover(UNFINISHED_QUANTIZATION, match[1], (path,), model=model)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _allocated(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return allocated_bytes(path)
    return disk_usage([path])


def disk_usage(folders: Iterable[Path]) -> int:
    """Bytes that directories take, each file counted once however many names it has; no link is
    followed, what cannot be read not counted."""
    seen: dict[tuple[int, int], int] = {}
    waiting = [os.fspath(folder) for folder in folders]
    while waiting:
        with contextlib.suppress(OSError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        # Windows leaves st_ino out of what a directory says of its entries.
                        status = os.lstat(entry.path)
                        identity = (status.st_dev, status.st_ino)
                        seen[identity] = allocated_bytes(Path(entry.path))
    return sum(seen.values())
