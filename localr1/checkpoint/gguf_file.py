"""A GGUF file as a Checkpoint, under Hugging Face names.

The header is validated by gguf_header.py; of the `gguf` library only the dequantization of blocks
is used (its reader maps the file and trusts the header). Rows of q and k that the converter
reordered for rope are put back, so that a weight equals the one it was made from.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.checkpoint.gguf_config import build_config, num_layers
from localr1.checkpoint.gguf_header import GgufTensor
from localr1.checkpoint.gguf_metadata import Metadata
from localr1.checkpoint.gguf_mixtures import num_experts
from localr1.checkpoint.gguf_names import (
    ROPE_FREQS,
    Architecture,
    SplitUp,
    architecture,
    place_weights,
)
from localr1.checkpoint.gguf_split import GgufParts, open_parts
from localr1.checkpoint.gguf_tokenizer import build_tokenizer_files
from localr1.checkpoint.index import ShardSet
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.rows import Rows, pieces_by
from localr1.errors import TensorError, UnsupportedError

STORED_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types handed out as they lie in the file; all others are blocks, dequantized to float32."""


class GgufFile:
    """An open GGUF file: use `GgufFile.open`."""

    def __init__(self, parts: GgufParts, shown: Path) -> None:
        self._parts = parts
        self._path = shown
        metadata = parts.metadata
        self._kind: Architecture = architecture(metadata.string("general.architecture"), str(shown))
        self._places = place_weights(
            parts.tensors,
            self._kind,
            num_layers(metadata),
            num_experts(metadata) if self._kind.experts else 0,
            str(shown),
        )
        self._tensors = {name: _info(name, place) for name, place in self._places.items()}
        for stored in parts.tensors.values():
            if stored.type_name not in STORED_TYPES and not _dequantizes(stored.type_id):
                raise UnsupportedError(
                    f"{shown}: tensor {quoted(stored.name)}",
                    expected="a type the gguf library dequantizes",
                    found=stored.type_name,
                )
        self._config: dict[str, Any] | None = None
        self._tokenizer_files: TokenizerFiles | None = None

    @classmethod
    def open(cls, path: str | Path, *, allow_truncated: bool = False) -> "GgufFile":
        """Open and validate; of a model in several files all, whichever of them `path` is.
        allow_truncated: accept a file cut inside its tensors, whose tokenizer, template and config
        can then still be read; reading a cut tensor raises TruncatedError.

        Raises NotFoundError, FormatError, TruncatedError, TensorError, ConfigError,
        UnsupportedError.
        """
        path = Path(path)
        parts = open_parts(path, allow_truncated=allow_truncated)
        try:
            opened = cls(parts, path)
            if not opened.is_truncated:
                opened._build_config()
        except BaseException:
            parts.close()
            raise
        return opened

    @property
    def path(self) -> Path:
        return self._path

    @property
    def format(self) -> str:
        return "gguf"

    @property
    def metadata(self) -> Metadata:
        return self._parts.metadata

    @property
    def is_truncated(self) -> bool:
        return self._parts.is_truncated

    @property
    def config(self) -> Mapping[str, Any]:
        return self._build_config()

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return {}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def shards(self) -> ShardSet | None:
        return None

    def stored_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    def read(self, name: str) -> Tensor:
        place = self._places.get(name)
        if place is None:
            raise TensorError(f"{self._path}: there is no tensor {quoted(name)}")
        if isinstance(place, SplitUp):
            return self._read_split(place)
        values = self._read_stored(place)
        if not self._is_reordered(name):
            return values
        is_query = ".self_attn.q_proj." in name
        return self._unpermute(
            values, "num_attention_heads" if is_query else "num_key_value_heads", name
        )

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        place = self._places.get(name)
        if (
            place is None
            or isinstance(place, SplitUp)
            or len(place.shape) < 2
            or self._is_reordered(name)
        ):
            yield self.read(name)
            return
        dtype = STORED_TYPES.get(place.type_name, torch.float32)
        nbytes = math.prod(place.shape) * dtype.itemsize
        yield from pieces_by(partial(self._read_rows, place), place.shape, nbytes, max_nbytes)

    def tokenizer_files(self) -> TokenizerFiles:
        if self._tokenizer_files is None:
            self._tokenizer_files = build_tokenizer_files(self.metadata)
        return self._tokenizer_files

    def close(self) -> None:
        self._parts.close()

    def __enter__(self) -> "GgufFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _build_config(self) -> dict[str, Any]:
        """Deferred for a truncated file: its rope factors may lie beyond the cut."""
        if self._config is None:
            factors = self._parts.tensors.get(ROPE_FREQS)
            self._config = build_config(
                self.metadata,
                self._kind,
                self._parts.tensors,
                None if factors is None else self._read_factors(factors),
            )
        return self._config

    def _read_factors(self, stored: GgufTensor) -> list[float]:
        if stored.type_name != "F32" or len(stored.shape) != 1:
            raise TensorError(
                f"{self._path}: {ROPE_FREQS}",
                expected="a row of F32",
                found=f"{stored.type_name} {list(stored.shape)}",
            )
        factors: list[float] = self._read_stored(stored).tolist()
        return factors

    def _is_reordered(self, name: str) -> bool:
        return self._kind.rotary_rows == "interleaved" and (
            ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        )

    def _read_stored(self, stored: GgufTensor) -> Tensor:
        return self._read_values(stored, 0, stored.nbytes, stored.shape)

    def _read_rows(self, stored: GgufTensor, begin: int, end: int) -> Tensor:
        """Of one with two dimensions or more."""
        nbytes = stored.nbytes // stored.shape[0]
        shape = (end - begin, *stored.shape[1:])
        return self._read_values(stored, begin * nbytes, (end - begin) * nbytes, shape)

    def _read_values(
        self, stored: GgufTensor, begin: int, nbytes: int, shape: tuple[int, ...]
    ) -> Tensor:
        """begin, nbytes: within the tensor's bytes. shape: of what they hold."""
        raw = self._parts.files[stored.part].read_tensor(stored.begin + begin, nbytes)
        dtype = STORED_TYPES.get(stored.type_name)
        if dtype is not None:
            return raw.view(dtype).reshape(shape)
        rows = raw.numpy().reshape(math.prod(shape[:-1]), -1)
        return torch.from_numpy(_dequantize(rows, stored.type_id)).reshape(shape)

    def _read_split(self, place: SplitUp) -> Tensor:
        """The rows of each head: its keys, then its values."""
        keys = self._read_stored(place.keys).transpose(1, 2)
        values = self._read_stored(place.values)
        if keys.dtype != values.dtype:
            keys, values = keys.float(), values.float()
        return torch.cat((keys, values), dim=1).flatten(0, 1)

    def _unpermute(self, values: Tensor, heads_key: str, name: str) -> Tensor:
        """Undo the converter's order of rows: within a head row 2i + j holds Hugging Face's row
        j * d/2 + i (convert_hf_to_gguf.py of llama.cpp, LlamaModel.permute)."""
        heads = self.config[heads_key]
        rows = values.shape[0]
        if rows % (2 * heads):
            raise TensorError(
                f"{self._path}: {quoted(name)}",
                expected=f"rows in {heads} heads of an even size",
                found=f"{rows:,} rows",
            )
        paired = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
        return paired.transpose(1, 2).reshape(values.shape)


def _info(name: str, place: GgufTensor | SplitUp) -> TensorInfo:
    if isinstance(place, GgufTensor):
        return TensorInfo(name, place.type_name, place.shape, place.nbytes)
    keys, values = place.keys, place.values
    rows = keys.shape[0] * (keys.shape[2] + values.shape[1])
    types = dict.fromkeys((keys.type_name, values.type_name))
    nbytes = keys.nbytes + values.nbytes
    return TensorInfo(name, "+".join(types), (rows, keys.shape[1]), nbytes)


def _dequantize(rows: "np.ndarray[Any, np.dtype[np.uint8]]", type_id: int) -> Any:
    """rows: uint8 [rows, bytes of a row] -> float32 [rows, values of a row]."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    # Damaged scales may be Inf or NaN: whether that matters is for the reader of the values to say.
    with np.errstate(all="ignore"):
        return dequantize(rows, GGMLQuantizationType(type_id))


@cache
def _dequantizes(type_id: int) -> bool:
    """Whether the library can: tried on one block of zeros."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    _, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(type_id)]
    try:
        _dequantize(np.zeros((1, nbytes), dtype=np.uint8), type_id)
    except NotImplementedError:
        return False
    return True
