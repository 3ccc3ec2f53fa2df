"""What a quantization has written so far, read as a checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.checkpoint.rows import Rows, pieces_by
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.layout import Shard
from localr1.quant.writer import DTYPES


class WrittenCheckpoint:
    """A `CheckpointInPieces` of the planned tensors; one can be read when it has been put. `read`
    and `pieces` raise OutputError when its file cannot be read."""

    format = "safetensors"

    def __init__(
        self, directory: AtomicDirectory, shards: Sequence[Shard], config: Mapping[str, Any]
    ) -> None:
        """config: what becomes config.json."""
        self._directory = directory
        self._shard_of = {tensor.name: shard for shard in shards for tensor in shard.tensors}
        self.config = config
        self.generation_config: Mapping[str, Any] = {}
        self.tensors = {
            tensor.name: TensorInfo(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes)
            for shard in shards
            for tensor in shard.tensors
        }

    @property
    def path(self) -> Path:
        return self._directory.resolve("")

    def read(self, name: str) -> Tensor:
        info = self.tensors[name]
        return self._read_rows(name, 0, info.shape[0] if info.shape else 1).view(info.shape)

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        info = self.tensors[name]
        read = partial(self._read_rows, name)
        return pieces_by(read, info.shape, info.nbytes, max_nbytes)

    def _read_rows(self, name: str, begin: int, end: int) -> Tensor:
        info, shard = self.tensors[name], self._shard_of[name]
        row_nbytes = info.nbytes // (info.shape[0] if info.shape else 1)
        data = bytearray((end - begin) * row_nbytes)
        with self._directory.errors(), open(self._directory.resolve(shard.file_name), "rb") as file:
            file.seek(shard.offsets[name] + begin * row_nbytes)
            if file.readinto(data) != len(data):
                raise self._directory.damaged(shard.file_name)
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(-1, *info.shape[1:])

    def tokenizer_files(self) -> TokenizerFiles:
        raise AssertionError("the tokenizer is written last, and asked of the source")

    def close(self) -> None:
        return

    def __enter__(self) -> "WrittenCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        return
