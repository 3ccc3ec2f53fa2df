"""The sessions of a user, in a directory:

    ID.json          the conversation; precious
    ID.safetensors   what the model had read of it (snapshot.py), which can be read anew
    ID.lock          held while a localr1 has it open

A session that was never named goes when NEWEST others are newer; snapshots, oldest first, when all
of them together are larger than MAX_SNAPSHOT_BYTES. None of it touches what is open.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from localr1.checkpoint.files import read_bounded
from localr1.errors import LocalR1Error, NotFoundError, OutputError
from localr1.sessions.document import MAX_BYTES, SessionDocument, checked_name, is_id
from localr1.sessions.private_file import PARTIAL, private_directory, write_private

if TYPE_CHECKING:
    from filelock import BaseFileLock

LAST: Final = "last"
NEWEST: Final = 200
MAX_SNAPSHOT_BYTES: Final = 4 << 30
UNFINISHED_SECONDS: Final = 24 * 3600
DOCUMENT, SNAPSHOT, LOCK = ".json", ".safetensors", ".lock"


@dataclass(frozen=True)
class StoredSession:
    """document: None where it cannot be read, for which `problem` says why. snapshot_bytes: 0 for
    none. changed: seconds since 1970."""

    id: str
    changed: float
    snapshot_bytes: int
    document: SessionDocument | None
    problem: str | None = None

    @property
    def title(self) -> str:
        return f"damaged: {self.problem}" if self.document is None else self.document.title

    @property
    def num_messages(self) -> int:
        return 0 if self.document is None else len(self.document.turns) // 2

    def to_json(self) -> dict[str, Any]:
        document = self.document
        return {
            "id": self.id,
            "name": None if document is None else document.name,
            "title": self.title,
            "model": None if document is None else document.model,
            "messages": self.num_messages,
            "changed": self.changed,
            "cache_bytes": self.snapshot_bytes,
            "problem": self.problem,
        }


class SessionLock:
    """Keeps a session to one process, until `release` or the end of the process."""

    def __init__(self, lock: "BaseFileLock", path: Path) -> None:
        self._lock, self._path = lock, path

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if os.name != "nt":  # There an open file cannot be removed; it is empty.
                self._path.unlink(missing_ok=True)
        self._lock.release()


@dataclass(frozen=True)
class SessionArchive:
    """directory: need not exist. newest, max_snapshot_bytes: what is kept."""

    directory: Path
    newest: int = NEWEST
    max_snapshot_bytes: int = MAX_SNAPSHOT_BYTES

    def document_path(self, session_id: str) -> Path:
        return self.directory / f"{session_id}{DOCUMENT}"

    def snapshot_path(self, session_id: str) -> Path:
        return self.directory / f"{session_id}{SNAPSHOT}"

    def sessions(self) -> list[StoredSession]:
        """All, the one that was changed last first."""
        found = [self._stored(session_id) for session_id in self._ids()]
        return sorted(
            (each for each in found if each is not None),
            key=lambda each: (each.changed, each.id),
            reverse=True,
        )

    def find(self, wanted: str) -> str:
        """The ID that an ID, the first characters of just one, a name, or "last" means. Raises
        NotFoundError."""
        sessions = self.sessions()
        if wanted == LAST and sessions:
            readable = (each.id for each in sessions if each.document is not None)
            return next(readable, sessions[0].id)
        named = [e.id for e in sessions if e.document is not None and e.document.name == wanted]
        matches = named[:1] or [each.id for each in sessions if each.id == wanted]
        if not matches and wanted[:1].isdigit():
            matches = [each.id for each in sessions if each.id.startswith(wanted)]
        if len(matches) == 1:
            return matches[0]
        what = "there is no session yet" if not sessions else f"no session is called {wanted!r}"
        if matches:
            what = f"{len(matches)} sessions begin with {wanted!r}"
        raise NotFoundError(what, fix="`localr1 sessions` lists them.")

    def load(self, session_id: str) -> SessionDocument:
        """Raises NotFoundError and FormatError."""
        path = self.document_path(session_id)
        return SessionDocument.from_bytes(read_bounded(path, str(path), MAX_BYTES), path)

    def save(self, document: SessionDocument) -> None:
        """Raises OutputError; what was there before is as it was then."""
        assert is_id(document.id)
        private_directory(self.directory)
        write_private(self.document_path(document.id), [document.to_bytes()])

    def rename(self, document: SessionDocument, name: str) -> None:
        """Give it a name that no other has. Raises UsageError, OutputError."""
        name = checked_name(name)
        for each in self.sessions():
            if each.id != document.id and each.document is not None and each.document.name == name:
                raise OutputError(
                    f"a session is called {name!r} already",
                    fix=f"Choose another name, or delete that one: /sessions rm {name}",
                )
        document.name = name

    def take(self, session_id: str) -> SessionLock:
        """Keep other processes from the session. Raises OutputError where one has it open."""
        from filelock import FileLock, Timeout

        private_directory(self.directory)
        path = self.directory / f"{session_id}{LOCK}"
        lock = FileLock(path, mode=0o600)
        while True:
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise OutputError(
                    f"the session {session_id} is open in another localr1",
                    fix="Leave that one first, or go on with another session.",
                ) from error
            except OSError as error:
                raise OutputError(f"{path} cannot be made", found=error.strerror) from error
            if os.name == "nt" or path.exists():
                return SessionLock(lock, path)
            lock.release()  # Whoever had it removed the file between our open and our lock.

    def delete(self, session_id: str) -> None:
        """The conversation and its snapshot. Raises OutputError where it is open or stays."""
        lock = self.take(session_id)
        try:
            for path in self._files(session_id):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.directory}: session {session_id} cannot be deleted", found=error.strerror
            ) from error
        finally:
            lock.release()

    def prune(self) -> None:
        """Delete what is more than is kept. What cannot be deleted, or is open, stays."""
        sessions = self.sessions()
        unnamed = [e for e in sessions if e.document is not None and e.document.name is None]
        for each in unnamed[self.newest :]:
            with contextlib.suppress(OutputError):
                self.delete(each.id)
        self._delete_unfinished()
        total = 0
        for each in sessions:
            total += each.snapshot_bytes
            if each.snapshot_bytes and total > self.max_snapshot_bytes:
                with contextlib.suppress(OutputError):
                    self._delete_snapshot(each.id)

    def _delete_unfinished(self) -> None:
        """What a process that died was writing: long ago, as another may be writing now."""
        with contextlib.suppress(OSError):
            for path in self.directory.glob(f".*{PARTIAL}*"):
                if path.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                    path.unlink(missing_ok=True)

    def _delete_snapshot(self, session_id: str) -> None:
        lock = self.take(session_id)
        try:
            with contextlib.suppress(OSError):
                self.snapshot_path(session_id).unlink(missing_ok=True)
        finally:
            lock.release()

    def _ids(self) -> Iterator[str]:
        try:
            entries = os.listdir(self.directory)
        except OSError:
            return
        for name in entries:
            if name.endswith(DOCUMENT) and is_id(name.removesuffix(DOCUMENT)):
                yield name.removesuffix(DOCUMENT)

    def _files(self, session_id: str) -> list[Path]:
        """Also what a process that died left unfinished."""
        unfinished = [
            self.directory / name
            for name in os.listdir(self.directory)
            if name.startswith(f".{session_id}") and PARTIAL in name
        ]
        return [self.snapshot_path(session_id), *unfinished, self.document_path(session_id)]

    def _stored(self, session_id: str) -> StoredSession | None:
        try:
            changed = self.document_path(session_id).stat().st_mtime
        except OSError:
            return None  # Another process deleted it just now.
        try:
            nbytes = self.snapshot_path(session_id).stat().st_size
        except OSError:
            nbytes = 0
        try:
            document = self.load(session_id)
        except LocalR1Error as error:
            return StoredSession(session_id, changed, nbytes, None, str(error))
        return StoredSession(session_id, document.changed, nbytes, document)
