"""A checkpoint whose residual stream is rotated: the same model in other coordinates, which round
better.

Every value x of the residual stream becomes x R with an orthogonal R (hadamard.py): what writes to
the stream is multiplied by R, what reads from it by its transpose. An RMS norm commutes with R once
its weights are folded into the matrices behind it, as the size of x R is that of x (Ashkboos et al.
2023, "SliceGPT", section 3; 2024, "QuaRot", section 4, stage 1a). R spreads the few columns that
are large in every trained model over all, so that groups are even. It costs nothing when the model
runs: what comes out is a checkpoint of the same architecture, with norms of ones.

    embedding                                          E    -> E R
    q, k, v, q_a, kv_a, gate, up, router, head         W    -> W diag(norm) R
    o, down                                            W, b -> R' W, b R
    norms before attention, before the MLP, last one   norm -> 1

A tied head has another norm than the embedding has, none, so that the two become separate matrices.
Norms within attention (of heads, of latents) and biases of what reads are left as they are.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from enum import Enum, auto

import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.dequantized import QUANTIZATION, DequantizedCheckpoint
from localr1.checkpoint.fp8 import dequantize
from localr1.checkpoint.rows import Rows
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.errors import UnsupportedError
from localr1.kernels.block_scaled import BlockScaledRows
from localr1.models.registry import parse_config
from localr1.quant.hadamard import Orthogonal, make_orthogonal
from localr1.quant.recipe import Rotation

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LAST_NORM = "model.norm.weight"

BLOCK_VALUES = 1 << 20
"""Worked on at a time, in float64: 8 MB."""


class _Part(Enum):
    """What a tensor has to do with the residual stream."""

    NORM = auto()
    READS = auto()
    WRITES = auto()
    INSIDE = auto()


_LAYER = r"(model\.layers\.\d+)\."
_SHARED = r"shared_experts\."
_READS_ATTENTION = re.compile(rf"{_LAYER}self_attn\.((q|k|v|q_a)_proj|kv_a_proj_with_mqa)\.weight")
_READS_MLP = re.compile(rf"{_LAYER}mlp\.(gate|({_SHARED}|experts\.\d+\.)?(gate|up)_proj)\.weight")
_PATTERNS = {
    _Part.NORM: re.compile(
        rf"model\.norm\.weight|{_LAYER}(input|post_attention)_layernorm\.weight"
    ),
    _Part.WRITES: re.compile(
        rf"{_LAYER}(self_attn\.o_proj|mlp\.({_SHARED}|experts\.\d+\.)?down_proj)\.(weight|bias)"
    ),
    _Part.INSIDE: re.compile(
        rf"{_LAYER}(self_attn\.((q_b|kv_b)_proj\.weight|(q|k)_norm\.weight"
        r"|(q_a|kv_a)_layernorm\.weight|((q|k|v|q_a)_proj|kv_a_proj_with_mqa)\.bias"
        r"|rotary_emb\.inv_freq)"
        rf"|mlp\.(({_SHARED})?(gate|up)_proj\.bias|gate\.e_score_correction_bias))"
    ),
}
_ROUTER = re.compile(rf"{_LAYER}mlp\.gate\.weight")


class RotatedCheckpoint(DequantizedCheckpoint):
    """The StoredCheckpoint of a rotated model over the one it is made from.

    `read` gives all that the rotation changes as float32, computed in float64, in memory of its own
    beside the tensor as it is stored. `tie_word_embeddings` of `config` is false. A router, whose
    rounding decides which experts are chosen, is presented as float32.
    """

    def __init__(self, inner: StoredCheckpoint, rotation: Rotation) -> None:
        """Reads no weights. Raises ConfigError and UnsupportedError for a config.json that is not
        understood, UnsupportedError for a tensor of which it is not known what it reads."""
        super().__init__(inner)
        # Also a quantization_config, which whoever wants floats refuses.
        self._config = {**inner.config, "tie_word_embeddings": False}
        self.source = inner
        config = parse_config(inner.config)
        self._rotation = rotation
        self._hidden_size = config.hidden_size
        self._orthogonal: Orthogonal | None = None
        self._is_tied = config.tie_embeddings
        for name, info in inner.tensors.items():
            if not (config.is_left_out(name) or QUANTIZATION in inner.config):
                _part_of(name)
            self._tensors[name] = _presented(info)
        if self._is_tied and EMBEDDING in inner.tensors:
            # Made of the embedding: no bytes of its own in the files.
            self._tensors[HEAD] = replace(inner.tensors[EMBEDDING], name=HEAD, nbytes=0)

    def read(self, name: str) -> Tensor:
        part = _part_of(name)
        value = self._inner.read(self._stored_name(name))
        if part is _Part.NORM:
            return torch.ones(value.shape)
        if part is _Part.INSIDE:
            return value
        if part is _Part.WRITES and value.dim() == 2 and name != EMBEDDING:
            return self._rotated(value.T).T.contiguous()
        return self._rotated(value.view(-1, self._hidden_size), self._norm(name)).view(value.shape)

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        part = _part_of(name)
        if part is _Part.INSIDE:
            yield from self._inner.pieces(name, max_nbytes)
            return
        if part is _Part.NORM or (part is _Part.WRITES and name != EMBEDDING):
            yield self.read(name)  # What writes to the stream is rotated along its rows.
            return
        norm = self._norm(name)
        # Twice the bytes of 16-bit numbers: rotated they are float32.
        for rows in self._inner.pieces(self._stored_name(name), max(1, max_nbytes // 2)):
            values = dequantize(rows) if isinstance(rows, BlockScaledRows) else rows
            yield self._rotated(values.view(-1, self._hidden_size), norm).view(values.shape)

    def stored_names(self, name: str) -> tuple[str, ...]:
        norm_name = _norm_of(name)
        norm = () if norm_name is None else self._inner.stored_names(norm_name)
        return (*self._inner.stored_names(self._stored_name(name)), *norm)

    def _norm(self, name: str) -> Tensor | None:
        """float64 [hidden], of the norm before the matrix; None where there is none."""
        norm_name = _norm_of(name)
        return None if norm_name is None else self._inner.read(norm_name).to(torch.float64)

    def _stored_name(self, name: str) -> str:
        return EMBEDDING if self._is_tied and name == HEAD else name

    def _rotated(self, value: Tensor, norm: Tensor | None = None) -> Tensor:
        """value: [n, hidden] of any floats and strides -> value diag(norm) R, float32 of the same
        strides. norm: float64 [hidden]."""
        if self._orthogonal is None:
            self._orthogonal = make_orthogonal(self._rotation, self._hidden_size)
        result = torch.empty_like(value, dtype=torch.float32)
        step = max(1, BLOCK_VALUES // self._hidden_size)
        for start in range(0, len(value), step):
            rows = value[start : start + step].to(torch.float64)
            if norm is not None:
                rows = rows * norm
            result[start : start + step] = self._orthogonal.applied_to_rows(rows)
        return result


def rotated(checkpoint: StoredCheckpoint, rotation: Rotation | None) -> StoredCheckpoint:
    """The checkpoint itself for None. Raises as RotatedCheckpoint, which closes with it; it is
    closed then."""
    if rotation is None:
        return checkpoint
    try:
        return RotatedCheckpoint(checkpoint, rotation)
    except BaseException:
        checkpoint.close()
        raise


def _presented(info: TensorInfo) -> TensorInfo:
    narrow = info.dtype in ("BF16", "F16", "F64")
    return replace(info, dtype="F32") if narrow and _ROUTER.fullmatch(info.name) else info


def _part_of(name: str) -> _Part:
    """Raises UnsupportedError for a name that it has none for."""
    if name == EMBEDDING:
        return _Part.WRITES
    if _norm_of(name) is not None:
        return _Part.READS
    for part, pattern in _PATTERNS.items():
        if pattern.fullmatch(name):
            return part
    raise UnsupportedError(
        f"rotation: tensor {name}",
        expected="a name that says whether it reads the residual stream or writes to it",
        found="one that is not known",
        fix="Quantize without --rotate.",
    )


def _norm_of(name: str) -> str | None:
    """The norm before the matrix `name`, None where it does not read the residual stream."""
    if name == HEAD:
        return LAST_NORM
    if match := _READS_ATTENTION.fullmatch(name):
        return f"{match[1]}.input_layernorm.weight"
    if match := _READS_MLP.fullmatch(name):
        return f"{match[1]}.post_attention_layernorm.weight"
    return None
