"""A checkpoint as it lies in files, for those who care which, and when each must be there."""

from collections.abc import Iterator
from typing import Protocol

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.index import ShardSet
from localr1.checkpoint.rows import Rows


class CheckpointInPieces(Checkpoint, Protocol):
    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        """The tensor that `read` returns, in pieces of rows of at most max_nbytes of memory, one
        row at least; larger ones where a format's rows do not lie one after another. FP8 codes come
        as they are stored, unchecked. Raises as `read`, when a piece is asked for."""
        ...


class StoredCheckpoint(CheckpointInPieces, Protocol):
    @property
    def shards(self) -> ShardSet | None:
        """The safetensors files; None of another format."""
        ...

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that `read(name)` reads: more than one where codes and scales
        are presented as the numbers they stand for."""
        ...

    def __enter__(self) -> "StoredCheckpoint": ...
