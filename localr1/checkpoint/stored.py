"""A checkpoint as it lies in files, for those who care which, and when each must be there."""

from typing import Protocol

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.index import ShardSet


class StoredCheckpoint(Checkpoint, Protocol):
    @property
    def shards(self) -> ShardSet | None:
        """The safetensors files; None of another format."""
        ...

    def stored_names(self, name: str) -> tuple[str, ...]:
        """The tensors in the files that `read(name)` reads: more than one where codes and scales
        are presented as the numbers they stand for."""
        ...

    def __enter__(self) -> "StoredCheckpoint": ...
