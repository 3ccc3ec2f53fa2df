"""What a text says of a model's inputs, as one safetensors file that `localr1 calibrate` writes.

    X.inputs             F32 [in]         mean squares of the inputs of the matrix X
    X.weights            F32 [in]         sums of squares of its columns
    L.experts.gate_up    F32 [E, hidden]  mean squares of the inputs of gate and up of each expert,
                                          a token counted by the square of the router's weight
    L.experts.down       F32 [E, inner]   the same of down
    L.experts.tokens     I32 [E]          how many tokens the router sent to each
    L.experts.mass       F32 [E]          the sum of the squares of their weights

X is a module's name, "lm_head" for the head though it be the embedding; L is "model.layers.N.mlp".
The header's metadata says what was measured: `source`, the SHA-256 of each file of the model's
weights as JSON, `text_sha256`, `text`, its name, and `tokens`, how many of it were read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.safetensors_file import SafetensorsFile
from localr1.errors import FormatError, NumericsError, TensorError, UsageError
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.layout import TensorSpec
from localr1.quant.moments import Columns, ExpertMoments, SectionMoments

FORMAT = "localr1-calibration"
VERSION = 1
SUFFIX = ".calibration.safetensors"
HEAD = "lm_head"
FIX = "Make it anew with `localr1 calibrate`."


@dataclass(frozen=True)
class Calibrated:
    """What was read. source: SHA-256 of the files of the model's weights, by name. text: its name.
    tokens: of it."""

    source: Mapping[str, str]
    text: str
    text_sha256: str
    tokens: int

    def metadata(self) -> dict[str, str]:
        return {
            "kind": FORMAT,
            "version": str(VERSION),
            "source": json.dumps(dict(self.source), sort_keys=True),
            "text": self.text,
            "text_sha256": self.text_sha256,
            "tokens": str(self.tokens),
        }


def section_specs(tensors: Mapping[str, TensorInfo], config: ModelConfig) -> list[list[TensorSpec]]:
    """Of each layer, then of the head, what the file holds of it. tensors: of the model."""
    sections: list[list[TensorSpec]] = [[] for _ in range(config.num_layers + 1)]
    for name, info in sorted(tensors.items()):
        module, _, kind = name.rpartition(".")
        layer, _, rest = module.removeprefix(LAYER_PREFIX).partition(".")
        is_router = rest == "mlp.gate"
        if (
            name.startswith(LAYER_PREFIX)
            and layer.isdecimal()
            and int(layer) < config.num_layers  # Else for multi-token prediction.
            and kind == "weight"
            and len(info.shape) == 2
            and EXPERTS_PART not in name
            and not is_router
        ):
            sections[int(layer)] += _linear_specs(module, info.shape[1])
    sections[-1] += _linear_specs(HEAD, config.hidden_size)
    if config.moe is not None:
        count = config.moe.router.num_experts
        for index in config.moe.layers:
            prefix = experts_of(index)
            sections[index] += [
                TensorSpec(f"{prefix}.gate_up", "F32", (count, config.hidden_size)),
                TensorSpec(f"{prefix}.down", "F32", (count, config.moe.intermediate_size)),
                TensorSpec(f"{prefix}.tokens", "I32", (count,)),
                TensorSpec(f"{prefix}.mass", "F32", (count,)),
            ]
    return sections


def _linear_specs(module: str, in_features: int) -> list[TensorSpec]:
    return [
        TensorSpec(f"{module}.inputs", "F32", (in_features,)),
        TensorSpec(f"{module}.weights", "F32", (in_features,)),
    ]


def experts_of(layer: int) -> str:
    return f"{LAYER_PREFIX}{layer}{EXPERTS_PART.removesuffix('.')}"


def section_tensors(moments: SectionMoments, layer: int | None) -> dict[str, Tensor]:
    """What is stored of a section, by name."""
    stored: dict[str, Tensor] = {}
    for module, columns in moments.columns.items():
        stored[f"{module}.inputs"] = columns.inputs.to(torch.float32)
        stored[f"{module}.weights"] = columns.weights.to(torch.float32)
    if moments.experts is not None:
        assert layer is not None
        prefix, experts = experts_of(layer), moments.experts
        stored[f"{prefix}.gate_up"] = experts.gate_up.to(torch.float32)
        stored[f"{prefix}.down"] = experts.down.to(torch.float32)
        stored[f"{prefix}.tokens"] = experts.tokens.to(torch.int32)
        stored[f"{prefix}.mass"] = experts.mass.to(torch.float32)
    return stored


class CalibrationFile:
    """An open file of one model; use it in a `with`.

    Raises NotFoundError, and FormatError or TensorError for a file that is none of the kind,
    damaged or of a model of other tensors; `section` raises NumericsError and FormatError for
    values that cannot have been measured.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
        self.path = path
        self._config = config
        self._file = SafetensorsFile(path)
        try:
            self.calibrated = _calibrated(path, self._file.metadata)
            self._sections = section_specs(tensors, config)
            self._check_tensors()
        except BaseException:
            self._file.close()
            raise

    def check_source(self, file_name: str, sha256: str) -> None:
        """Raises UsageError for a file of a model's weights that was another when the text was
        read."""
        expected = self.calibrated.source.get(file_name)
        if expected is not None and expected != sha256:
            raise UsageError(
                f"{self.path}: what was measured",
                expected="the model that is quantized",
                found=f"one whose {file_name} is another",
                fix="Run `localr1 calibrate` on this model.",
            )

    def check_names(self, file_names: Sequence[str]) -> None:
        """file_names: of the model's weights. Raises UsageError if others were measured."""
        unknown = sorted(set(self.calibrated.source) - set(file_names))
        if unknown:
            raise UsageError(
                f"{self.path}: what was measured",
                expected="the model that is quantized",
                found=f"one with a file {unknown[0]}",
                fix="Run `localr1 calibrate` on this model.",
            )

    def section(self, layer: int | None) -> SectionMoments:
        """Of a layer, or of the head for None."""
        values = {
            spec.name: self._read(spec) for spec in self._sections[-1 if layer is None else layer]
        }
        columns = {
            module: Columns(value.double(), values[f"{module}.weights"].double())
            for name, value in values.items()
            for module, dot, kind in [name.rpartition(".")]
            if kind == "inputs"
        }
        experts = None
        if layer is not None and f"{experts_of(layer)}.tokens" in values:
            experts = self._experts(layer, values)
        return SectionMoments(columns, experts)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "CalibrationFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _experts(self, layer: int, values: Mapping[str, Tensor]) -> ExpertMoments:
        prefix = experts_of(layer)
        tokens = values[f"{prefix}.tokens"].long()
        assert self._config.moe is not None
        total = self.calibrated.tokens * self._config.moe.router.experts_per_token
        if int(tokens.sum()) != total:
            raise FormatError(
                f"{self.path}: tensor {prefix}.tokens",
                expected=f"{total:,} in all, for {self.calibrated.tokens:,} tokens",
                found=f"{int(tokens.sum()):,}",
                fix=FIX,
            )
        return ExpertMoments(
            prefix,
            values[f"{prefix}.gate_up"].double(),
            values[f"{prefix}.down"].double(),
            tokens,
            values[f"{prefix}.mass"].double(),
        )

    def _read(self, spec: TensorSpec) -> Tensor:
        value = self._file.read(spec.name)
        wrong = ~(torch.isfinite(value) & (value >= 0))
        if wrong.any():
            raise NumericsError(
                f"{self.path}: tensor {spec.name}",
                expected="finite numbers, none below 0",
                found=value[wrong][0].item(),
                fix=FIX,
            )
        return value

    def _check_tensors(self) -> None:
        found = self._file.tensors
        specs = {spec.name: spec for section in self._sections for spec in section}
        for name in sorted(specs.keys() | found.keys()):
            spec, info = specs.get(name), found.get(name)
            if spec is None or info is None or (spec.dtype, spec.shape) != (info.dtype, info.shape):
                raise TensorError(
                    f"{self.path}: tensor {name}",
                    expected="none" if spec is None else f"{spec.dtype} {list(spec.shape)}",
                    found="none" if info is None else f"{info.dtype} {list(info.shape)}",
                    fix="It is damaged or of another model: run `localr1 calibrate` on this one.",
                )


def _calibrated(path: Path, metadata: Mapping[str, str]) -> Calibrated:
    if metadata.get("kind") != FORMAT:
        raise FormatError(
            f"{path}", expected="a file that `localr1 calibrate` wrote", found="another"
        )
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"{path}: version", expected=VERSION, found=metadata.get("version"), fix=FIX
        )
    try:
        source: Any = json.loads(metadata["source"])
        tokens = int(metadata["tokens"])
        if not all(isinstance(each, str) for each in source.values()) or tokens < 1:
            raise ValueError
        return Calibrated(source, metadata["text"], metadata["text_sha256"], tokens)
    except (KeyError, ValueError, AttributeError) as error:
        raise FormatError(
            f"{path}: metadata",
            expected="source, text, text_sha256 and tokens",
            found="others",
            fix=FIX,
        ) from error
