"""What will be written, decided and checked before a byte of weights is read."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.dequantized import DEQUANTIZED_TYPES
from localr1.errors import TensorError, UnsupportedError
from localr1.models.registry import parse_config
from localr1.quant.layout import TensorSpec
from localr1.quant.recipe import Recipe, Rule, groups_that_divide

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Of safetensors; GGUF types are all floats once dequantized."""

RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old checkpoints saved and config.json determines: not written."""


@dataclass(frozen=True)
class Item:
    """One tensor of the source and what it becomes.

    name: of a kept tensor, or of the module of a quantized one (X for X.weight_packed).
    specs: of a quantized one packed, scale and shape; of a kept one itself.
    """

    source: TensorInfo
    name: str
    rule: Rule | None
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class Plan:
    """items: in the model's order, those of one source tensor side by side. dtype: of scales and
    kept tensors, safetensors' name. tied: whether the output's head is its embedding.
    kept_modules: linears that stay floats. parameters: of the model, a tied matrix once."""

    items: tuple[Item, ...]
    dtype: str
    tied: bool
    kept_modules: list[str]
    parameters: int

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def source_nbytes(self) -> int:
        return sum({item.source.name: item.source.nbytes for item in self.items}.values())


def plan_quantization(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Raises UnsupportedError (architecture, already quantized, a group that does not divide a
    row), ConfigError, and TensorError when the tensors are not those config.json speaks of."""
    config = parse_config(checkpoint.config)
    if checkpoint.config.get("quantization_config") is not None:
        raise UnsupportedError(
            f"{checkpoint.path}: source",
            expected="unquantized weights (BF16, F16, F32) or a GGUF file",
            found="a quantization_config",
            fix="Quantize the original model instead.",
        )
    names = sorted(
        (
            name
            for name in checkpoint.tensors
            if not RECOMPUTED.search(name) and not (config.tie_embeddings and name == HEAD_WEIGHT)
        ),
        key=_model_order,
    )
    used = {name: checkpoint.tensors[name] for name in names}
    _check_types(checkpoint, used)
    found = sum(math.prod(info.shape) for info in used.values())
    if found != config.parameter_count:
        raise TensorError(
            f"{checkpoint.path}: parameters in all tensors",
            expected=f"{config.parameter_count:,}, as config.json says",
            found=f"{found:,}",
            fix="Tensors are missing or config.json belongs to another model.",
        )
    dtype = _dtype_of(used)
    items: list[Item] = []
    kept_modules: list[str] = []
    tied = config.tie_embeddings
    for name, info in used.items():
        item = _plan_item(info, name, recipe, dtype)
        items.append(item)
        if item.rule is None and len(info.shape) == 2 and name != EMBEDDING_WEIGHT:
            kept_modules.append(_module_of(name))
        if name == EMBEDDING_WEIGHT and config.tie_embeddings:
            if item.rule is None and recipe.rule_for(_module_of(HEAD_WEIGHT)) is not None:
                # A packed head beside float embeddings: two matrices from here on.
                items.append(_plan_item(info, HEAD_WEIGHT, recipe, dtype))
                tied = False
            elif item.rule is None:
                kept_modules.append(_module_of(HEAD_WEIGHT))
    if not any(item.rule for item in items):
        raise UnsupportedError(f"{checkpoint.path}: no matrix matches the recipe")
    return Plan(tuple(items), dtype, tied, kept_modules, config.parameter_count)


def _plan_item(info: TensorInfo, name: str, recipe: Recipe, dtype: str) -> Item:
    """name: the output's; the source's but for a head made from tied embeddings."""
    module = _module_of(name)
    is_matrix = name.endswith(".weight") and len(info.shape) == 2
    rule = recipe.rule_for(module) if is_matrix else None
    if rule is None:
        return Item(info, name, None, (TensorSpec(name, dtype, info.shape),))
    rows, columns = info.shape
    group = rule.scheme.group_size
    if columns % group:
        fitting = groups_that_divide(columns)
        raise UnsupportedError(
            f"{module}: group size {group}",
            expected=f"a divisor of its {columns} columns",
            found=group,
            fix=f"Use --group {' or '.join(map(str, fitting))}."
            if fitting
            else "No supported group size divides it.",
        )
    specs = (
        TensorSpec(f"{module}.weight_packed", "I32", (rows, rule.scheme.packed_words(columns))),
        TensorSpec(f"{module}.weight_scale", dtype, (rows, columns // group)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    )
    return Item(info, module, rule, specs)


def _check_types(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    for name, info in tensors.items():
        if checkpoint.format == "safetensors" and info.dtype not in (
            *FLOAT_TYPES,
            *DEQUANTIZED_TYPES,
        ):
            raise UnsupportedError(
                f"{checkpoint.path}: tensor {name}",
                expected=" or ".join(FLOAT_TYPES),
                found=info.dtype,
                fix="Quantize the original model instead.",
            )


def _dtype_of(tensors: Mapping[str, TensorInfo]) -> str:
    """F16 where most of the source is F16, else BF16: what modern models were trained in. Ranges
    then fit, and a GGUF's norms, widened BF16 in such models, come back exactly."""
    nbytes = {"F16": 0, "BF16": 0}
    for info in tensors.values():
        nbytes["F16" if info.dtype == "F16" else "BF16"] += info.nbytes
    return "F16" if nbytes["F16"] > nbytes["BF16"] else "BF16"


def _module_of(tensor_name: str) -> str:
    return tensor_name.removesuffix(".weight")


def _model_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Embedding, layers by number, the rest (norm, head), whatever order the source had."""
    place = 0 if name == EMBEDDING_WEIGHT else 1 if ".layers." in name else 2
    pieces = [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in name.split(".")]
    return place, pieces
