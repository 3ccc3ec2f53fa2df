"""What of a quantization is done, so that the same command goes on where it was interrupted.

`journal.jsonl` lies beside the result in its partial directory (atomic.py), a JSON object a line:
first what is made of what (Identity), then one Entry for each section, appended when all that the
section has written is durable and was read back. A last line that is cut, as a kill or a full disk
leaves it, does not count: the next one is written over it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import localr1
from localr1.errors import OutputError
from localr1.quant.atomic import AtomicDirectory, write_all
from localr1.quant.layout import Shard
from localr1.quant.name_ranges import name_ranges
from localr1.quant.plan import Plan
from localr1.quant.writer import FileRecord

JOURNAL_NAME = "journal.jsonl"
JOURNAL_VERSION = 3

Identity = dict[str, Any]
"""What must be the same for an unfinished result to be gone on with: of each key a value that JSON
gives back as it was."""

MEANINGS = {
    "versions": "other versions of localr1 or torch",
    "source": "another source",
    "recipe": "another recipe",
    "calibration": "another text, number of tokens or calibration file",
    "layout": "other tensors in the source",
}


@dataclass(frozen=True)
class Entry:
    """One section. checksums: CRC-32C of each tensor. errors: of each item, None of a kept one.
    files: those that are whole since. source_sha256: of the source's files that were hashed for it.
    hidden: SHA-256 of the file that calibration goes on from, None where it does not.
    expert_tokens: how many tokens each routed expert saw in it."""

    section: str
    checksums: Mapping[str, int]
    errors: Mapping[str, float | None]
    files: Sequence[FileRecord]
    source_sha256: Mapping[str, str]
    hidden: str | None
    expert_tokens: Sequence[int] = ()


def versions() -> dict[str, Any]:
    """Of what decides the bytes of a result."""
    return {
        "journal": JOURNAL_VERSION,
        "localr1": localr1.__version__,
        "torch": str(torch.__version__),
    }


def identity(source: Mapping[str, Any], plan: Plan, shards: Sequence[Shard]) -> Identity:
    """source: what tells it from others, for JSON."""
    layout = hashlib.sha256()
    for shard in shards:
        layout.update(shard.file_name.encode() + shard.header)
    return {
        "versions": versions(),
        "source": dict(source),
        "recipe": {
            "rules": plan.recipe.to_json(),
            "smoothed": name_ranges(link.maker for link in plan.links),
            **({} if plan.recipe.target is None else {"target": dict(plan.recipe.target)}),
            "awq": plan.recipe.awq,
            "rotation": None if plan.recipe.rotation is None else asdict(plan.recipe.rotation),
        },
        "layout": layout.hexdigest(),
    }


class Journal:
    """The journal of an entered directory, new or gone on with; `entries` is what it holds.

    Without an entry in it, all files of the directory are removed. With one, the directory is kept
    from then on, whatever happens. Raises OutputError for one of another identity.
    """

    def __init__(self, directory: AtomicDirectory, expected: Identity) -> None:
        self._directory = directory
        self._path = directory.beside(JOURNAL_NAME)
        found, self.entries, self._end = _read(self._path)
        if self.entries:
            directory.keep = True
            _check(directory.path, found, expected)
            return
        directory.keep = False
        directory.empty()
        self._end = 0
        self._append(expected)

    def append(self, entry: Entry) -> None:
        """All files of the section are durable; so are their names, and this, on return."""
        self._directory.sync()
        self._append(asdict(entry))
        self.entries.append(entry)
        self._directory.keep = True

    def _append(self, document: Mapping[str, Any]) -> None:
        line = json.dumps(document, separators=(",", ":")).encode() + b"\n"
        file = self._directory.open_path(self._path)
        try:
            with self._directory.errors():
                file.seek(self._end)
                write_all(file, memoryview(line))
        except BaseException:
            file.close()
            raise
        self._directory.close(file)
        self._end += len(line)


def sections_done(out: Path) -> int:
    """How many sections the next `quantize` into `out` finds done, if it is of the same source,
    recipe and versions."""
    return count_entries(AtomicDirectory(out, resumes=JOURNAL_NAME))


def begun_recipe(out: Path) -> Mapping[str, Any]:
    """What the unfinished result that `quantize` into `out` would go on with is made by: of the
    Identity, "recipe". {} where there is none."""
    found = AtomicDirectory(out, resumes=JOURNAL_NAME).find()
    known, entries, _ = ({}, [], 0) if found is None else _read(found / JOURNAL_NAME)
    recipe = known.get("recipe") if entries else None
    return recipe if isinstance(recipe, dict) else {}


def count_entries(directory: AtomicDirectory) -> int:
    """Of the partial directory that would be gone on with."""
    found = directory.find()
    return 0 if found is None else len(_read(found / JOURNAL_NAME)[1])


def _read(path: Path) -> tuple[Identity, list[Entry], int]:
    """Identity and entries of what is whole, and its bytes."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        content = b""
    found: Identity = {}
    entries: list[Entry] = []
    end = 0
    for number, line in enumerate(content.splitlines(keepends=True)):
        try:
            document: Any = json.loads(line) if line.endswith(b"\n") else None
            if number:
                entries.append(_entry(document))
            else:
                found = dict(document)
        except (ValueError, TypeError, KeyError):
            break
        end += len(line)
    return found, entries, end


def _entry(document: Any) -> Entry:
    records = [FileRecord(**record) for record in document["files"]]
    return Entry(**{**document, "files": records})


def _check(out: Path, found: Identity, expected: Identity) -> None:
    for key, meaning in MEANINGS.items():
        if found.get(key) != expected.get(key):
            raise refusal(out, meaning)


def refusal(out: Path, found: str) -> OutputError:
    """Why an unfinished result is not gone on with."""
    return OutputError(
        f"{out}: an unfinished result is there",
        expected="the same source, recipe and versions as when it was begun",
        found=found,
        fix="Use --restart to throw it away and begin anew, or choose another name.",
    )
