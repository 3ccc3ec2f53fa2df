"""What a quantization has written so far, read as a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.layout import Shard
from localr1.quant.writer import DTYPES


class WrittenCheckpoint:
    """A `Checkpoint` of the planned tensors; one can be read when it has been put. `read` raises
    OutputError when its file cannot be read."""

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
        info, shard = self.tensors[name], self._shard_of[name]
        data = bytearray(info.nbytes)
        with self._directory.errors(), open(self._directory.resolve(shard.file_name), "rb") as file:
            file.seek(shard.offsets[name])
            if file.readinto(data) != info.nbytes:
                raise self._directory.damaged(shard.file_name)
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)

    def tokenizer_files(self) -> TokenizerFiles:
        raise AssertionError("the tokenizer is written last, and asked of the source")

    def close(self) -> None:
        return

    def __enter__(self) -> "WrittenCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        return
