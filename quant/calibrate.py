"""How large the columns of a model's matrices and their inputs are, measured on a text.

The unquantized model reads the text layer by layer, and every token goes through a matrix as soon
as it is read, before the next one is: memory holds one matrix as it is stored, whatever the number
of layers, and what the tokens of the text come to in one layer.

Products and sums are in float64, then rounded: the order of float32 sums depends on the number of
threads, and a quantized model's bytes should not.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from localr1.checkpoint.api import Checkpoint
from localr1.errors import NumericsError
from localr1.kernels.reference import ReferenceKernels
from localr1.layers.linear import Linear
from localr1.layers.norm import rms_norm
from localr1.layers.rope import Rope
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.decoder import load_layer, make_cache
from localr1.models.weights import WeightLoader
from localr1.quant import evaluate
from localr1.tokenizer import Tokenizer

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration_text.txt"
"""Of the kinds of `evaluate.DEFAULT_TEXT`, but another text: what is measured must not be what was
fitted. Written for this purpose (MIT, as all of localr1)."""

MAX_TOKENS = 1024
"""Root mean squares of columns need no more."""

BLOCK_VALUES = 1 << 20
"""Widened to float64 at a time: 8 MB."""

LAYER = re.compile(rf"{re.escape(LAYER_PREFIX)}\d+\.")


@dataclass(frozen=True)
class Columns:
    """Of one linear, float64 [in] each. inputs: mean square over the tokens. weights: sum of
    squares over the rows."""

    inputs: Tensor
    weights: Tensor


class RowBlocks:
    """Matrices of any floats in float64, a few rows at a time, all in one buffer: blocks allocated
    one by one lie in memory for good, as the allocator does not find the room of the last one again
    (measured: 90 MB in 24 layers)."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.float64)

    def clear(self) -> None:
        """Give the buffer back, until a matrix comes again."""
        self._buffer = torch.empty(0, dtype=torch.float64)

    def of(self, matrix: Tensor) -> Iterator[Tensor]:
        """Each block [n, columns] until the next is asked for; the caller may change it."""
        columns = matrix.shape[1]
        if columns > len(self._buffer):
            self._buffer = torch.empty(max(columns, BLOCK_VALUES), dtype=torch.float64)
        for rows in torch.split(matrix, len(self._buffer) // columns):
            yield self._buffer[: rows.numel()].view(rows.shape).copy_(rows)

    def add_squares(self, matrix: Tensor, sums: Tensor) -> None:
        """sums: float64 [columns], to each of which its column's sum of squares is added."""
        for rows in self.of(matrix):
            sums += rows.square_().sum(0)


@dataclass(frozen=True)
class StreamedLinear:
    """A matrix [out, in] of any floats that is in memory only while it is applied, which is once.

    name: of its tensor. read: reads it. bias: float32 [out] or None. sums: zeros, to which the
    squares of its inputs and its rows are added.
    """

    name: str
    read: Callable[[], Tensor]
    bias: Tensor | None
    sums: Columns
    blocks: RowBlocks

    def __call__(self, x: Tensor) -> Tensor:
        """x float32 [T, in] -> float32 [T, out]. Raises what reading raises, NumericsError for NaN
        or Inf in the matrix."""
        weight = self.read()
        self.blocks.add_squares(x, self.sums.inputs)
        x = x.to(torch.float64)
        y = torch.empty(x.shape[0], weight.shape[0])
        start = 0
        for rows in self.blocks.of(weight):
            end = start + rows.shape[0]
            part = functional.linear(x, rows)
            y[:, start:end] = part if self.bias is None else part.add_(self.bias[start:end])
            self.sums.weights.add_(rows.square_().sum(0))
            start = end
        _check_finite(self.sums.weights, self.name)
        return y

    def after_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """This matrix applied to rms_norm(x)."""
        return self(rms_norm(x, norm, eps))

    @property
    def nbytes(self) -> int:
        """Of what stays in memory."""
        return 0 if self.bias is None else self.bias.nbytes


class _ObservingLoader(WeightLoader):
    """Gives linears that are observed. sums: of those since `begin`, by the module's name."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        # The weights are floats, which no kernels are asked for.
        super().__init__(checkpoint, ReferenceKernels())
        self.blocks = RowBlocks()
        self.sums: dict[str, Columns] = {}
        columns: dict[str, int] = {}
        for name, info in checkpoint.tensors.items():
            if len(info.shape) == 2:
                layer = LAYER.match(name)
                key = layer[0] if layer else name
                columns[key] = columns.get(key, 0) + info.shape[1]
        # Of one layer at a time, and all at once: small tensors that stay, made between large ones
        # that go, would keep the allocator from putting the next large one where the last was.
        self._room = torch.zeros(2, max(columns.values()), dtype=torch.float64)
        self._taken = 0

    def begin(self) -> None:
        """Forget what was observed."""
        self.sums = {}
        self._room.zero_()
        self._taken = 0

    def observe(self, prefix: str, in_features: int) -> Columns:
        """Zeros, to be filled."""
        inputs, weights = self._room[:, self._taken : self._taken + in_features]
        self._taken += in_features
        self.sums[prefix] = Columns(inputs, weights)
        return self.sums[prefix]

    def linear(
        self,
        prefix: str,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        row_order: Tensor | None = None,
    ) -> Linear:
        assert row_order is None, "only latent attention orders rows"
        return StreamedLinear(
            f"{prefix}.weight",
            partial(self.unpacked, prefix, out_features, in_features, widen=False),
            self.vector(f"{prefix}.bias", out_features) if bias else None,
            self.observe(prefix, in_features),
            self.blocks,
        )

    def vector(self, name: str, size: int) -> Tensor:
        value = super().vector(name, size)
        _check_finite(value, name)
        return value


def _check_finite(sums: Tensor, name: str) -> None:
    """A damaged tensor is named here: once measured, its NaN would be found in all it reaches."""
    if not sums.isfinite().all():
        raise NumericsError(
            f"{name}: values",
            expected="finite numbers",
            found="NaN or Inf",
            fix="The source checkpoint is damaged: download or convert it again.",
        )


def calibration_ids(checkpoint: Checkpoint, config: ModelConfig, text: str) -> Tensor:
    """int64 [<= MAX_TOKENS], the beginning of a text. Raises UsageError when it is too short."""
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files(), config.vocab_size)
    return evaluate.windows_of(tokenizer, text, min(MAX_TOKENS, config.max_positions))[0]


class Calibration:
    """Reads a text with a dense decoder, layer by layer, and measures every linear on its way.

    Call `embed`, `layer` for each in order, `head`; or set `hidden` to what it was after a layer
    and go on with the next. Each raises what reading raises, and NumericsError for NaN or Inf in a
    weight or in what the model makes of the text.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, ids: Tensor) -> None:
        """ids: int64 [T], the text. Reads no weights."""
        self._checkpoint = checkpoint
        self._config = config
        self._ids = ids
        self._loader = _ObservingLoader(checkpoint)
        self._rope = Rope(config.rope, config.rope_size).table(len(ids))
        # Of one layer: the next one's keys and values take the place of those before.
        self._cache = make_cache(replace(config, num_layers=1), torch.float32, len(ids))
        self._cache.reserve(len(ids))
        self.hidden = torch.empty(0)
        """float32 [T, hidden_size]: what the next layer reads."""

    def embed(self) -> None:
        embedding = self._loader.embedding(
            "model.embed_tokens",
            self._config.vocab_size,
            self._config.hidden_size,
            is_head=False,
        )
        self.hidden = embedding(self._ids)
        _check_finite(self.hidden, "model.embed_tokens.weight")

    def layer(self, index: int) -> dict[str, Columns]:
        """Of its linears, by their modules' names."""
        self._loader.begin()
        attention, mlp = load_layer(self._loader, index, self._config, ReferenceKernels())
        attention(self.hidden, self._rope, self._cache.layer(0), 0)
        mlp(self.hidden)
        return self._measured()

    def head(self) -> dict[str, Columns]:
        """Of "lm_head", though it be the embedding."""
        self._loader.begin()
        norm = self._loader.vector("model.norm.weight", self._config.hidden_size)
        name = "model.embed_tokens" if self._config.tie_embeddings else "lm_head"
        sums = self._loader.observe("lm_head", self._config.hidden_size)
        self._loader.blocks.add_squares(
            rms_norm(self.hidden, norm, self._config.rms_norm_eps), sums.inputs
        )
        self._loader.blocks.add_squares(self._checkpoint.read(f"{name}.weight"), sums.weights)
        _check_finite(sums.weights, f"{name}.weight")
        return self._measured()

    def _measured(self) -> dict[str, Columns]:
        """Copies: the next layer's sums take the place of these."""
        self._loader.blocks.clear()
        for name, sums in self._loader.sums.items():
            if not sums.inputs.isfinite().all():
                raise NumericsError(
                    f"{name}: its inputs on the calibration text",
                    expected="finite numbers",
                    found="NaN or Inf",
                    fix="Quantize with --no-smooth, which does not run the model.",
                )
        return {
            name: Columns(sums.inputs / len(self._ids), sums.weights.clone())
            for name, sums in self._loader.sums.items()
        }
