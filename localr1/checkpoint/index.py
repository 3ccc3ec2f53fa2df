"""All safetensors files of a directory as one: `model.safetensors`, or shards behind an index."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.paths import quoted, resolve
from localr1.checkpoint.rows import Rows, pieces_by
from localr1.checkpoint.safetensors_file import SafetensorsFile
from localr1.checkpoint.strict_json import expect, kind_of, optional, read_object, required
from localr1.errors import (
    CheckpointError,
    FormatError,
    NotFoundError,
    TensorError,
    UnsupportedError,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
MAX_INDEX_TENSORS = 500_000
MAX_SHARDS = 2_000
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NOMINAL_BYTES = 2
"""Bytes a value in the total_size of DeepSeek's FP8 releases: V3 and R1 state 1,369,062,772,000,
two bytes for each of their 684,531,386,000 values, although most are stored in one."""


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file. file_name: in the directory. path: the file itself, which may be elsewhere
    (paths.py). offset, nbytes: where in it."""

    file_name: str
    path: Path
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


@dataclass(frozen=True)
class ArrivingFile:
    """A shard that need not be there whole. path: a file that begins with its header; only if
    is_whole is there more to it. size: bytes of the whole shard. sha256: of it, where known."""

    path: Path
    size: int
    sha256: str | None
    is_whole: bool


class ShardSet:
    """The shards of one directory. Every shard's header is read and checked against the index; no
    tensor is read. Raises NotFoundError, FormatError, TensorError, TruncatedError.

    arriving: shards that lie elsewhere, by the names they have in the directory.
    """

    def __init__(self, root: Path, arriving: Mapping[str, ArrivingFile] | None = None) -> None:
        self._arriving = arriving or {}
        self._shards: dict[str, SafetensorsFile] = {}
        self._home: dict[str, str] = {}
        self.tensors: dict[str, TensorInfo] = {}
        try:
            # As transformers: the single file goes before an index.
            if SINGLE_NAME in self._arriving or _exists(root, SINGLE_NAME):
                self._open(root, SINGLE_NAME)
            elif _exists(root, INDEX_NAME):
                self._open_index(root)
            else:
                raise _nothing_to_read(root)
        except BaseException:
            self.close()
            raise

    def read(self, name: str) -> Tensor:
        return self._shards[self.file_name(name)].read(name)

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """As SafetensorsFile's."""
        return self._shards[self.file_name(name)].read_rows(name, begin, end)

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        """As StoredCheckpoint's."""
        info = self.tensors.get(name)
        if info is None:
            raise TensorError(f"the checkpoint has no tensor {quoted(name)}")
        read = partial(self.read_rows, name)
        return pieces_by(read, info.shape, info.nbytes, max_nbytes)

    def file_name(self, name: str) -> str:
        """The shard that a tensor lies in."""
        file_name = self._home.get(name)
        if file_name is None:
            raise TensorError(f"the checkpoint has no tensor {quoted(name)}")
        return file_name

    def location(self, name: str) -> FileRange:
        """Where a tensor's bytes lie."""
        file_name = self.file_name(name)
        shard = self._shards[file_name]
        offset, nbytes = shard.location(name)
        return FileRange(file_name, shard.path, offset, nbytes)

    @property
    def headers(self) -> dict[str, tuple[int, str]]:
        """Size of each shard and SHA-256 of its header, by name."""
        return {name: (shard.size, shard.header_sha256) for name, shard in self._shards.items()}

    def attach(self, file_name: str, path: Path) -> None:
        """A shard is whole now and lies at `path`: its tensors can be read. Raises as
        `SafetensorsFile.attach`."""
        self._shards[file_name].attach(path)

    def detach(self, file_name: str) -> None:
        """Close a shard: its tensors cannot be read any more."""
        self._shards[file_name].close()

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def _open(self, root: Path, file_name: str) -> None:
        arriving = self._arriving.get(file_name)
        if arriving is None:
            shard = SafetensorsFile(resolve(root, file_name))
        else:
            shard = SafetensorsFile(arriving.path, arriving.size)
            if arriving.is_whole:
                shard.attach(arriving.path)
        self._shards[file_name] = shard
        for name, info in shard.tensors.items():
            if name in self._home:
                first = self._shards[self._home[name]].path
                raise TensorError(
                    f"tensor {quoted(name)} is in two files",
                    expected="one",
                    found=f"{first.name} and {shard.path.name}",
                )
            self._home[name] = file_name
            self.tensors[name] = info

    def _open_index(self, root: Path) -> None:
        shown = str(root / INDEX_NAME)
        index = _read_index(root)
        weight_map = _weight_map(index, shown)
        file_names = sorted(set(weight_map.values()))
        if len(file_names) > MAX_SHARDS:
            raise FormatError(
                f"{shown}: too many files",
                expected=f"at most {MAX_SHARDS:,}",
                found=len(file_names),
            )
        for file_name in file_names:
            try:
                self._open(root, file_name)
            except NotFoundError as error:
                raise NotFoundError(
                    f"{shown}: the file {quoted(file_name)} is missing",
                    fix="Download it, or the whole model again.",
                ) from error
        self._check_map(weight_map, shown)
        self._check_total(index, shown)

    def _check_map(self, weight_map: dict[str, str], shown: str) -> None:
        for name, file_name in weight_map.items():
            if name not in self._shards[file_name].tensors:
                raise TensorError(
                    f"{shown}: tensor {quoted(name)}",
                    expected=f"it in {quoted(file_name)}",
                    found="it in another file" if name in self._home else "it in no file",
                    fix="Files of different models may be mixed; download the model again.",
                )
        for name in self._home:
            if name not in weight_map:
                path = self._shards[self._home[name]].path
                raise TensorError(
                    f"{path}: tensor {quoted(name)} is not in {INDEX_NAME}",
                    fix="Files of different models may be mixed; download the model again.",
                )

    def _check_total(self, index: dict[str, Any], shown: str) -> None:
        """total_size, where given, must be the bytes of the tensors, or one of the two other sums
        that released checkpoints carry there: the bytes of the files, or two bytes for every
        value."""
        metadata = optional(index, "metadata", dict, shown) or {}
        total = metadata.get("total_size")
        if total is None:
            return
        if isinstance(total, bool) or not isinstance(total, int | float):
            raise FormatError(
                f"{shown}: total_size",
                expected="an integer",
                found=f"{kind_of(total)} {quoted(total)}",
            )
        tensor_bytes = sum(info.nbytes for info in self.tensors.values())
        file_bytes = sum(shard.size for shard in self._shards.values())
        nominal = NOMINAL_BYTES * sum(_values(info.shape) for info in self.tensors.values())
        if total not in (tensor_bytes, file_bytes, nominal):
            raise FormatError(
                f"{shown}: total_size does not fit the files",
                expected=f"{tensor_bytes:,} bytes of tensors",
                found=f"{total:,}",
                fix="A file may be of another model or revision; download the model again.",
            )


def _values(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def indexed_files(root: Path) -> set[str]:
    """The names of a model's shards, whether they are there or not, where `root` has an index; else
    of the single file. Raises FormatError, UnsupportedError as ShardSet."""
    if not _exists(root, INDEX_NAME):
        return {SINGLE_NAME}
    return set(_weight_map(_read_index(root), str(root / INDEX_NAME)).values())


def _read_index(root: Path) -> dict[str, Any]:
    shown = str(root / INDEX_NAME)
    return read_object(resolve(root, INDEX_NAME), shown, max_bytes=MAX_INDEX_BYTES)


def _weight_map(index: dict[str, Any], shown: str) -> dict[str, str]:
    weight_map = required(index, "weight_map", dict, shown)
    if not 0 < len(weight_map) <= MAX_INDEX_TENSORS:
        raise FormatError(
            f"{shown}: weight_map",
            expected=f"1 to {MAX_INDEX_TENSORS:,} tensors",
            found=f"{len(weight_map):,}",
        )
    for name, file_name in weight_map.items():
        expect(file_name, str, f"{shown}: weight_map: {quoted(name)}")
        if not file_name.endswith(".safetensors"):
            raise UnsupportedError(
                f"{shown}: weight_map: {quoted(name)}",
                expected="a .safetensors file",
                found=quoted(file_name),
            )
    return weight_map


def _exists(root: Path, name: str) -> bool:
    return os.path.lexists(root / name)


def _nothing_to_read(root: Path) -> CheckpointError | NotFoundError | UnsupportedError:
    """The error for a directory without safetensors, by what is there instead."""
    names = sorted(os.listdir(root))
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    shards = [name for name in names if name.endswith(".safetensors")]
    if shards:
        return NotFoundError(
            f"{root}: no {INDEX_NAME}",
            expected=f"{SINGLE_NAME}, or {INDEX_NAME} beside its files",
            found=quoted(", ".join(shards[:3])),
        )
    if pickles:
        return UnsupportedError(
            f"{root}: only pickled weights are here ({quoted(pickles[0])})",
            fix="A pickle can run any program when it is opened, so localr1 never opens one. "
            "Use a release of the model in safetensors, or convert it where you trust it.",
        )
    return NotFoundError(
        f"{root}: no weights", expected=f"{SINGLE_NAME}, {INDEX_NAME} or one .gguf file"
    )
