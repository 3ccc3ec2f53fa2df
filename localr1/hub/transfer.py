"""Downloads files in many ranges at once, checks their hashes on the way, and goes on where it was
stopped. Never imports torch.

A file is fetched in runs of blocks (partial.py), several runs and several files side by side, each
over a connection of its own. Behind them a file is hashed in its order, block after block as they
become complete, so that its sha256 is known soon after its last byte. One thread may wait for all
of it (`run`) or for one file after the other (`wait`); the others end when the process does.
"""

import http.client
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.errors import HubError, LocalR1Error, UnreachableError
from localr1.hub.file_task import FileTask
from localr1.hub.partial import BLOCK, PartialFile
from localr1.hub.ranges import BadAnswerError, RangeReader, StatusError
from localr1.hub.repository import Location, RemoteFile

RUN_BLOCKS: Final = 64
"""Blocks of one request: 32 MiB."""

NUM_HASHERS: Final = 2
TICK_SECONDS: Final = 0.1
CLOSE_SECONDS: Final = 0.5
LONGEST_RETRY_AFTER: Final = 300.0
_TRY_AGAIN: Final = frozenset({408, 425, 429})


@dataclass(frozen=True)
class Patience:
    """failures: in a row on one file, without a block between them, until it is given up.
    delays: seconds before the next attempt, doubling from the first to the longest. stall_seconds:
    without a byte until a connection counts as dead. damaged: how often a file may arrive whole
    but wrong."""

    failures: int = 8
    first_delay: float = 0.5
    longest_delay: float = 30.0
    stall_seconds: float = 30.0
    damaged: int = 3


@dataclass(frozen=True)
class Totals:
    """Bytes and files, done and in all. The bytes never become fewer."""

    done: int
    nbytes: int
    files_done: int
    files: int


class Transfer:
    """Files of one repository into the cache's blobs.

    Errors are raised by `run` and `wait`: AccessError and NotFoundError of the Hub,
    UnreachableError when patience is exhausted, HubError for bytes that are not those the Hub has
    listed, OutputError of the disk. Whatever ends a transfer, what was fetched stays and the next
    one goes on from it.
    """

    def __init__(
        self,
        files: Sequence[tuple[Sequence[RemoteFile], Path]],
        locate: Callable[[RemoteFile], Location],
        on_done: Callable[[Sequence[RemoteFile]], None],
        *,
        jobs: int = 8,
        patience: Patience | None = None,
        most_held: int | None = None,
        otherwise: Callable[[RemoteFile], None] | None = None,
    ) -> None:
        """files: those of the same bytes together, with their blob's path. locate: asks the Hub
        where a file's bytes are, called from several threads. on_done: called for those of each
        blob, from some thread, when it lies there.
        jobs: connections. most_held: bytes of files that may be there and not yet released; more
        only for a file that is waited for. otherwise: fetches a file on Xet storage whole to its
        blob's path, where plain HTTP is refused."""
        self._locate, self._on_done, self._otherwise = locate, on_done, otherwise
        self._patience = patience or Patience()
        self._tasks = [FileTask(same, blob) for same, blob in files]
        self._by_path = {file.path: task for task in self._tasks for file in task.files}
        self._jobs, self._most_held, self._held = jobs, most_held, 0
        self._hash_in_place = jobs > 1
        self._wanted: set[str] = set()
        self._lock = threading.Lock()
        # Whom a change concerns; a block that has come concerns a hasher only.
        self._to_fetch, self._to_hash, self._news = (
            threading.Condition(self._lock) for _ in range(3)
        )
        self._error: BaseException | None = None
        self._is_stopped = False
        self._shown = 0
        self._readers: list[RangeReader] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins, in threads of its own."""
        for _ in range(self._jobs):
            reader = RangeReader(self._patience.stall_seconds)
            self._readers.append(reader)
            self._spawn(self._fetch_all, reader)
        for _ in range(NUM_HASHERS):
            self._spawn(self._hash_all)

    def run(self, progress: Callable[[Totals], None] | None = None) -> None:
        """Until all files are there. An interrupt ends it at once."""
        self.start()
        try:
            self.finish(progress)
        finally:
            self.stop()

    def finish(self, progress: Callable[[Totals], None] | None = None) -> None:
        """Until all files are there, of a transfer that was started."""
        is_over = False
        while not is_over:
            with self._lock:
                if self._error is not None:
                    raise self._error
                is_over = all(task.is_done for task in self._tasks)
                if not is_over:
                    self._news.wait(TICK_SECONDS)
            if progress is not None:
                progress(self.totals())

    def wait(self, path: str, progress: Callable[[Totals], None] | None = None) -> Path:
        """Until this file is there, before others where there is a choice: its blob."""
        task = self._by_path[path]
        with self._lock:
            self._wanted.add(path)
            self._to_fetch.notify_all()
        while True:
            with self._lock:
                if task.is_done:
                    return task.blob
                if self._error is not None:
                    raise self._error
                self._news.wait(TICK_SECONDS)
            if progress is not None:
                progress(self.totals())

    def release(self, path: str) -> None:
        """A file that counts no longer among those held; if it has not come yet, it need not."""
        task = self._by_path[path]
        with self._lock:
            if task.partial is not None:
                self._held -= task.file.size
            task.is_dropped = task.is_dropped or not task.is_done
            task.is_done = True
            self._wake_all()

    def totals(self) -> Totals:
        with self._lock:
            done = sum(self._bytes_of(task) for task in self._tasks)
            self._shown = max(self._shown, done)
            return Totals(
                self._shown,
                sum(task.file.size for task in self._tasks),
                sum(task.is_done for task in self._tasks),
                len(self._tasks),
            )

    def stop(self) -> None:
        """Ends all threads, or leaves those that hang to themselves after half a second."""
        with self._lock:
            self._is_stopped = True
            self._wake_all()
        for reader in self._readers:
            reader.abort()
        deadline = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if not any(thread.is_alive() for thread in self._threads):
            for task in self._tasks:
                if task.partial is not None:
                    (task.partial.discard if task.is_dropped else task.partial.close)()

    @staticmethod
    def _bytes_of(task: FileTask) -> int:
        if task.is_done:
            return task.file.size
        return task.partial.done_bytes if task.partial is not None else 0

    def _spawn(self, work: Callable[..., None], *arguments: object) -> None:
        def guarded() -> None:
            try:
                work(*arguments)
            except BaseException as error:  # Goes to who waits for the transfer.
                self._fail(error)

        thread = threading.Thread(target=guarded, name="localr1-transfer", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if self._error is None and not self._is_stopped:
                self._error = error
            self._is_stopped = True
            self._wake_all()

    def _wake_all(self) -> None:
        for condition in (self._to_fetch, self._to_hash, self._news):
            condition.notify_all()

    def _is_over(self) -> bool:
        return self._is_stopped or all(task.is_done for task in self._tasks)

    # Fetching.

    def _fetch_all(self, reader: RangeReader) -> None:
        buffer = memoryview(bytearray(BLOCK))
        while (work := self._claim()) is not None:
            task, blocks = work
            try:
                self._fetch(reader, task, blocks, buffer)
            except StatusError as error:
                reader.close()
                self._refused(task, error)
            except UnreachableError as error:
                self._failed(task, error)
            except (BadAnswerError, OSError, http.client.HTTPException) as error:
                reader.close()
                self._failed(task, error)
            finally:
                with self._lock:
                    task.claimed.difference_update(blocks)
                    self._to_fetch.notify_all()
        reader.close()

    def _claim(self) -> tuple[FileTask, range] | None:
        """The next blocks to fetch; waits while there are none. None when all is done."""
        with self._lock:
            while not self._is_over():
                now = time.monotonic()
                waiting = [task.not_before for task in self._tasks if task.not_before > now]
                for task in self._startable():
                    blocks = self._claimable(task)
                    if blocks:
                        task.claimed.update(blocks)
                        return task, blocks
                self._to_fetch.wait(max(min(waiting) - now, 0.0) + 0.01 if waiting else None)
        return None

    def _startable(self) -> list[FileTask]:
        """Files under way, and as many more as there are connections and room for."""
        now, opened, result = time.monotonic(), 0, []
        for task in sorted(self._tasks, key=lambda task: not self._is_wanted(task)):
            if task.is_done or task.is_elsewhere:
                continue
            if task.partial is None:
                if opened >= self._jobs or not self._has_room(task):
                    break
                task.partial = PartialFile(task.blob, task.file.size)
                self._held += task.file.size
                self._to_hash.notify_all()  # It may be there whole, or be empty.
            opened += 1
            if task.not_before <= now:
                result.append(task)
        return result

    def _is_wanted(self, task: FileTask) -> bool:
        return any(file.path in self._wanted for file in task.files)

    def _has_room(self, task: FileTask) -> bool:
        if self._most_held is None or self._is_wanted(task) or self._held == 0:
            return True
        return self._held + task.file.size <= self._most_held

    @staticmethod
    def _claimable(task: FileTask) -> range:
        assert task.partial is not None
        if not task.in_order:
            return task.missing_run(RUN_BLOCKS)
        is_missing = not task.claimed and task.missing_run(1)
        return range(task.partial.num_blocks) if is_missing else range(0)

    def _fetch(
        self, reader: RangeReader, task: FileTask, blocks: range, buffer: memoryview
    ) -> None:
        partial, size = task.partial, task.file.size
        assert partial is not None
        location = task.location
        if location is None:
            location = task.location = self._locate(task.file)
        stop = min(blocks.stop * BLOCK, size)
        body = reader.open(location.url, location.headers, blocks.start * BLOCK, stop, size)
        if not body.honours_range and len(blocks) < partial.num_blocks:
            reader.close()
            with self._lock:  # Once more, when no other connection is at this file.
                task.in_order = True
            return
        for index in blocks:
            block = buffer[: partial.length(index)]
            body.read_into(block)
            if self._is_stopped or task.is_dropped:
                reader.close()
                return
            if partial.has(index):
                continue
            partial.write(index, block)
            with self._lock:
                task.failures = task.refusals = 0
                is_next = self._hash_in_place and index == task.num_hashed and not task.is_hashing
                task.is_hashing = task.is_hashing or is_next
                if not is_next:
                    self._to_hash.notify()
            if is_next:  # While it is at hand, and other connections receive.
                task.digest.update(block)
                with self._lock:
                    task.num_hashed += 1
                    task.is_hashing = False
                    self._to_hash.notify()

    def _refused(self, task: FileTask, error: StatusError) -> None:
        """An address is good for a while only, so a refusal is asked about once more."""
        task.location = None
        if error.status >= 500 or error.status in _TRY_AGAIN:
            self._failed(task, error, error.retry_after)
            return
        task.refusals += 1
        if task.refusals <= 1:
            return
        if self._otherwise is None or task.file.xet_hash is None:
            raise HubError(
                f"{task.file.path}: where the Hub sends for it, the answer is {error.status}",
                fix="Try again later; what has been fetched is kept.",
            )
        self._fetch_otherwise(task, self._otherwise)

    def _fetch_otherwise(self, task: FileTask, fetch: Callable[[RemoteFile], None]) -> None:
        with self._lock:
            if task.is_elsewhere:
                return
            task.is_elsewhere = True
        fetch(task.file)
        digest = task.file.new_digest()
        with open(task.blob, "rb") as file:
            while (block := file.read(BLOCK)) and not self._is_stopped:
                digest.update(block)
        if self._is_stopped:
            return
        if digest.hexdigest() != task.file.etag:
            task.blob.unlink()
            raise _wrong_bytes(task.file, digest.hexdigest(), "from Xet storage")
        self._on_done(task.files)
        with self._lock:
            task.is_done = task.is_dropped = True
            self._wake_all()

    def _failed(self, task: FileTask, error: Exception, retry_after: float | None = None) -> None:
        with self._lock:
            if self._is_stopped:
                return
            task.failures += 1
            if task.failures < self._patience.failures:
                doubled = self._patience.first_delay * 2 ** (task.failures - 1)
                delay = min(doubled, self._patience.longest_delay) * random.uniform(0.75, 1.25)
                asked = min(retry_after or 0.0, LONGEST_RETRY_AFTER)
                task.not_before = time.monotonic() + max(delay, asked)
                if task.failures > 1:  # Perhaps another server is better.
                    task.location = None
                return
        if isinstance(error, LocalR1Error):
            raise error
        raise UnreachableError(
            f"{task.file.path}: {self._patience.failures} attempts failed one after the other",
            found=str(error) or type(error).__name__,
            fix="Check the network and give the same command again; what has been fetched is kept.",
        ) from error

    # Hashing.

    def _hash_all(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        while (task := self._claim_hash()) is not None:
            try:
                self._hash(task, buffer)
            finally:
                with self._lock:
                    task.is_hashing = False
                    self._wake_all()

    def _claim_hash(self) -> FileTask | None:
        with self._lock:
            while not self._is_over():
                for task in self._tasks:
                    if task.partial is None or task.is_done or task.is_hashing:
                        continue
                    if task.hashable() or task.num_hashed == task.partial.num_blocks:
                        task.is_hashing = True
                        return task
                self._to_hash.wait()
        return None

    def _hash(self, task: FileTask, buffer: memoryview) -> None:
        partial = task.partial
        assert partial is not None
        for index in task.hashable():
            block = partial.read(index, buffer)
            is_old = index in partial.resumed
            if len(block) < partial.length(index) or (
                is_old and not partial.is_intact(index, block)
            ):
                with self._lock:
                    partial.forget(index)
                    task.first_missing = min(task.first_missing, index)
                return
            task.digest.update(block)
            task.num_hashed += 1
        if task.num_hashed == partial.num_blocks:
            self._complete(task, partial)

    def _complete(self, task: FileTask, partial: PartialFile) -> None:
        found = task.digest.hexdigest()
        if task.is_dropped:
            return
        if found == task.file.etag:
            partial.finish()
            self._on_done(task.files)
            with self._lock:
                task.is_done = True
            return
        with self._lock:
            while task.claimed and not self._is_stopped:
                self._to_fetch.wait(TICK_SECONDS)
            task.damaged += 1
            is_hopeless = task.damaged >= self._patience.damaged
            if is_hopeless:
                partial.discard()
                task.partial = None
            else:  # All at once: a connection must not find the old blocks again.
                partial.forget_all()
                task.restart_hash()
                task.first_missing, task.location = 0, None
        if is_hopeless:
            raise _wrong_bytes(task.file, found, f"{task.damaged} times over")


def _wrong_bytes(file: RemoteFile, found: str, how: str) -> HubError:
    return HubError(
        f"{file.path}: its bytes, {how}",
        expected=f"hash {file.etag}",
        found=found,
        fix="The server or something on the way (a proxy?) changes them: try another network; all "
        "other files are kept.",
    )
