"""A GGUF model in several files, as llama.cpp's gguf-split and its converter write large ones:
NAME-00001-of-00003.gguf and so on. The first holds the metadata; each says which it is (split.no,
from 0), how many there are (split.count), and how many tensors they hold together
(split.tensors.count).
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.gguf_header import GgufHeader, GgufTensor, read_header
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.paths import model_root, quoted, resolve
from localr1.errors import FormatError, TensorError

MAX_PARTS = 512
"""Each is an open file."""
PART_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True)
class GgufParts:
    """The open files of one model, with what their headers say together. tensors: by name, in the
    order of the files; `GgufTensor.part` is the number of the file."""

    files: tuple[RandomAccessFile, ...]
    metadata: Metadata
    tensors: dict[str, GgufTensor]
    is_truncated: bool

    def close(self) -> None:
        for file in self.files:
            file.close()


def part_names(name: str) -> list[str]:
    """The names of all files of a model, of which `name` is one."""
    match = PART_NAME.fullmatch(name)
    if match is None or not 1 <= int(match[3]) <= MAX_PARTS:
        return [name]
    return [f"{match[1]}-{part:05d}-of-{match[3]}.gguf" for part in range(1, int(match[3]) + 1)]


def part_paths(path: Path) -> list[Path]:
    """The files of the model at `path`, any of its parts; `path` alone if it is no whole set."""
    paths = [path.with_name(name) for name in part_names(path.name)]
    return paths if all(part.is_file() for part in paths) else [path]


def open_parts(path: Path, *, allow_truncated: bool = False) -> GgufParts:
    """Open and validate every file of the model at `path`, which may be any of its parts.

    Raises NotFoundError for a part that is not there, FormatError for parts of different models,
    and as `read_header`.
    """
    files: list[RandomAccessFile] = []
    try:
        files.append(RandomAccessFile(path))
        header = read_header(files[0], allow_truncated=allow_truncated)
        count = header.metadata.integer("split.count", 1)
        headers = [header]
        if count != 1:
            files.pop().close()
            names = _names_of_parts(path, count)
            root = model_root(path.parent)
            headers.clear()
            for name in names:
                files.append(RandomAccessFile(resolve(root, name)))
                headers.append(read_header(files[-1], allow_truncated=allow_truncated))
                _check_part(headers, len(names))
        return GgufParts(
            tuple(files),
            headers[0].metadata,
            _merged(headers),
            any(file.size < one.expected_size for file, one in zip(files, headers, strict=True)),
        )
    except BaseException:
        for file in files:
            file.close()
        raise


def split_set(names: list[str]) -> str | None:
    """The first name, if `names` are parts of one model; None else."""
    parts = part_names(names[0])
    return parts[0] if len(parts) > 1 and set(names) <= set(parts) else None


def _names_of_parts(path: Path, count: int) -> list[str]:
    names = part_names(path.name)
    if len(names) != count or not 1 < count <= MAX_PARTS or path.name not in names:
        raise FormatError(
            f"{path}: name",
            expected=f"NAME-00001-of-{count:05d}.gguf, as it says to be one of {count:,} parts"
            if 1 < count <= MAX_PARTS
            else f"at most {MAX_PARTS} parts (split.count)",
            found=f"{quoted(path.name)}, split.count {count:,}",
            fix="Give all parts the names they were published under.",
        )
    return names


def _check_part(headers: list[GgufHeader], count: int) -> None:
    """Hold the last header to what the first says of all."""
    first, metadata = headers[0].metadata, headers[-1].metadata
    total = first.integer("split.tensors.count")
    for key, expected in (
        ("split.no", len(headers) - 1),
        ("split.count", count),
        ("split.tensors.count", total),
    ):
        found = metadata.integer(key)
        if found != expected:
            raise FormatError(
                f"{metadata.shown}: {key}",
                expected=f"{expected:,}",
                found=f"{found:,}",
                fix="The files belong to different models; download them again.",
            )
    architecture = first.string("general.architecture")
    if (own := metadata.string("general.architecture", architecture)) != architecture:
        raise FormatError(
            f"{metadata.shown}: general.architecture", expected=architecture, found=quoted(own)
        )


def _merged(headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    if len(headers) == 1:
        return headers[0].tensors
    tensors: dict[str, GgufTensor] = {}
    for part, header in enumerate(headers):
        for name, stored in header.tensors.items():
            if name in tensors:
                raise TensorError(
                    f"{header.metadata.shown}: tensor {quoted(name)} is in another part too"
                )
            tensors[name] = replace(stored, part=part)
    total = headers[0].metadata.integer("split.tensors.count")
    if len(tensors) != total:
        raise TensorError(
            f"{headers[0].metadata.shown}: tensors in all {len(headers)} parts",
            expected=f"{total:,} (split.tensors.count)",
            found=f"{len(tensors):,}",
            fix="Download the parts again.",
        )
    return tensors
