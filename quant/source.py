"""The source of a quantization: each of its files there, and hashed, when it is needed."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localr1.checkpoint.bnb import BnbCheckpoint
from localr1.checkpoint.gguf_split import part_paths
from localr1.checkpoint.hf_directory import CONFIG_NAME
from localr1.checkpoint.paths import HubOrigin, hub_origin, model_root, resolve
from localr1.checkpoint.reader import open_checkpoint
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.errors import UnsupportedError, UsageError
from localr1.models.registry import parse_config
from localr1.quant.arrival import Arrival, LocalArrival
from localr1.quant.plan import plan_quantization
from localr1.quant.recipe import Recipe, Rotation
from localr1.quant.rotation import rotated
from localr1.quant.schedule import Schedule, make_schedule
from localr1.quant.sections import Section, plan_sections
from localr1.quant.writer import FileRecord, hash_file

SOURCE_DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)

HashProgress = Callable[[int, int, str], None]
"""Called with bytes hashed, bytes in all, and the file's name."""


class Source:
    """An open checkpoint, rotated where that is asked for, whose files may still be arriving. Use
    it in a `with`.

    Raises the errors of `open_checkpoint` and `rotated`, UsageError for an arrival of what is no
    directory.
    """

    def __init__(
        self, path: Path, arrival: Arrival | None = None, rotation: Rotation | None = None
    ) -> None:
        if arrival is None and os.path.lexists(path / CONFIG_NAME):
            arrival = LocalArrival(path)
        elif arrival is not None and not path.is_dir():
            raise UsageError(f"{path}", expected="the directory of a model whose shards arrive")
        self._arrival = arrival
        files = {} if arrival is None else dict(sorted(arrival.files.items()))
        self.checkpoint: StoredCheckpoint = open_checkpoint(path, files)
        if isinstance(self.checkpoint, BnbCheckpoint) and arrival and arrival.releases:
            self.checkpoint.close()
            raise UnsupportedError(
                f"{path}: a checkpoint of bitsandbytes whose shards are deleted one by one",
                expected="all its files, since the sizes of its matrices are among its tensors",
                fix="Quantize it whole, and delete it then.",
            )
        self.checkpoint = rotated(self.checkpoint, rotation)
        directory = path.resolve()
        if arrival is None:
            parts = {part.name: part for part in part_paths(self.checkpoint.path)}
            documents: list[str] = []
        else:
            parts = {}
            documents = [name for name in SOURCE_DOCUMENTS if os.path.lexists(directory / name)]
        self._documents = {name: resolve(directory, name) for name in documents}
        self._gguf = parts
        self._sizes = {name: file.size for name, file in files.items()} | {
            name: part.stat().st_size for name, part in parts.items()
        }
        places = [file.path for file in files.values()] + list(parts.values())
        self.device = os.stat(places[0] if places else directory).st_dev
        """Of the disk that the shards lie on."""
        self._there = {name for name, file in files.items() if file.is_whole} | parts.keys()
        self._told = {name: file.sha256 for name, file in files.items() if file.sha256}
        self._sha256 = dict(self._told)
        self._attached = {name for name, file in files.items() if file.is_whole}
        self._hashed = 0
        self._to_hash = sum(
            size for name, size in self._sizes.items() if name not in self._sha256
        ) + sum(document.stat().st_size for document in self._documents.values())

    @property
    def origin(self) -> HubOrigin | None:
        """The repository and commit of the Hub that it is of, where that is known."""
        if self._arrival is not None:
            return self._arrival.origin
        return hub_origin(model_root(self.checkpoint.path.parent))

    @property
    def there(self) -> set[str]:
        """Files that were whole at the start."""
        return self._there

    @property
    def gone(self) -> list[str]:
        """Shards that an earlier run has deleted: only its result has what was in them."""
        return self._arrival.gone if isinstance(self._arrival, LocalArrival) else []

    @property
    def releases(self) -> bool:
        return self._arrival is not None and self._arrival.releases

    @property
    def file_names(self) -> Sequence[str]:
        """Those of its weights."""
        return list(self._sizes)

    @property
    def sha256(self) -> Mapping[str, str]:
        """What is known of the files by now."""
        return self._sha256

    def schedule(self, sections: list[Section]) -> Schedule:
        """A file that nothing is made from is counted to the first section if it must be hashed."""
        needed = [
            {file_name for item in section.items for file_name in self.files_of(item.source.name)}
            for section in sections
        ]
        used = set().union(*needed)
        needed[0] |= {name for name in self._sizes if name not in used | self._sha256.keys()}
        return make_schedule(needed, [section.nbytes for section in sections], self._sizes)

    def identity(self, documents: list[FileRecord]) -> dict[str, Any]:
        """What tells this source from others without reading its tensors, for JSON. documents: as
        `documents` returned them."""
        headers = {} if self.checkpoint.shards is None else self.checkpoint.shards.headers
        return {
            "name": self.checkpoint.path.name,
            "origin": None if self.origin is None else asdict(self.origin),
            "files": [
                [name, size, headers[name][1] if name in headers else None, self._told.get(name)]
                for name, size in self._sizes.items()
            ],
            "documents": [[record.name, record.sha256] for record in documents],
        }

    def files_of(self, name: str) -> list[str]:
        """The files that a tensor is read from."""
        shards = self.checkpoint.shards
        if shards is None:
            return list(self._gguf)
        names = (shards.file_name(stored) for stored in self.checkpoint.stored_names(name))
        # One in a folder of the directory is not among them: such are not hashed either.
        return [file_name for file_name in names if file_name in self._sizes]

    def resume(self, sha256: Mapping[str, str], progress: HashProgress | None = None) -> list[str]:
        """Go on after an interruption. sha256: of files that were used before it; those still there
        are hashed again. Returns the names of those that have changed since."""
        changed = []
        for name, digest in sha256.items():
            if name in self._there and name not in self._told:
                place = self._gguf[name] if name in self._gguf else self._wait(name)
                if self._hash(place, name, progress).sha256 != digest:
                    changed.append(name)
            self._sha256[name] = digest
        return changed

    def require(self, file_name: str, progress: HashProgress | None = None) -> None:
        """Wait for a file, open and hash it, each unless that has been done. Raises what the
        arrival raises, FormatError for another file than the one that was announced."""
        if file_name in self._gguf:
            path = self._gguf[file_name]
        else:
            path = self._wait(file_name)
            shards = self.checkpoint.shards
            assert shards is not None
            if file_name not in self._attached and file_name in shards.headers:
                shards.attach(file_name, path)
            self._attached.add(file_name)
        if file_name not in self._sha256:
            self._sha256[file_name] = self._hash(path, file_name, progress).sha256

    def release(self, file_name: str) -> None:
        """It is not needed any more."""
        if self._arrival is None:
            return
        if (shards := self.checkpoint.shards) is not None and file_name in shards.headers:
            shards.detach(file_name)
        self._attached.discard(file_name)
        self._arrival.release(file_name)

    def documents(self, progress: HashProgress | None = None) -> list[FileRecord]:
        """The JSON files that were read, hashed."""
        return [self._hash(path, name, progress) for name, path in self._documents.items()]

    def records(self, documents: list[FileRecord]) -> list[FileRecord]:
        """Of all files, when all are hashed."""
        shards = [FileRecord(name, size, self._sha256[name]) for name, size in self._sizes.items()]
        return shards + documents

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wait(self, file_name: str) -> Path:
        assert self._arrival is not None
        return self._arrival.wait(file_name)

    def _hash(self, path: Path, name: str, progress: HashProgress | None) -> FileRecord:
        def count(nbytes: int) -> None:
            self._hashed += nbytes
            if progress is not None:
                progress(self._hashed, self._to_hash, name)

        record = hash_file(path, count)
        # A file of the Hugging Face cache is a link to a blob of another name.
        return FileRecord(name, record.nbytes, record.sha256)


def plan_arrival(path: Path, arrival: Arrival, recipe: Recipe) -> Schedule:
    """In which order `quantize` will wait for the shards, and what room it will take: to be asked
    before a download begins, when the headers are there. Raises as `quantize`."""
    with Source(path, arrival, recipe.rotation) as source:
        checkpoint = source.checkpoint
        num_layers = parse_config(checkpoint.config).num_layers
        return source.schedule(plan_sections(plan_quantization(checkpoint, recipe), num_layers))
