"""What every source of weights looks like, whatever its file format.

Names are Hugging Face names ("model.layers.0.self_attn.q_proj.weight"); a GGUF file is presented
under them. Tensors are read one at a time, by offset, never by mapping a file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """dtype: safetensors' name of the stored type ("BF16", "F8_E4M3", "I32", ...) or the GGUF type
    ("Q4_1"). shape: row-major, as `read` returns it. nbytes: bytes in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class TokenizerFiles:
    """tokenizer_json: the text of tokenizer.json. chat_template: Jinja source or None.
    bos_token, eos_token, pad_token: their text, or None. eos_token_ids: every id that ends a turn
    (generation_config.json, else config.json). add_bos: whether encoding plain text prepends bos.
    """

    tokenizer_json: str
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    eos_token_ids: tuple[int, ...]
    add_bos: bool


class Checkpoint(Protocol):
    """An open source of weights. `close` it, or use it in a `with`."""

    @property
    def path(self) -> Path: ...

    @property
    def format(self) -> str:
        """ "safetensors" or "gguf"."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json as parsed (strictly: no duplicate key, no NaN, bounded depth and size); for
        GGUF the same document rebuilt from metadata."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or {}."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype (GGUF blocks: dequantized to float32; GGUF F16/BF16/F32
        as stored), contiguous, owned by the caller. Raises TensorError for an unknown name,
        TruncatedError when the file ends early, at any time."""
        ...

    def tokenizer_files(self) -> TokenizerFiles: ...

    def close(self) -> None: ...

    def __enter__(self) -> "Checkpoint": ...
    def __exit__(self, *exc: object) -> None: ...
