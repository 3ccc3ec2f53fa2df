"""Removing models: what would go, and taking it away. What another revision of the repository or
another repository uses stays.

The order is that of huggingface_hub: names of revisions, snapshots, blobs; at no moment does
something that is still there lead to something that is not.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localr1.checkpoint.paths import SHARED_STORE
from localr1.errors import NotFoundError, OutputError
from localr1.hub.cached import (
    BLOBS,
    REFS,
    CachedFile,
    CachedRepository,
    find_repository,
    read_repository,
)
from localr1.hub.downloads import PULL_NAME, allocated_bytes, partial_files, read_pull
from localr1.hub.library import Library, LocalModel, models_of
from localr1.hub.locks import BusyError, held, model_held, repository_lock
from localr1.hub.trash import delete, left_trash, move_to_trash, new_trash


@dataclass(frozen=True)
class Removal:
    """names: that it removes, as `list` has them. folder: the model's directory, or the whole
    repository's in the cache. commits: of the repository, those whose snapshot goes; files: of one,
    those that go, where others stay. nbytes: the disk has more of then. kept: of what goes, bytes
    that others use and that stay."""

    names: tuple[str, ...]
    folder: Path
    nbytes: int
    kept: int = 0
    repository: str | None = None
    commits: tuple[str, ...] = ()
    files: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "path": str(self.folder),
            "repository": self.repository,
            "bytes": self.nbytes,
            "shared_bytes": self.kept,
        }


def plan_removals(names: Sequence[str], library: Library) -> list[Removal]:
    """What removing the models `names` takes, in the order of their first mention; those of one
    repository together. Raises NotFoundError for what is not here, and BusyError for what is still
    being written."""
    models: dict[str, list[LocalModel]] = {}
    removals: dict[str, Removal] = {}
    for name in dict.fromkeys(names):
        model = library.find(name)
        if model is None:
            repository = _partial_repository(name, library)
            models.setdefault(repository, [])
        elif model.repository is None or model.path.parent == library.models_dir:
            removals[model.name] = _of_directory(model)
        else:
            models.setdefault(model.repository, []).append(model)
    for name, chosen in models.items():
        found = find_repository(library.hub_cache, name)
        if found is None:
            raise NotFoundError(f"{name} cannot be read", fix="Remove its directory by hand.")
        removals[name] = _of_repository(found, chosen)
    return list(removals.values())


def remove(removal: Removal, library: Library) -> None:
    """Carry it out, and what an earlier one has left. Raises BusyError, and OutputError that names
    what could not be removed."""
    what = ", ".join(removal.names)
    with _told(what):
        _clear(library.models_dir, library.hub_cache)
    if removal.repository is None:
        with model_held(removal.folder), _told(what):
            if os.path.lexists(removal.folder):
                delete(move_to_trash(removal.folder))
        return
    with held(repository_lock(removal.folder), what), _told(what):
        _clear(removal.folder)
        if removal.folder.is_symlink():
            raise OutputError(
                f"{removal.folder} is a link to {os.path.realpath(removal.folder)}",
                fix="Remove both by hand.",
            )
        repository = read_repository(removal.repository, removal.folder)
        leaves_nothing = _leaves_nothing(removal, repository)
        if not leaves_nothing or _has_shared(repository):
            _delete_parts(removal, repository)
        if leaves_nothing:
            delete(move_to_trash(removal.folder))


def _of_directory(model: LocalModel) -> Removal:
    return Removal((model.name,), model.path, 0 if model.path.is_symlink() else model.nbytes)


def _of_repository(repository: CachedRepository, models: Sequence[LocalModel]) -> Removal:
    """models: to go; none: only what was not fetched to its end."""
    of_commit = Counter(model.commit for model in models_of(repository))
    chosen = Counter(model.commit for model in models)
    # The last GGUF files of a snapshot take with them what lies beside them.
    whole = {each for each, count in chosen.items() if count == of_commit[each]}
    if not models and (pull := read_pull(repository.path)) is not None:
        whole = {pull.commit}
    commits = tuple(sorted(each for each in whole if each is not None))
    files = tuple(
        (model.commit, model.files)
        for model in models
        if model.commit and model.commit not in whole
    )
    names = tuple(model.name for model in models) or (repository.name,)
    removal = Removal(names, repository.path, 0, 0, repository.name, commits, files)
    going, staying = _divide(removal, repository)
    freed = {file.identity: file for file in going if file.identity is not None}
    kept = {file.identity for file in staying}
    kept |= {each for each, file in freed.items() if _is_shared_elsewhere(file, repository.path)}
    nbytes = sum(file.nbytes for each, file in freed.items() if each not in kept)
    nbytes += sum(allocated_bytes(path) for path in _unfinished(removal, repository))
    lost = sum(file.nbytes for each, file in freed.items() if each in kept)
    return Removal(names, repository.path, nbytes, lost, repository.name, commits, files)


def _partial_repository(name: str, library: Library) -> str:
    """The repository of a download that is not finished, of which no model is here yet."""
    found = find_repository(library.hub_cache, name.partition("@")[0])
    if found is not None and read_pull(found.path) is not None:
        return found.name
    partial = f".{name}.partial-"
    with contextlib.suppress(OSError):
        if any(each.startswith(partial) for each in os.listdir(library.models_dir)):
            with model_held(library.models_dir / name):
                pass
            raise NotFoundError(
                f"{name} was never finished", fix="`localr1 prune` removes what is left of it."
            )
    there = ", ".join(model.name for model in library.models()) or "none"
    raise NotFoundError(f"{name} is not here", fix=f"Models here: {there}.")


def _divide(
    removal: Removal, repository: CachedRepository
) -> tuple[list[CachedFile], list[CachedFile]]:
    """The files of all snapshots that go, and that stay."""
    some: dict[str, set[str]] = {}
    for commit, names in removal.files:
        some.setdefault(commit, set()).update(names)
    going: list[CachedFile] = []
    staying: list[CachedFile] = []
    for snapshot in repository.snapshots:
        for file in snapshot.files:
            goes = snapshot.commit in removal.commits or file.name in some.get(
                snapshot.commit, set()
            )
            (going if goes else staying).append(file)
    return going, staying


def _unfinished(removal: Removal, repository: CachedRepository) -> Iterator[Path]:
    """What an unfinished pull of the commits that go has left."""
    pull = read_pull(repository.path)
    remaining = {each.commit for each in repository.snapshots} - set(removal.commits)
    goes_on = pull is not None and (pull.commit in remaining or removal.files)
    if not goes_on:
        for partial in partial_files(repository.path, pull):
            if partial.is_ours:
                yield from partial.paths
        if pull is not None:
            yield repository.path / PULL_NAME


def _leaves_nothing(removal: Removal, repository: CachedRepository) -> bool:
    """Whether the whole folder may go: no other program's download is under way in it either."""
    commits = {snapshot.commit for snapshot in repository.snapshots}
    pull = read_pull(repository.path)
    theirs = [each for each in partial_files(repository.path, pull) if not each.is_ours]
    return commits <= set(removal.commits) and not removal.files and not theirs


def _has_shared(repository: CachedRepository) -> bool:
    files = (file for snapshot in repository.snapshots for file in snapshot.files)
    return any(_shared_target(file) is not None for file in files)


def _delete_parts(removal: Removal, repository: CachedRepository) -> None:
    going, staying = _divide(removal, repository)
    used = {file.blob for file in staying}
    blobs = {file.blob: file for file in going if file.blob is not None and file.blob not in used}
    trash = new_trash(repository.path)
    trash.mkdir()
    bin_number = 0

    def throw(path: Path) -> None:
        nonlocal bin_number
        bin_number += 1
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, trash / str(bin_number))

    for snapshot in repository.snapshots:
        if snapshot.commit in removal.commits:
            for revision in snapshot.revisions:
                throw(repository.path.joinpath(REFS, *revision.split("/")))
            throw(repository.path / "trees" / f"{snapshot.commit}.json")
            throw(snapshot.path)
    for commit, names in removal.files:
        for snapshot in repository.snapshots:
            if snapshot.commit == commit:
                for name in names:
                    throw(snapshot.by_name[name].path)
    shared = [blob for blob, file in blobs.items() if _shared_target(file) is not None]
    for blob in blobs:
        if blob not in shared:
            throw(blob)
    for path in _unfinished(removal, repository):
        throw(path)
    if shared:
        let_go_of_shared(repository.path.parent, shared)
    delete(trash)


def let_go_of_shared(cache: Path, blobs: Iterable[Path]) -> None:
    """Blobs that are links into the store of all repositories: huggingface_hub keeps the lists of
    who uses what there, and deletes what nobody does."""
    from huggingface_hub import DeleteCacheStrategy

    DeleteCacheStrategy(
        expected_freed_size=0,
        blobs=frozenset(blobs),
        refs=frozenset(),
        repos=frozenset(),
        snapshots=frozenset(),
        cache_dir=cache,
    ).execute()


def _shared_target(file: CachedFile) -> Path | None:
    """Where in the shared store a file's bytes lie; None of one with its own."""
    if file.blob is None or not is_shared_blob_link(file.blob):
        return None
    return Path(os.path.realpath(file.blob))


def is_shared_blob_link(blob: Path) -> bool:
    """Whether an entry of a repository's blobs leads into the store of all repositories."""
    target = Path(os.path.realpath(blob))
    return blob.is_symlink() and target.parent.parent.name == SHARED_STORE


def _is_shared_elsewhere(file: CachedFile, repository: Path) -> bool:
    """Whether another repository links to the same bytes, by the store's list; if in doubt, yes."""
    target = _shared_target(file)
    if target is None:
        return False
    try:
        lines = target.with_name(target.name + ".refs").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return True
    others = [repository.parent / line for line in lines if not line.startswith("/")]
    return any(
        other.parent != repository / BLOBS and os.path.realpath(other) == str(target)
        for other in others
    )


def _clear(*folders: Path) -> None:
    for folder in folders:
        for path in left_trash(folder):
            delete(path)


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    try:
        yield
    except BusyError:
        raise
    except OSError as error:
        raise OutputError(
            f"{what} cannot be removed: {error.filename}",
            found=error.strerror,
            fix="What is left is removed by trying again.",
        ) from error
