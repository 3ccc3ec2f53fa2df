"""How large the columns of a model's matrices and their inputs are, measured on a text.

The unquantized model reads the text layer by layer: a layer is loaded, every token goes through it,
and it is dropped before the next, so memory holds one layer, whatever the size of the model.

Products and sums are in float64, then rounded: the order of float32 sums depends on the number of
threads, and a quantized model's bytes should not.
"""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from localr1.checkpoint.api import Checkpoint
from localr1.errors import NumericsError
from localr1.kernels.reference import ReferenceKernels
from localr1.layers.linear import FloatLinear, Linear
from localr1.layers.norm import rms_norm
from localr1.layers.rope import Rope
from localr1.models.config import ModelConfig
from localr1.models.decoder import load_layer, make_cache
from localr1.models.weights import WeightLoader
from localr1.quant import evaluate
from localr1.tokenizer import Tokenizer

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration_text.txt"
"""Of the kinds of `evaluate.DEFAULT_TEXT`, but another text: what is measured must not be what was
fitted. Written for this purpose (MIT, as all of localr1)."""

MAX_TOKENS = 1024
"""Root mean squares of columns need no more."""

ROWS_AT_ONCE = 1024
"""Widened to float64 at a time."""

LayerProgress = Callable[[int, int], None]
"""Called with layers done and layers in all."""


@dataclass(frozen=True)
class Columns:
    """Of one linear, float64 [in] each. inputs: mean square over the tokens. weights: sum of
    squares over the rows."""

    inputs: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ObservedLinear(FloatLinear):
    """squares: float64 [in], to which every call adds its inputs' squares."""

    _: KW_ONLY
    squares: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(torch.float64)
        self.squares.add_(sum_of_squares(x))
        parts = [
            functional.linear(x, rows.to(torch.float64))
            for rows in torch.split(self.weight, ROWS_AT_ONCE)
        ]
        y = torch.cat(parts, dim=1)
        return (y if self.bias is None else y + self.bias).to(torch.float32)


class _ObservingLoader(WeightLoader):
    """Gives linears that are observed: the sums are kept here, by their modules' names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        # The weights are floats, which no kernels are asked for.
        super().__init__(checkpoint, ReferenceKernels())
        self.columns: dict[str, Columns] = {}

    def linear(
        self,
        prefix: str,
        out_features: int,
        in_features: int,
        *,
        bias: bool,
        row_order: Tensor | None = None,
    ) -> Linear:
        added = self.vector(f"{prefix}.bias", out_features) if bias else None
        weight = self.matrix(prefix, out_features, in_features, row_order)
        squares = torch.zeros(in_features, dtype=torch.float64)
        self.columns[prefix] = Columns(squares, sum_of_squares(weight))
        _check_finite(self.columns[prefix].weights, f"{prefix}.weight")
        return ObservedLinear(weight, added, squares=squares)

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


def sum_of_squares(matrix: Tensor) -> Tensor:
    """Of each column of any floats [n, columns], float64, without a second matrix in memory."""
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for rows in torch.split(matrix, ROWS_AT_ONCE):
        total += rows.to(torch.float64).square().sum(0)
    return total


def calibration_ids(checkpoint: Checkpoint, config: ModelConfig, text: str) -> Tensor:
    """int64 [<= MAX_TOKENS], the beginning of a text. Raises UsageError when it is too short."""
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files(), config.vocab_size)
    return evaluate.windows_of(tokenizer, text, min(MAX_TOKENS, config.max_positions))[0]


def measure_columns(
    checkpoint: Checkpoint,
    config: ModelConfig,
    ids: Tensor,
    progress: LayerProgress | None = None,
) -> dict[str, Columns]:
    """Every linear of a dense decoder, by its module's name, "lm_head" among them though it be the
    embedding. ids: int64 [T], the text. Raises what reading raises, and NumericsError for NaN or
    Inf in a weight or in what the model makes of the text."""
    loader = _ObservingLoader(checkpoint)
    embedding = loader.embedding(
        "model.embed_tokens", config.vocab_size, config.hidden_size, is_head=False
    )
    x = embedding(ids)
    del embedding
    rope = Rope(config.rope, config.rope_size).table(len(ids))
    cache = make_cache(config, torch.float32, len(ids))
    cache.reserve(len(ids))
    for index in range(config.num_layers):
        attention, mlp = load_layer(loader, index, config, ReferenceKernels())
        attention(x, rope, cache.layer(index), 0)
        mlp(x)
        del attention, mlp  # Before the next layer is read.
        if progress is not None:
            progress(index + 1, config.num_layers)
    norm = loader.vector("model.norm.weight", config.hidden_size)
    name = "model.embed_tokens" if config.tie_embeddings else "lm_head"
    head = sum_of_squares(checkpoint.read(f"{name}.weight"))
    inputs = sum_of_squares(rms_norm(x, norm, config.rms_norm_eps))
    loader.columns["lm_head"] = Columns(inputs, head)
    for name, sums in loader.columns.items():
        if not sums.inputs.isfinite().all():
            raise NumericsError(
                f"{name}: its inputs on the calibration text",
                expected="finite numbers",
                found="NaN or Inf",
                fix="Quantize with --no-smooth, which does not run the model.",
            )
    return {
        name: Columns(sums.inputs / len(ids), sums.weights) for name, sums in loader.columns.items()
    }
