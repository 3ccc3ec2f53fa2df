"""The tensors of a checkpoint that is not there, from its config.json alone: as it was released, or
as `localr1 quantize` would write it, to the byte."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.quantization_config import (
    ChannelScheme,
    QuantizationConfig,
    parse_quantization_config,
)
from localr1.checkpoint.reader import DEQUANTIZED_BY
from localr1.models.config import ModelConfig
from localr1.models.registry import parse_config
from localr1.models.tensor_list import CHOICE_BIAS, tensor_kinds, tensor_shapes
from localr1.qtypes import ACTIVATION_GROUP, QuantScheme
from localr1.quant.layout import TensorSpec
from localr1.quant.plan import HEAD_WEIGHT, Plan, plan_alone
from localr1.quant.recipe import Recipe

RELEASED_DTYPE = "BF16"


@dataclass(frozen=True)
class Forecast:
    """tensors: each with how many of the model are like it, itself included. config: of the model
    as these tensors make it."""

    config: ModelConfig
    tensors: tuple[tuple[TensorInfo, int], ...]

    @property
    def nbytes(self) -> int:
        """Of all tensors, on disk."""
        return sum(count * info.nbytes for info, count in self.tensors)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether config.json is that of a quantized model which runs as it is. FP8 and bitsandbytes
    are read as numbers, as their readers present them."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping):
        return quantization is not None
    return quantization.get("quant_method") not in DEQUANTIZED_BY


def forecast_released(config: Mapping[str, Any]) -> Forecast:
    """The model as config.json says it was released, in 16 bits where it is not packed. Raises
    ConfigError, UnsupportedError and FormatError."""
    model = parse_config(config)
    if not is_packed(config):
        return Forecast(model, tuple(_kinds(model)))
    schemes = parse_quantization_config(config["quantization_config"])
    listed = tensor_kinds(model)
    if _names_a_number(schemes):  # Modules of a kind may differ, so each is looked up.
        listed = {name: (shape, 1) for name, shape in tensor_shapes(model).items()}
    tensors = [
        (_info(spec), count)
        for name, (shape, count) in listed.items()
        for spec in _stored_as(name, shape, schemes.scheme_for(name.removesuffix(".weight")))
    ]
    return Forecast(model, tuple(tensors))


def forecast_quantized(config: Mapping[str, Any], recipe: Recipe) -> Forecast:
    """What `localr1 quantize` with this recipe would write. Raises as `forecast_released`."""
    model = parse_config(config)
    kinds = {info.name: (info, count) for info, count in _kinds(model)}
    items = plan_alone(
        {name: info for name, (info, _) in kinds.items()},
        recipe.for_model(is_mixture=model.moe is not None),
        tied=model.tie_embeddings,
    )
    tensors = [(_info(spec), kinds[item.source.name][1]) for item in items for spec in item.specs]
    return Forecast(_as_written(model, tensors), tuple(tensors))


def forecast_of_plan(plan: Plan, model: ModelConfig) -> Forecast:
    """What a plan made from a checkpoint that is there will write."""
    tensors = [(_info(spec), 1) for item in plan.items for spec in item.specs]
    return Forecast(_as_written(model, tensors), tuple(tensors))


def _names_a_number(schemes: QuantizationConfig) -> bool:
    """Whether a target speaks of some layers or experts and not of others."""
    names = [schemes.ignored, *(group.targets for group in schemes.groups)]
    texts = [text for each in names for text in (*each.whole, *each.patterns)]
    return any(character.isdigit() for text in texts for character in text)


def _as_written(model: ModelConfig, tensors: list[tuple[TensorInfo, int]]) -> ModelConfig:
    """A head tied to the embedding may have become a packed matrix of its own."""
    head = HEAD_WEIGHT.removesuffix("weight")
    has_head = any(info.name.startswith(head) for info, _ in tensors)
    return replace(model, tie_embeddings=model.tie_embeddings and not has_head)


def _kinds(model: ModelConfig) -> list[tuple[TensorInfo, int]]:
    return [
        (_info(spec), count)
        for name, (shape, count) in tensor_kinds(model).items()
        for spec in _stored_as(name, shape, None)
    ]


def _stored_as(
    name: str, shape: tuple[int, ...], scheme: QuantScheme | ChannelScheme | None
) -> list[TensorSpec]:
    module = name.removesuffix(".weight")
    if scheme is None or module == name or len(shape) != 2:
        # DeepSeek's bias on the choice is float32 whatever the weights are.
        return [TensorSpec(name, "F32" if name.endswith(CHOICE_BIAS) else RELEASED_DTYPE, shape)]
    rows, columns = shape
    groups = 1 if isinstance(scheme, ChannelScheme) else columns // scheme.group_size
    words = QuantScheme(scheme.bits, ACTIVATION_GROUP).packed_words(columns)
    specs = [
        TensorSpec(f"{module}.weight_packed", "I32", (rows, words)),
        TensorSpec(f"{module}.weight_scale", RELEASED_DTYPE, (rows, groups)),
        TensorSpec(f"{module}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        zeros = (-(-rows * scheme.bits // 32), groups)
        specs.append(TensorSpec(f"{module}.weight_zero_point", "I32", zeros))
    return specs


def _info(spec: TensorSpec) -> TensorInfo:
    return TensorInfo(spec.name, spec.dtype, spec.shape, spec.nbytes)
