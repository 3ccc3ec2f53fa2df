"""How the Hugging Face cache lays out a model, which other tools read too: bytes once, under their
hash, in `blobs`; a commit's files as links to them in `snapshots`; and in `refs` the commit that a
branch or tag meant when it was last asked for. (huggingface_hub's documentation, "Understand
caching".)
"""

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from localr1.errors import OutputError
from localr1.hub.cached import BLOBS, REFS, SNAPSHOTS, folder_name
from localr1.hub.downloads import PULL_NAME
from localr1.hub.locks import repository_lock
from localr1.hub.partial import DATA_SUFFIX, JOURNAL_SUFFIX, partial_paths
from localr1.hub.reference import COMMIT
from localr1.hub.repository import Listing, RemoteFile

_TEMPORARY: Final = re.compile(r"\..+\.[0-9a-f]{8}")


class RepositoryFolder:
    """A model's folder in the cache, which need not be there yet."""

    def __init__(self, hub_cache: Path, repository: str) -> None:
        folder = folder_name(repository)
        self.repository = repository
        self.path = hub_cache / folder
        self.lock_path = repository_lock(self.path)
        self.pull_path = self.path / PULL_NAME

    def blob(self, file: RemoteFile) -> Path:
        return self.path / BLOBS / file.etag

    def snapshot(self, commit: str) -> Path:
        return self.path / SNAPSHOTS / commit

    def has(self, commit: str, file: RemoteFile) -> bool:
        """Whether the commit's file is there with all its bytes, or a blob that can become it."""
        return file.size in (_size(self.pointer(commit, file)), _size(self.blob(file)))

    def pointer(self, commit: str, file: RemoteFile) -> Path:
        """The file as it stands in the commit."""
        return self.snapshot(commit).joinpath(*file.path.split("/"))

    def link_what_is_there(self, commit: str, files: Sequence[RemoteFile]) -> None:
        """Makes blobs that came some other way files of the commit. Raises OutputError."""
        for file in files:
            is_linked = _size(self.pointer(commit, file)) == file.size
            if not is_linked and _size(self.blob(file)) == file.size:
                self.link(commit, [file])

    def link(self, commit: str, files: Sequence[RemoteFile]) -> None:
        """Makes a finished blob the files of the commit that have these bytes. Raises
        OutputError."""
        blob = self.blob(files[0])
        for number, file in enumerate(files, 1):
            pointer = self.pointer(commit, file)
            with _disk_errors(pointer):
                pointer.parent.mkdir(parents=True, exist_ok=True)
                temporary = pointer.with_name(f".{pointer.name}.{secrets.token_hex(4)}")
                try:
                    temporary.symlink_to(os.path.relpath(blob, pointer.parent))
                except OSError:  # Windows allows links to few: then the file itself goes there.
                    if number == len(files):
                        os.replace(blob, pointer)
                        return
                    shutil.copyfile(blob, temporary)
                os.replace(temporary, pointer)

    def delete(self, commit: str, file: RemoteFile) -> None:
        """A file of the commit, and its bytes unless another commit has them too; what there was
        of them goes in any case. Raises OutputError."""
        pointer, blob = self.pointer(commit, file), self.blob(file)
        with _disk_errors(pointer):
            for path in (pointer, *partial_paths(blob)):
                path.unlink(missing_ok=True)
            if not self._is_used(blob):
                blob.unlink(missing_ok=True)

    def _is_used(self, blob: Path) -> bool:
        files = (self.path / SNAPSHOTS).rglob("*")
        return any(file.is_symlink() and file.resolve() == blob.resolve() for file in files)

    def set_ref(self, revision: str, commit: str) -> None:
        """Remembers what a branch or tag means. Raises OutputError."""
        if COMMIT.fullmatch(revision):
            return
        path = self.path.joinpath(REFS, *revision.split("/"))
        with contextlib.suppress(OSError):  # Then the cache need not be written.
            if path.read_bytes() == commit.encode():
                return
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(path, commit.encode())

    def begin_pull(self, listing: Listing, files: Sequence[RemoteFile]) -> None:
        """Records what is going to be there, and removes what was begun of other files."""
        document = {
            "repository": listing.repository,
            "revision": listing.reference.revision,
            "commit": listing.commit,
            "files": [asdict(file) for file in files],
        }
        with _disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.pull_path, json.dumps(document, indent=1).encode())
            _remove_left(self.path)
            wanted = {file.etag for file in files}
            for suffix in (DATA_SUFFIX, JOURNAL_SUFFIX):
                for path in (self.path / BLOBS).glob(f"*{suffix}"):
                    if path.name.removesuffix(suffix) not in wanted:
                        path.unlink(missing_ok=True)

    def end_pull(self) -> None:
        with _disk_errors(self.pull_path):
            self.pull_path.unlink(missing_ok=True)


def _remove_left(folder: Path) -> None:
    """What a killed process had written and not yet given its name."""
    for path in folder.rglob("*"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{error.filename or path}: {error.strerror or error}",
            fix="What has been fetched is kept: mend it and give the same command again.",
        ) from error
