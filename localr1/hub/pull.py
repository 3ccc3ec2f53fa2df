"""A model from the Hub into the Hugging Face cache, whole and verified."""

import contextlib
import http.client
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from localr1.errors import HubError, OutputError, UnreachableError
from localr1.hub.locks import BusyError, held
from localr1.hub.partial import done_bytes, partial_paths
from localr1.hub.ranges import BadAnswerError, RangeReader, StatusError
from localr1.hub.reference import Reference
from localr1.hub.repository import Hub, Listing, RemoteFile
from localr1.hub.repository_folder import RepositoryFolder
from localr1.hub.selection import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_INDEX_BYTES,
    Selection,
    documents_to_choose_by,
    select,
)
from localr1.hub.transfer import Patience, Totals, Transfer

MARGIN_BYTES: Final = 256 << 20
"""Left free on the disk."""


@dataclass(frozen=True)
class Pull:
    """What a pull will do. missing: files that are not in the cache. fetched: bytes of them that an
    earlier pull left. config: the text of config.json, None where there is none (GGUF)."""

    listing: Listing
    selection: Selection
    missing: tuple[RemoteFile, ...]
    fetched: int
    config: bytes | None
    cached: RepositoryFolder

    @property
    def nbytes(self) -> int:
        """Still to be fetched."""
        return sum({file.etag: file.size for file in self.missing}.values()) - self.fetched

    @property
    def snapshot(self) -> Path:
        return self.cached.snapshot(self.listing.commit)

    def free_bytes(self) -> int:
        """On the disk of the cache."""
        parent = self.cached.path
        while not parent.exists():
            parent = parent.parent
        return shutil.disk_usage(parent).free


def prepare(
    hub: Hub,
    reference: Reference,
    hub_cache: Path,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    patience: Patience | None = None,
) -> Pull:
    """Asks the Hub and chooses; writes nothing.

    Raises what `Hub.listing` and `select` raise.
    """
    listing = hub.listing(reference)
    cached = RepositoryFolder(hub_cache, listing.repository)
    documents = {
        file.path: _read_document(hub, listing, file, cached, patience or Patience())
        for file in documents_to_choose_by(listing.files)
    }
    selection = select(
        listing.repository, listing.files, documents.get(INDEX_NAME), include, exclude
    )
    return _with_missing(listing, selection, documents.get(CONFIG_NAME), cached)


def refreshed(pull: Pull) -> Pull:
    """The same, with what has come into the cache since."""
    return _with_missing(pull.listing, pull.selection, pull.config, pull.cached)


def check_space(pull: Pull, besides: int = 0) -> None:
    """Raises OutputError where the cache's disk is too small. besides: bytes that will be written
    there for a result."""
    free = pull.free_bytes()
    needed = pull.nbytes + besides + MARGIN_BYTES
    if free < needed:
        raise OutputError(
            f"{pull.listing.repository}: room on the disk of {pull.cached.path}",
            expected=f"{needed / 2**30:.1f} GiB",
            found=f"{free / 2**30:.1f} GiB free",
            fix="Free some (localr1 prune, localr1 rm), or set HF_HOME to a larger disk.",
        )


def fetch(
    pull: Pull,
    hub: Hub,
    *,
    jobs: int,
    progress: Callable[[Totals], None] | None = None,
    patience: Patience | None = None,
) -> Path:
    """Downloads what is missing, under the repository's lock: the snapshot's directory. An error, a
    kill or an interrupt leaves what was fetched for the next time.

    Raises what `Transfer.run` raises.
    """
    begin(pull)
    make_transfer(pull, hub, pull.missing, jobs=jobs, patience=patience).run(progress)
    return finish(pull)


def begin(pull: Pull) -> None:
    pull.cached.begin_pull(pull.listing, pull.selection.files)
    pull.cached.link_what_is_there(pull.listing.commit, pull.selection.files)


def finish_what_is_here(pull: Pull) -> Path:
    """Of a pull that misses nothing. Where another process is at the repository, the record of an
    unfinished pull is that one's, and stays."""
    pull.cached.link_what_is_there(pull.listing.commit, pull.selection.files)
    try:
        with held(pull.cached.lock_path, pull.listing.repository, reading=True):
            return finish(pull)
    except BusyError:
        return pull.snapshot


def make_transfer(
    pull: Pull,
    hub: Hub,
    files: Sequence[RemoteFile],
    *,
    jobs: int,
    patience: Patience | None = None,
    most_held: int | None = None,
) -> Transfer:
    """Of some of what is missing, in this order; not started yet. Files of the same bytes come
    once."""
    alike: dict[str, list[RemoteFile]] = {}
    for file in files:
        alike.setdefault(file.etag, []).append(file)
    return Transfer(
        [(same, pull.cached.blob(same[0])) for same in alike.values()],
        lambda file: hub.locate(pull.listing, file),
        lambda same: pull.cached.link(pull.listing.commit, same),
        jobs=jobs,
        patience=patience,
        most_held=most_held,
        otherwise=None
        if hub.has_custom_endpoint
        else lambda file: hub.fetch_whole(pull.listing, file, pull.cached.path.parent),
    )


def finish(pull: Pull) -> Path:
    """Only now does the branch mean this commit here: until then an older one stays usable."""
    pull.cached.set_ref(pull.listing.reference.revision, pull.listing.commit)
    pull.cached.end_pull()
    return pull.snapshot


def _with_missing(
    listing: Listing, selection: Selection, config: bytes | None, cached: RepositoryFolder
) -> Pull:
    missing = tuple(file for file in selection.files if not cached.has(listing.commit, file))
    partial = {partial_paths(cached.blob(file))[0] for file in missing}
    return Pull(listing, selection, missing, sum(map(done_bytes, partial)), config, cached)


def read_range(
    hub: Hub, listing: Listing, file: RemoteFile, start: int, stop: int, patience: Patience
) -> bytes:
    """A few bytes of a file, which nothing has verified. Raises as `Hub.locate`."""

    def read() -> bytes:
        return _read_once(hub, listing, file, start, stop, patience)

    return _patiently(read, f"{listing.repository}: {file.path}", patience)


def _read_document(
    hub: Hub, listing: Listing, file: RemoteFile, cached: RepositoryFolder, patience: Patience
) -> bytes:
    """A small file, verified, from the cache or the Hub into memory."""
    if file.size > MAX_INDEX_BYTES:
        raise HubError(f"{file.path}: size", expected=f"at most {MAX_INDEX_BYTES}", found=file.size)
    for path in (cached.pointer(listing.commit, file), cached.blob(file)):
        with contextlib.suppress(OSError):
            content = path.read_bytes()
            if file.is_whole(content):
                return content

    def read() -> bytes:
        content = _read_once(hub, listing, file, 0, file.size, patience)
        if not file.is_whole(content):
            raise BadAnswerError("its bytes have another hash than the Hub lists")
        return content

    return _patiently(read, f"{listing.repository}: {file.path}", patience)


def _read_once(
    hub: Hub, listing: Listing, file: RemoteFile, start: int, stop: int, patience: Patience
) -> bytes:
    if start == stop:
        return b""
    location = hub.locate(listing, file)
    reader = RangeReader(patience.stall_seconds)
    try:
        body = reader.open(location.url, location.headers, start, stop, file.size)
        content = bytearray(stop if not body.honours_range else stop - start)
        body.read_into(memoryview(content))
    finally:
        reader.close()
    return bytes(content[-(stop - start) :])


def _patiently(read: Callable[[], bytes], what: str, patience: Patience) -> bytes:
    for attempt in range(patience.failures):
        if attempt:
            time.sleep(min(patience.first_delay * 2 ** (attempt - 1), patience.longest_delay))
        try:
            return read()
        except UnreachableError as error:
            reason: Exception = error
        except (StatusError, BadAnswerError, OSError, http.client.HTTPException) as error:
            reason = error
    if isinstance(reason, UnreachableError):
        raise reason
    raise UnreachableError(
        f"{what} cannot be read",
        found=str(reason) or type(reason).__name__,
        fix="Check the network, and try again.",
    ) from reason
