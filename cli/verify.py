"""`localr1 verify`: whether a model's bytes are what they should be."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from localr1.cli.confirm import can_ask, confirmed
from localr1.cli.library import one_line
from localr1.cli.output import Output, Progress, format_bytes
from localr1.errors import NotFoundError
from localr1.settings import Settings

if TYPE_CHECKING:
    from localr1.hub.cached import CachedSnapshot
    from localr1.hub.verify import Finding, Verification


@dataclass(frozen=True)
class Subject:
    """name: as it is shown. snapshot: of the cache, and which of its files; None of a path outside
    it."""

    name: str
    path: Path
    snapshot: "CachedSnapshot | None" = None
    files: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    is_in_library: bool = False


def find_subject(name: str, settings: Settings) -> Subject:
    """A path, also into a cache's snapshot, or a model as `list` names it. Raises NotFoundError."""
    from localr1.hub.library import Library

    path = Path(name)
    if path.exists():
        return subject_at(name, path)
    library = Library.of(settings)
    model = library.find(name)
    if model is None and (snapshot := library.snapshot(name)) is not None:
        # One bit of its config.json may be all that keeps it from being a language model.
        return Subject(name, snapshot.path, snapshot)
    if model is None:
        raise NotFoundError(
            f"{name}: no such model", fix="`localr1 list` names those that are here."
        )
    if model.commit is None or model.path.parent == library.models_dir:
        return Subject(model.name, model.path, is_in_library=True)
    snapshot = library.snapshot(f"{model.repository}@{model.commit}")
    if snapshot is None:
        raise NotFoundError(f"{name} was removed meanwhile")
    return Subject(model.name, model.path, snapshot, model.files, model.missing)


def subject_at(name: str, path: Path) -> Subject:
    """Of a path into a snapshot all of its models, or the GGUF model that a file belongs to."""
    from localr1.hub.cached import read_repository, snapshot_of
    from localr1.hub.library import models_of

    place = snapshot_of(path)
    if place is None:
        return Subject(name, path)
    root = next(each for each in (path, *path.parents) if each.name == place[1]).absolute()
    repository = read_repository(place[0], root.parent.parent)
    snapshot = next(each for each in repository.snapshots if each.commit == place[1])
    file = path.absolute().relative_to(root).as_posix()
    models = [
        each
        for each in models_of(repository)
        if each.commit == place[1] and (file == "." or file in each.files)
    ]
    files = () if file == "." else tuple(each for model in models for each in model.files)
    missing = tuple(sorted({each for model in models for each in model.missing}))
    return Subject(name, path, snapshot, files, missing)


def verified(subject: Subject, line: Progress) -> "Verification":
    from localr1.checkpoint.manifest import MANIFEST_NAME
    from localr1.hub import verify
    from localr1.hub.locks import model_held

    def show(done: int, total: int, file: str) -> None:
        line.update(done, total, one_line(file))

    if subject.snapshot is not None:
        return verify.verify_snapshot(
            subject.snapshot, show, names=subject.files, missing=subject.missing
        )
    if not subject.path.is_dir():
        return verify.verify_gguf_file(subject.path)
    if not (subject.path / MANIFEST_NAME).exists():
        return verify.verify_plain_directory(subject.path, show)
    from localr1.hub.verify_quantized import verify_quantized

    if not subject.is_in_library:
        return verify_quantized(subject.path, show)
    with model_held(subject.path, reading=True):
        return verify_quantized(subject.path, show)


def print_result(output: Output, subject: Subject, result: "Verification") -> None:
    name = one_line(subject.name)
    checked = f"{result.num_files:,} files, {format_bytes(result.nbytes)}"
    for finding in result.findings:
        output.line(f"{one_line(finding.file)}: {finding.kind}: {one_line(finding.detail)}")
    if result.unhashed:
        output.note(
            f"No hash is known of {len(result.unhashed):,} more "
            f"({one_line(', '.join(result.unhashed[:3]))}): of these only the form was checked."
        )
    if result.is_good:
        output.line(f"{name} is good: {checked} as they should be.")


def what_to_do(subject: Subject, findings: "Sequence[Finding]") -> str:
    from localr1.hub.verify import EXTRA

    name = one_line(subject.name)
    if subject.snapshot is not None:
        pull = f"`localr1 pull {subject.snapshot.repository}@{subject.snapshot.commit}`"
        if any(finding.path is not None for finding in findings):
            return (
                f"`localr1 verify {name} -y` moves damaged files aside; then {pull} fetches them."
            )
        return f"{pull} fetches what is missing."
    if all(finding.kind == EXTRA for finding in findings):
        return "Delete what does not belong to it."
    return "Quantize the model again, or copy the files again from where they are good."


def verify_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="As `localr1 list` names it, or a directory.")
    ],
    yes: Annotated[
        bool, typer.Option("-y", "--yes", help="Move damaged files of a download aside unasked.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Read a whole model and hold every file to its hash. Exits with 1 where something is wrong."""
    settings = Settings.from_environment()
    output = Output(color=settings.color)
    subject = find_subject(model, settings)
    with output.progress(f"Reading {one_line(subject.name)}") as line:
        result = verified(subject, line)
    moved: list[Path] = []
    bad = [finding for finding in result.findings if finding.path is not None]
    if not as_json:
        print_result(output, subject, result)
    snapshot = subject.snapshot
    if snapshot is not None and bad and (yes or (can_ask() and not as_json)):
        size = sum(finding.path.stat().st_size for finding in bad if finding.path is not None)
        question = (
            f"Move {len(bad)} damaged files ({format_bytes(size)}) aside, so that the next pull "
            "fetches them again?"
        )
        if confirmed(output, question, yes):
            from localr1.hub.verify import move_aside

            moved = move_aside(bad, snapshot)
    if as_json:
        output.json(as_document(subject, result, moved))
    elif snapshot is not None and moved:
        pull = f"`localr1 pull {snapshot.repository}@{snapshot.commit}`"
        output.note(f"Moved {len(moved)} aside: {pull} fetches them; `localr1 prune` deletes them.")
    elif result.findings:
        output.note(what_to_do(subject, result.findings))
    if not result.is_good:
        raise typer.Exit(1)


def as_document(subject: Subject, result: "Verification", moved: list[Path]) -> dict[str, object]:
    return {
        "name": subject.name,
        "path": str(subject.path),
        "good": result.is_good,
        "files": result.num_files,
        "bytes": result.nbytes,
        "without_hash": list(result.unhashed),
        "findings": [finding.to_json() for finding in result.findings],
        "moved_aside": [str(path) for path in moved],
    }
