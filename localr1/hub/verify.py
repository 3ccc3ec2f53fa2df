"""Whether the bytes on the disk are those that were published, or that the quantizer wrote.

Of an original each file is held to the hash that the Hub names its blob by; where the cache has no
links, and so no blobs, to the listing of the repository that huggingface_hub keeps beside it. Of a
quantized model see verify_quantized.py.
"""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.strict_json import read_object
from localr1.errors import LocalR1Error, OutputError
from localr1.hub.cached import BLOB_NAME, BLOBS, CachedFile, CachedSnapshot
from localr1.hub.describe import INDEX_NAME
from localr1.hub.locks import held, repository_lock

CHUNK: Final = 1 << 20
DAMAGED_SUFFIX: Final = ".localr1-damaged"
MISSING, DAMAGED, EXTRA, UNREADABLE = "missing", "damaged", "extra", "unreadable"
SHA1_DIGITS: Final = 40
_LISTINGS: Final = "trees"
_LOCAL_RECORDS: Final = (".cache", "huggingface", "download")
"""Where `hf download --local-dir` records the hash of each file it wrote."""

ProgressCallback = Callable[[int, int, str], None]
"""Called with bytes read, bytes in all, and the file at work."""


@dataclass(frozen=True)
class Finding:
    """kind: MISSING, DAMAGED, EXTRA (a file of weights that does not belong to the model), or
    UNREADABLE. file: its name in the model. path: of what is damaged, if it is to be moved aside.
    """

    kind: str
    file: str
    detail: str
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "file": self.file, "detail": self.detail}


@dataclass(frozen=True)
class Verification:
    """num_files, nbytes: that were held to a hash. unhashed: files for which none is known."""

    num_files: int
    nbytes: int
    unhashed: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def is_good(self) -> bool:
        return not self.findings


@dataclass(frozen=True)
class Expected:
    """digest: hexadecimal, SHA-256 or git's SHA-1 of a blob by its length. size: None where nothing
    says it."""

    digest: str
    size: int | None = None


def verify_snapshot(
    snapshot: CachedSnapshot,
    progress: ProgressCallback,
    *,
    names: Sequence[str] = (),
    missing: Sequence[str] = (),
) -> Verification:
    """names: of the snapshot's files, those of the model; () for all. missing: that the model needs
    and that are not there. Waits for nobody: raises BusyError where the repository is in use."""
    repository = snapshot.path.parent.parent
    with held(repository_lock(repository), snapshot.repository, reading=True):
        files = [snapshot.by_name[name] for name in names] or list(snapshot.files)
        listing = read_listing(repository / _LISTINGS / f"{snapshot.commit}.json")
        expected = {file.name: _expected(file, listing) for file in files}
        findings = [Finding(MISSING, name, "it is not there") for name in missing]
        findings += [
            Finding(UNREADABLE, file.name, file.problem)
            for file in files
            if file.problem is not None and file.name not in missing
        ]
        there = [file for file in files if file.problem is None]
        paths = {file.name: file.path for file in there}
        checked = check_hashes(paths, expected, progress, findings)
    if any(each.kind == DAMAGED and each.file == INDEX_NAME for each in checked.findings):
        # Which files it names means nothing.
        told = [each for each in checked.findings if each.kind != MISSING]
        return replace(checked, findings=tuple(told))
    return checked


def verify_plain_directory(folder: Path, progress: ProgressCallback) -> Verification:
    """One that is in no cache and was not quantized here: every file for which `hf download` left a
    hash, and whether index, headers and lengths fit together."""
    from localr1.checkpoint.reader import open_checkpoint

    paths = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    expected = {name: _local_record(folder, name) for name in paths}
    checked = check_hashes(paths, expected, progress, [])
    if checked.findings:
        return checked
    try:
        open_checkpoint(folder).close()
    except LocalR1Error as error:
        return _with(checked, Finding(UNREADABLE, folder.name, str(error)))
    return checked


def verify_gguf_file(path: Path) -> Verification:
    """One that is in no cache: its header says how long it must be, nothing says which bytes."""
    from localr1.checkpoint.reader import open_checkpoint

    checked = Verification(0, 0, (path.name,), ())
    try:
        open_checkpoint(path).close()
    except LocalR1Error as error:
        return _with(checked, Finding(UNREADABLE, path.name, str(error)))
    return checked


def check_hashes(
    paths: Mapping[str, Path],
    expected: Mapping[str, Expected | None],
    progress: ProgressCallback,
    findings: Sequence[Finding],
) -> Verification:
    """Reads every file of `paths` with a hash in `expected`, each once however many names it has.
    findings: what is known to be wrong already."""
    found = list(findings)
    to_read = {name: path for name, path in paths.items() if expected.get(name) is not None}
    total = sum(path.stat().st_size for path in to_read.values())
    done = nbytes = 0
    digests: dict[tuple[str, int], str] = {}
    for name, path in to_read.items():
        wanted = expected[name]
        assert wanted is not None
        key = (os.path.realpath(path), len(wanted.digest))
        size = path.stat().st_size
        try:
            if key not in digests:
                counter = partial(_count, progress, done, total, name)
                digests[key] = digest_of(path, len(wanted.digest), counter)
                nbytes += size
        except OSError as error:
            found.append(Finding(UNREADABLE, name, error.strerror or str(error), path))
        else:
            if digests[key] != wanted.digest:
                found.append(Finding(DAMAGED, name, _what_differs(path, size, wanted), path))
        done += size
    unhashed = tuple(name for name in paths if name not in to_read)
    return Verification(len(to_read), nbytes, unhashed, tuple(found))


def _count(progress: ProgressCallback, before: int, total: int, name: str, done: int) -> None:
    progress(before + done, total, name)


def digest_of(path: Path, digits: int, progress: Callable[[int], None]) -> str:
    """SHA-256 of a file, or of so few digits git's SHA-1. progress: called with bytes read."""
    with open(path, "rb", buffering=0) as file:
        if digits == SHA1_DIGITS:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        else:
            digest = hashlib.sha256()
        done = 0
        while block := file.read(CHUNK):
            digest.update(block)
            done += len(block)
            progress(done)
    return digest.hexdigest()


def read_listing(path: Path) -> dict[str, Expected]:
    """Hashes and sizes by file name, of the listing that huggingface_hub keeps for a commit; {}
    where there is none, or it is no such thing."""
    try:
        files = read_object(path, str(path)).get("files")
    except LocalR1Error:
        return {}
    found = {}
    for name, entry in files.items() if isinstance(files, Mapping) else ():
        if not isinstance(entry, Mapping):
            continue
        size, digest = entry.get("size"), entry.get("lfs_sha256") or entry.get("blob_id")
        if isinstance(digest, str) and BLOB_NAME.fullmatch(digest) and type(size) is int:
            found[name] = Expected(digest, size)
    return found


def move_aside(findings: Sequence[Finding], snapshot: CachedSnapshot) -> list[Path]:
    """Rename damaged files of a snapshot, so that the next pull fetches them again; `localr1 prune`
    deletes them. Returns where they are. Raises OutputError."""
    repository = snapshot.path.parent.parent
    moved = []
    with held(repository_lock(repository), snapshot.repository):
        for finding in findings:
            if finding.path is None:
                continue
            blob = snapshot.by_name[finding.file].blob
            # Of the store that all repositories share the bytes themselves: others must not use
            # them either.
            source = finding.path if blob is None else Path(os.path.realpath(blob))
            name = secrets.token_hex(8) if blob is None else source.name
            folder = repository / BLOBS if blob is None else source.parent
            target = folder / f"{name}{DAMAGED_SUFFIX}"
            try:
                folder.mkdir(exist_ok=True)
                os.replace(source, target)
            except FileNotFoundError:
                continue  # Another name of a blob that was moved.
            except OSError as error:
                raise OutputError(
                    f"{source} cannot be moved aside", found=error.strerror
                ) from error
            moved.append(target)
    return moved


def _expected(file: CachedFile, listing: Mapping[str, Expected]) -> Expected | None:
    listed = listing.get(file.name)
    if file.blob is None or not BLOB_NAME.fullmatch(file.blob.name):
        return listed
    return Expected(file.blob.name, None if listed is None else listed.size)


def _local_record(folder: Path, name: str) -> Expected | None:
    """Three lines: commit, hash, time."""
    record = folder.joinpath(*_LOCAL_RECORDS, f"{name}.metadata")
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = record.read_text(encoding="ascii").splitlines()
        if len(lines) >= 2 and BLOB_NAME.fullmatch(lines[1]):
            return Expected(lines[1])
    return None


def _what_differs(path: Path, size: int, expected: Expected) -> str:
    if expected.size is not None and expected.size != size:
        return f"expected {expected.size:,} bytes, found {size:,}"
    if path.suffix == ".safetensors":
        from localr1.checkpoint.safetensors_file import SafetensorsFile

        try:
            SafetensorsFile(path).close()
        except LocalR1Error as error:
            return str(error).removeprefix(f"{os.path.realpath(path)}: ")
    kind = "git SHA-1" if len(expected.digest) == SHA1_DIGITS else "SHA-256"
    return f"its {kind} is not {expected.digest[:12]}..."


def _with(checked: Verification, finding: Finding) -> Verification:
    return replace(checked, findings=(*checked.findings, finding))
