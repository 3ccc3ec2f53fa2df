"""What will be written, decided and checked before a byte of weights is read."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.dequantized import DEQUANTIZED_TYPES
from localr1.errors import TensorError, UnsupportedError
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.registry import parse_config
from localr1.quant.experts import find_experts
from localr1.quant.layout import TensorSpec
from localr1.quant.methods import nf4
from localr1.quant.portable import check_targets, reasons_not_portable
from localr1.quant.recipe import NF4, Recipe, Rule, groups_that_divide, quantization_config
from localr1.quant.rotation import RotatedCheckpoint
from localr1.quant.smoothing import Link, links

EMBEDDING_WEIGHT = "model.embed_tokens.weight"
HEAD_WEIGHT = "lm_head.weight"
TORCH_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
"""config.json's names of what scales and kept tensors are stored as."""

FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
"""Of safetensors; GGUF types are all floats once dequantized."""

RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that old checkpoints saved and config.json determines: not written."""

ROUTING = re.compile(r".*\.mlp\.gate\.(weight|e_score_correction_bias)$")
"""What decides the choice of experts keeps the precision it is stored in: DeepSeek's bias is F32,
and rounded to BF16 it chooses other experts."""


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of the source and what it becomes.

    name: of a kept tensor, or of the module of a quantized one (X for X.weight_packed).
    specs: of a quantized one packed, scale, shape and, if it has them, zero points; of a kept one
    itself.
    """

    source: TensorInfo
    name: str
    rule: Rule | None
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class LeftOut:
    """Layers for multi-token prediction (models/config.py) that are in the source alone."""

    mtp_layers: int
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """dense: in the model's order, those of one source tensor side by side. experts: layer -> its
    routed experts by number, each gate, up and down. recipe: with the rules of this kind of model.
    dtype: of scales and kept tensors, safetensors' name. tied: whether the output's head is its
    embedding. quantization_config: of config.json. parameters: of the model, a tied matrix once.
    links: what is smoothed."""

    dense: tuple[Item, ...]
    experts: Mapping[int, Sequence[Sequence[Item]]]
    recipe: Recipe
    dtype: str
    tied: bool
    quantization_config: Mapping[str, Any]
    reasons_not_portable: tuple[str, ...]
    parameters: int
    left_out: LeftOut | None
    links: tuple[Link, ...] = ()

    @cached_property
    def items(self) -> tuple[Item, ...]:
        """In the order of the files."""
        routed = (item for layer in self.experts.values() for expert in layer for item in expert)
        return (*self.dense, *routed)

    @cached_property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    @cached_property
    def source_nbytes(self) -> int:
        return sum({item.source.name: item.source.nbytes for item in self.items}.values())

    @cached_property
    def read_nbytes(self) -> int:
        """Of the source, an embedding that becomes the head too twice."""
        return sum(item.source.nbytes for item in self.items)


def plan_quantization(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Raises UnsupportedError (architecture, already quantized, a group that does not divide a
    row, a recipe that leaves routed experts as they are), ConfigError, and TensorError when the
    tensors are not those config.json speaks of."""
    config = parse_config(checkpoint.config)
    if checkpoint.config.get("quantization_config") is not None:
        raise UnsupportedError(
            f"{checkpoint.path}: source",
            expected="unquantized weights (BF16, F16, F32) or a GGUF file",
            found="a quantization_config",
            fix="Quantize the original model instead.",
        )
    recipe = recipe.for_model(is_mixture=config.moe is not None)
    if recipe.is_nf4:
        _check_nf4(checkpoint, recipe, config)
    used = _used_tensors(checkpoint, config)
    _check_types(checkpoint, used)
    recipe = recipe.fitted(_columns(used))
    layers = find_experts(config, used)
    _check_parameters(checkpoint, config, used)
    dtype = _dtype_of(used)
    experts = {
        layer: [[_plan_expert(info, recipe, dtype) for info in each] for each in infos]
        for layer, infos in layers.items()
    }
    for infos in layers.values():
        for each in infos:
            for info in each:
                del used[info.name]
    dense, kept_modules, tied = _plan_dense(used, recipe, dtype, config.tie_embeddings)
    routed = [item for layer in experts.values() for expert in layer for item in expert]
    schemes = {item.name: item.rule.scheme for item in (*routed, *dense) if item.rule}
    if not schemes:
        raise UnsupportedError(f"{checkpoint.path}: no matrix matches the recipe")
    expert_rules = {item.rule for item in routed if item.rule}
    reasons: tuple[str, ...] = ()
    if recipe.is_nf4:
        quantization = nf4.quantization_config(kept_modules, TORCH_DTYPES[dtype])
    else:
        quantization = quantization_config(recipe, kept_modules, expert_rules)
        check_targets(quantization, schemes)
        of_experts = {rule.scheme for rule in expert_rules}
        reasons = reasons_not_portable(quantization, schemes, of_experts)
    return Plan(
        dense=tuple(dense),
        experts=experts,
        recipe=recipe,
        dtype=dtype,
        tied=tied,
        quantization_config=quantization,
        reasons_not_portable=reasons,
        parameters=_parameters(checkpoint, config),
        left_out=left_out(config, checkpoint.tensors),
        links=tuple(links(config, schemes, smooth=recipe.smooth, awq=recipe.awq)),
    )


def plan_alone(tensors: Mapping[str, TensorInfo], recipe: Recipe, *, tied: bool) -> list[Item]:
    """What becomes of each of these tensors, for which no checkpoint need be there (forecast.py).
    tied: whether the source's head is its embedding. Raises UnsupportedError as
    `plan_quantization`."""
    recipe = recipe.fitted(_columns(tensors))
    return _plan_dense(tensors, recipe, _dtype_of(tensors), tied)[0]


def left_out(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> LeftOut | None:
    """The multi-token-prediction layers among a checkpoint's tensors; None where there are none."""
    infos = [info for name, info in tensors.items() if config.is_left_out(name)]
    layers = {info.name.removeprefix(LAYER_PREFIX).partition(".")[0] for info in infos}
    nbytes = sum(info.nbytes for info in infos)
    return LeftOut(len(layers), len(infos), nbytes) if infos else None


def _columns(tensors: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Of the matrices, by module."""
    return {
        _module_of(name): info.shape[1]
        for name, info in tensors.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }


def _used_tensors(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, TensorInfo]:
    """The tensors that go into the output, in the model's order."""
    names = sorted(
        (
            name
            for name in checkpoint.tensors
            if not RECOMPUTED.search(name)
            and not (config.tie_embeddings and name == HEAD_WEIGHT)
            and not config.is_left_out(name)
        ),
        key=_model_order,
    )
    return {name: checkpoint.tensors[name] for name in names}


def _parameters(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Of the model that was asked for: its tied matrix counts once, though a rotation makes two."""
    if isinstance(checkpoint, RotatedCheckpoint):
        config = parse_config(checkpoint.source.config)
    return config.parameter_count


def _check_parameters(
    checkpoint: Checkpoint, config: ModelConfig, used: Mapping[str, TensorInfo]
) -> None:
    found = sum(math.prod(info.shape) for info in used.values())
    if found != config.parameter_count:
        raise TensorError(
            f"{checkpoint.path}: parameters in all tensors",
            expected=f"{config.parameter_count:,}, as config.json says",
            found=f"{found:,}",
            fix="Tensors are missing or config.json belongs to another model.",
        )


def _plan_dense(
    used: Mapping[str, TensorInfo], recipe: Recipe, dtype: str, tied: bool
) -> tuple[list[Item], list[str], bool]:
    """Items, the linears among them that stay floats, and whether the output's head is tied."""
    items: list[Item] = []
    kept_modules: list[str] = []
    source_is_tied = tied
    for name, info in used.items():
        item = _plan_item(info, name, recipe, dtype)
        items.append(item)
        if item.rule is None and len(info.shape) == 2 and name != EMBEDDING_WEIGHT:
            kept_modules.append(_module_of(name))
        if name == EMBEDDING_WEIGHT and source_is_tied:
            if item.rule is None and recipe.rule_for(_module_of(HEAD_WEIGHT)) is not None:
                # A packed head beside float embeddings: two matrices from here on.
                items.append(_plan_item(info, HEAD_WEIGHT, recipe, dtype))
                tied = False
            elif item.rule is None:
                kept_modules.append(_module_of(HEAD_WEIGHT))
    return items, kept_modules, tied


def _plan_expert(info: TensorInfo, recipe: Recipe, dtype: str) -> Item:
    item = _plan_item(info, info.name, recipe, dtype)
    if item.rule is None or not item.rule.scheme.symmetric:
        raise UnsupportedError(
            f"recipe: {_module_of(info.name)}",
            expected="routed experts in 4, 5, 6 or 8 bits without zero points: each is one range "
            "of bytes",
            found="no rule for them" if item.rule is None else item.rule.scheme.name,
        )
    return item


def _plan_item(info: TensorInfo, name: str, recipe: Recipe, dtype: str) -> Item:
    """name: the output's; the source's but for a head made from tied embeddings."""
    module = _module_of(name)
    is_matrix = name.endswith(".weight") and len(info.shape) == 2
    rule = recipe.rule_for(module) if is_matrix else None
    if rule is None:
        kept = TensorSpec(name, _kept_dtype(info, name, dtype), info.shape)
        return Item(info, name, None, (kept,))
    if rule.method == NF4:
        return Item(info, module, rule, nf4.specs(module, info.shape))
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
    specs = [
        TensorSpec(f"{module}.weight_packed", "I32", (rows, rule.scheme.packed_words(columns))),
        TensorSpec(f"{module}.weight_scale", dtype, (rows, columns // group)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not rule.scheme.symmetric:
        words = rule.scheme.packed_words(rows)
        specs.append(TensorSpec(f"{module}.weight_zero_point", "I32", (words, columns // group)))
    return Item(info, module, rule, tuple(specs))


def _kept_dtype(info: TensorInfo, name: str, dtype: str) -> str:
    if ROUTING.match(name) and info.dtype in FLOAT_TYPES:
        return "F32" if info.dtype == "F64" else info.dtype
    return dtype


def _check_nf4(checkpoint: Checkpoint, recipe: Recipe, config: ModelConfig) -> None:
    if config.moe is not None or not all(
        isinstance(rule, Rule) and rule.method == NF4 for rule in recipe.rules
    ):
        raise UnsupportedError(
            f"{checkpoint.path}: method {NF4}",
            expected="a dense model, all of whose rules have this method: it is another layout",
            found="a mixture of experts" if config.moe is not None else "other methods beside it",
        )


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
