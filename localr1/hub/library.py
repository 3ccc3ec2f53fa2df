"""The models on this machine: quantized here, or in the Hugging Face cache.

Which of a cache's repositories are listed: those with a GGUF file, or with a config.json whose
class is a causal language model's (describe.py). Datasets, diffusion pipelines, encoders and
whatever else other tools keep there are not. Where config.json itself is damaged, its repository is
listed and says so. Reading never fails for one bad entry: it becomes a row with a `problem`.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.paths import model_root, resolve
from localr1.errors import FormatError, LocalR1Error, NotFoundError, UsageError
from localr1.hub import describe
from localr1.hub.cached import (
    CachedRepository,
    CachedSnapshot,
    find_repository,
    read_repository,
    repository_folders,
    unique_bytes,
)
from localr1.hub.describe import Facts
from localr1.hub.downloads import read_pull
from localr1.hub.known import find_model
from localr1.settings import Settings

SHORT_COMMIT = 12
"""Digits of a commit in the name of what no revision means."""


@dataclass(frozen=True)
class LocalModel:
    """One model that can be opened, removed or verified.

    name: what the user types: NAME of a quantized model, org/name of an original, with @REVISION
    of what is not its main one and /FILE.gguf where a repository has several. path: what
    `open_checkpoint` takes. kind, quantization, context, missing: as in Facts. nbytes: on disk,
    each blob counted once. modified: seconds since 1970. repository, commit: where it comes from,
    of a quantized model where its source did. revisions: that mean the commit. files: of the
    snapshot, that make it up; () where it is all of its directory. problem: why it cannot be read.
    """

    name: str
    path: Path
    kind: str
    quantization: str
    context: int | None
    nbytes: int
    modified: float | None
    repository: str | None = None
    commit: str | None = None
    revisions: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    problem: str | None = None
    files: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        return not self.missing and self.problem is None

    @property
    def pull_name(self) -> str:
        """What `localr1 pull` calls the original: org/name, or with the revision that is not its
        main one."""
        repository = self.repository or self.name
        if self.name == repository or self.name.startswith(f"{repository}/"):
            return repository
        return f"{repository}@{(self.revisions or (self.commit,))[0]}"

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": str(self.path),
            "kind": self.kind,
            "quantization": self.quantization,
            "bytes": self.nbytes,
            "context": self.context,
            "modified": self.modified,
            "repository": self.repository,
            "commit": self.commit,
            "revisions": list(self.revisions),
            "complete": self.is_complete,
            "missing": list(self.missing),
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Library:
    """models_dir: of quantized models. hub_cache: of originals. Either may not exist."""

    models_dir: Path
    hub_cache: Path

    @staticmethod
    def of(settings: Settings) -> "Library":
        return Library(settings.data_dir / "models", settings.hub_cache)

    def models(self) -> list[LocalModel]:
        """All, quantized ones first."""
        return [*self.quantized(), *self.originals()]

    def names(self) -> list[str]:
        """Of the quantized models. One with a dot in front is still being written."""
        try:
            entries = sorted(os.listdir(self.models_dir))
        except OSError:
            return []
        return [name for name in entries if not name.startswith(".")]

    def quantized(self) -> Iterator[LocalModel]:
        if self.models_dir.is_dir() and not os.access(self.models_dir, os.R_OK | os.X_OK):
            error = PermissionError(errno.EACCES, "Permission denied", str(self.models_dir))
            yield _unreadable(str(self.models_dir), self.models_dir, error)
        for name in self.names():
            path = self.models_dir / name
            if path.is_dir() or path.suffix == ".gguf":
                yield _quantized(path)

    def originals(self) -> Iterator[LocalModel]:
        try:
            folders = list(repository_folders(self.hub_cache))
        except LocalR1Error as error:
            yield _unreadable(str(self.hub_cache), self.hub_cache, error)
            return
        for name, folder in folders:
            try:
                repository = read_repository(name, folder)
            except OSError as error:
                yield _unreadable(name, folder, error, repository=name)
                continue
            yield from models_of(repository)

    def find(self, name: str) -> LocalModel | None:
        """By the name that `models` gives it, of a repository in any case, or by an alias, which is
        the original's."""
        if name in self.names():
            return _quantized(self.models_dir / name)
        wanted = _full_name(name)
        matching = [model for model in self._of_repository(wanted) if _alike(model.name, wanted)]
        return matching[0] if matching else None

    def resolve(self, name: str) -> LocalModel | None:
        """What `name` means to a command that runs a model: a quantized model by its name; by an
        alias or org/name[@REVISION] the one quantized from that, where there is exactly one, else
        the original. None where there is neither.

        Raises UsageError where a name alone does not say which, NotFoundError for an original of
        which only a part is here, and which of its files are not.
        """
        if name in self.names():
            return _quantized(self.models_dir / name)
        wanted = _full_name(name)
        originals = self._of_repository(wanted)
        repository, _, revision = wanted.partition("@")
        chosen = [each for each in originals if _alike(each.name, wanted)]
        if not chosen:
            chosen = [each for each in originals if revision and _is_at(each, revision)]
        commit = chosen[0].commit if chosen else None
        made = [
            each
            for each in self.quantized()
            if _alike(each.repository, repository)
            and (not revision or each.commit in (commit or "", revision))
        ]
        if len(made) == 1:
            return made[0]
        if len(chosen) == 1:
            return _whole(chosen[0])
        several = chosen or ([] if revision else originals) or made
        if several:
            raise UsageError(
                f"{name} means several models here",
                expected="one of " + ", ".join(each.name for each in several),
            )
        return None

    def snapshot(self, name: str) -> CachedSnapshot | None:
        """What org/name[@REVISION] or an alias means in the cache, a language model or not."""
        wanted = _full_name(name)
        repository, _, revision = wanted.partition("@")
        found = find_repository(self.hub_cache, repository)
        if found is None:
            return None
        return found.at(revision) if revision else found.main

    def _of_repository(self, name: str) -> list[LocalModel]:
        """The originals of the repository that `name` begins with."""
        repository = "/".join(name.partition("@")[0].split("/")[:2])
        found = find_repository(self.hub_cache, repository)
        return [] if found is None else list(models_of(found))


def models_of(repository: CachedRepository) -> Iterator[LocalModel]:
    """The language models of a repository, in each of its snapshots."""
    main = repository.main
    pull = read_pull(repository.path)
    for snapshot in repository.snapshots:
        name = repository.name
        if snapshot is not main:
            name += "@" + (snapshot.revisions or (snapshot.commit[:SHORT_COMMIT],))[0]
        wanted = set(pull.names) if pull is not None and pull.commit == snapshot.commit else set()
        there = {file.name for file in snapshot.files if file.identity is not None}
        for model in _models_of_snapshot(snapshot, name):
            missing = sorted({*model.missing, *(wanted - there)})
            yield replace(model, missing=tuple(missing))


def _models_of_snapshot(snapshot: CachedSnapshot, name: str) -> Iterator[LocalModel]:
    config = snapshot.by_name.get(describe.CONFIG_NAME)
    if config is not None:
        make = partial(_original, snapshot, name)
        try:
            if config.identity is None:
                yield make(problem=f"{config.name}: {config.problem}")
                return
            document = describe.read_config(config.path)
            if describe.is_language_model(document) and not _only_gguf(snapshot):
                yield make(facts=describe.describe_directory(_reader(snapshot), snapshot.path))
                return
        except (LocalR1Error, OSError) as error:
            yield make(problem=describe.problem_of(error))
            return
    yield from _gguf_of_snapshot(snapshot, name)


def _only_gguf(snapshot: CachedSnapshot) -> bool:
    """A repository of GGUF files often has the original's config.json too."""
    names = snapshot.by_name
    return any(name.endswith(".gguf") for name in names) and not any(
        name.endswith(".safetensors") or name == describe.INDEX_NAME for name in names
    )


def _gguf_of_snapshot(snapshot: CachedSnapshot, name: str) -> Iterator[LocalModel]:
    found = describe.gguf_models(list(snapshot.by_name))
    for first, names in found.items():
        there = [each for each in names if snapshot.by_name[each].identity is not None]
        make = partial(
            _original, snapshot, name if len(found) == 1 else f"{name}/{first}", path=first
        )
        missing = describe.missing_parts(first, there)
        try:
            facts = Facts(describe.GGUF, describe.UNKNOWN, None, missing)
            if first in there:
                read = describe.describe_gguf(snapshot.path / first)
                facts = Facts(read.kind, read.quantization, read.context, missing)
            yield make(facts=facts, files=tuple(names))
        except (LocalR1Error, OSError) as error:
            yield make(problem=describe.problem_of(error), files=tuple(names))


def _original(
    snapshot: CachedSnapshot,
    name: str,
    *,
    path: str = "",
    facts: Facts | None = None,
    files: tuple[str, ...] = (),
    problem: str | None = None,
) -> LocalModel:
    facts = facts or Facts(describe.ORIGINAL, describe.UNKNOWN, None)
    cached = [snapshot.by_name[each] for each in files] or list(snapshot.files)
    bad = [file for file in cached if file.problem not in (None, "missing")]
    if problem is None and bad:
        problem = f"{bad[0].name}: {bad[0].problem}"
    gone = {file.name for file in cached if file.problem == "missing"}
    return LocalModel(
        name=name,
        path=snapshot.path / path if path else snapshot.path,
        kind=facts.kind,
        quantization=facts.quantization,
        context=facts.context,
        nbytes=unique_bytes(cached),
        modified=max((file.modified for file in cached if file.identity), default=None),
        repository=snapshot.repository,
        commit=snapshot.commit,
        revisions=snapshot.revisions,
        missing=tuple(sorted(gone | set(facts.missing))),
        problem=problem,
        files=files,
    )


def _quantized(path: Path) -> LocalModel:
    try:
        names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
        folder = path if path.is_dir() else path.parent
        status = [os.lstat(folder / name) for name in names]
        repository = commit = None
        if path.is_dir():
            facts = describe.describe_directory(partial(_in_directory, path), path)
            if MANIFEST_NAME in names:
                origin = describe.origin_of(path / MANIFEST_NAME)
                repository, commit = origin.repository, origin.commit
        else:
            facts = describe.describe_gguf(path)
    except (LocalR1Error, OSError) as error:
        return _unreadable(path.name, path, error)
    return LocalModel(
        name=path.name,
        path=path,
        kind=facts.kind,
        quantization=facts.quantization,
        context=facts.context,
        nbytes=sum(each.st_size for each in status),
        modified=max((each.st_mtime for each in status), default=None),
        repository=repository,
        commit=commit,
        missing=facts.missing,
    )


def _unreadable(
    name: str, path: Path, error: LocalR1Error | OSError, repository: str | None = None
) -> LocalModel:
    kind = describe.QUANTIZED if repository is None else describe.ORIGINAL
    problem = describe.problem_of(error)
    return LocalModel(
        name, path, kind, describe.UNKNOWN, None, _bytes_below(path), None, repository,
        problem=problem,
    )  # fmt: skip


def _bytes_below(path: Path) -> int:
    """Of the regular files directly in a directory; 0 where it cannot be read."""
    try:
        return sum(each.stat(follow_symlinks=False).st_size for each in os.scandir(path))
    except OSError:
        return 0


def _reader(snapshot: CachedSnapshot) -> "partial[Path | None]":
    return partial(_in_snapshot, snapshot)


def _in_snapshot(snapshot: CachedSnapshot, name: str) -> Path | None:
    file = snapshot.by_name.get(name)
    return None if file is None or file.identity is None else file.path


def _in_directory(folder: Path, name: str) -> Path | None:
    try:
        return resolve(model_root(folder), name)
    except (NotFoundError, FormatError):  # A name that leads out of the directory is none in it.
        return None


def _full_name(name: str) -> str:
    """With the repository in an alias's place; any other name as it is."""
    alias, at, revision = name.partition("@")
    known = find_model(alias)
    return name if known is None or known.repository is None else known.repository + at + revision


def _alike(name: str | None, wanted: str) -> bool:
    return name is not None and name.casefold() == wanted.casefold()


def _is_at(model: LocalModel, revision: str) -> bool:
    """Whether `revision` (of org/name@REVISION[/FILE]) means the model's commit."""
    name, _, file = revision.partition("/")
    for each, rest in ((revision, ""), (name, file)):
        means = each in model.revisions or (
            len(each) >= 7 and (model.commit or "").startswith(each)
        )
        if means and (not rest or rest in model.files):
            return True
    return False


def _whole(model: LocalModel) -> LocalModel:
    if model.missing:
        listed = ", ".join(model.missing[:3]) + (", ..." if len(model.missing) > 3 else "")
        raise NotFoundError(
            f"{model.name}: only a part of it is here; missing: {listed}",
            fix=f"`localr1 pull {model.pull_name}` fetches the rest.",
        )
    return model
