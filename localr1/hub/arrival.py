"""A download as the quantizer sees it: shards that come one after the other, and may go again.

It is what `localr1.quant.arrival.Arrival` asks for. First come the small files and the header of
each shard, from which all that will be done is planned; then the shards, in the order they are
needed in.
"""

import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from localr1.checkpoint.index import ArrivingFile
from localr1.checkpoint.paths import HubOrigin
from localr1.checkpoint.safetensors_file import MAX_HEADER_BYTES
from localr1.errors import HubError
from localr1.hub.partial import BLOCK, PartialFile, partial_paths
from localr1.hub.pull import Pull, begin, finish, make_transfer, read_range
from localr1.hub.repository import Hub, RemoteFile
from localr1.hub.transfer import Patience, Totals, Transfer

_LENGTH: Final = struct.Struct("<Q")


class DownloadArrival:
    """Use it in a `with`, under the repository's lock. Leaving it stops the download; what has come
    stays for the next time, but for what was released.

    Raises what `Transfer` raises, from `open`, `wait` and `finish`.
    """

    def __init__(
        self,
        pull: Pull,
        hub: Hub,
        *,
        jobs: int,
        releases: bool,
        on_progress: Callable[[Totals], None],
        patience: Patience | None = None,
    ) -> None:
        """releases: whether shards are deleted as soon as they are not needed any more.
        on_progress: called while somebody waits."""
        self._pull, self._hub, self._jobs = pull, hub, jobs
        self._releases, self._on_progress = releases, on_progress
        self._patience = patience or Patience()
        missing = set(pull.missing)
        self._shards = {file.path: file for file in pull.selection.weights}
        self._missing = [file for file in pull.selection.weights if file in missing]
        self._documents = [file for file in pull.missing if file.path not in self._shards]
        self._transfer: Transfer | None = None
        self._most_held: int | None = None
        self._gone: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._transfer is not None:
            self._transfer.stop()

    @property
    def directory(self) -> Path:
        return self._pull.snapshot

    @property
    def files(self) -> Mapping[str, ArrivingFile]:
        """Each with at least its header, once `open` was called."""
        missing = {file.path for file in self._missing}
        return {
            path: ArrivingFile(
                partial_paths(self._pull.cached.blob(file))[0]
                if path in missing
                else self._path(path),
                file.size,
                file.etag if len(file.etag) == 64 else None,
                is_whole=path not in missing,
            )
            for path, file in self._shards.items()
        }

    @property
    def origin(self) -> HubOrigin | None:
        return HubOrigin(self._pull.listing.repository, self._pull.listing.commit)

    @property
    def releases(self) -> bool:
        return self._releases

    def open(self) -> None:
        """Fetches the documents, and the header of each shard."""
        begin(self._pull)
        make_transfer(
            self._pull, self._hub, self._documents, jobs=self._jobs, patience=self._patience
        ).run()
        self._fetch_headers()

    def schedule(self, order: Sequence[str], most_held: int | None) -> None:
        """order: of the shards, as they will be needed. most_held: bytes of them that may lie there
        before they are asked for; None: any."""
        places = {path: number for number, path in enumerate(order)}
        self._missing.sort(key=lambda file: places.get(file.path, len(places)))
        self._most_held = most_held

    def wait(self, file_name: str) -> Path:
        """The shard, whole and verified. The first call begins the download: by then those that
        an earlier run has done with have been released."""
        if any(file.path == file_name for file in self._missing):
            self._begun().wait(file_name, self._on_progress)
        return self._path(file_name)

    def release(self, file_name: str) -> None:
        """Deletes the shard, if that is wanted; it does not come again."""
        if not self._releases or file_name in self._gone:
            return
        self._gone.add(file_name)
        file = self._shards[file_name]
        if file in self._missing:
            if self._transfer is None:
                self._missing.remove(file)
            else:
                self._transfer.release(file_name)
        self._pull.cached.delete(self._pull.listing.commit, file)

    def totals(self) -> Totals | None:
        """How far it is, once it has begun."""
        return None if self._transfer is None else self._transfer.totals()

    def finish(self) -> Path | None:
        """Fetches what nobody has waited for: the snapshot's directory. None where shards were
        released: then there is no source any more."""
        if self._releases:
            return None
        self._begun().finish(self._on_progress)
        return finish(self._pull)

    def _begun(self) -> Transfer:
        if self._transfer is None:
            self._transfer = make_transfer(
                self._pull,
                self._hub,
                self._missing,
                jobs=self._jobs,
                patience=self._patience,
                most_held=self._most_held,
            )
            self._transfer.start()
        return self._transfer

    def _path(self, file_name: str) -> Path:
        return self.directory.joinpath(*file_name.split("/"))

    def _fetch_headers(self) -> None:
        """In threads that end with the process, so that nobody who interrupts waits for them."""
        left = list(self._missing)[::-1]
        errors: list[BaseException] = []

        def work() -> None:
            while left and not errors:
                try:
                    self._fetch_header(left.pop())
                except IndexError:
                    return
                except BaseException as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(self._jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
        if errors:
            raise errors[0]

    def _fetch_header(self, file: RemoteFile) -> None:
        """The blocks that hold a shard's header, into its partial file."""
        if file.size < _LENGTH.size:
            raise HubError(f"{file.path}: bytes", expected="a safetensors file", found=file.size)
        partial = PartialFile(self._pull.cached.blob(file), file.size)
        try:
            buffer = memoryview(bytearray(BLOCK))
            self._fetch_blocks(partial, file, 1)
            (length,) = _LENGTH.unpack_from(partial.read(0, buffer))
            if length > min(MAX_HEADER_BYTES, file.size):
                raise HubError(
                    f"{file.path}: header",
                    expected=f"at most {min(MAX_HEADER_BYTES, file.size)} bytes",
                    found=length,
                )
            self._fetch_blocks(partial, file, -(-(_LENGTH.size + length) // BLOCK))
        finally:
            partial.close()

    def _fetch_blocks(self, partial: PartialFile, file: RemoteFile, count: int) -> None:
        missing = [index for index in range(count) if not partial.has(index)]
        if not missing:
            return
        start, stop = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, file.size)
        content = memoryview(
            read_range(self._hub, self._pull.listing, file, start, stop, self._patience)
        )
        for index in missing:
            begin = index * BLOCK - start
            partial.write(index, content[begin : begin + partial.length(index)])
