"""What a quantization did, or would do."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localr1.quant.calibration_file import Calibrated
from localr1.quant.moments import ExpertUse
from localr1.quant.plan import Item, LeftOut, Plan
from localr1.quant.recipe import Rotation


@dataclass(frozen=True)
class TensorReport:
    """name: of the module, or of a kept tensor. part: the rule's name, or "kept". scheme:
    "int4-g32", or the dtype of a kept tensor. relative_error: squared, None when kept or not yet
    measured. nbytes: in the output."""

    name: str
    part: str
    scheme: str
    parameters: int
    nbytes: int
    relative_error: float | None


@dataclass(frozen=True)
class PartReport:
    """All tensors of one part and scheme. relative_error: the mean, weighted by parameters."""

    part: str
    scheme: str
    num_tensors: int
    parameters: int
    nbytes: int
    relative_error: float | None


@dataclass(frozen=True)
class Report:
    """out: None for a dry run. seconds: wall clock. parameters: a tied matrix once. left_out: what
    the source has and the output has not. num_smoothed: norms and matrices that were divided.
    layout: `quant_method` of config.json. calibrated: what text the methods and smoothing know of;
    expert_use: of a mixture."""

    source: Path
    out: Path | None
    parameters: int
    source_nbytes: int
    tensors: tuple[TensorReport, ...]
    reasons_not_portable: tuple[str, ...]
    left_out: LeftOut | None
    num_smoothed: int
    rotation: Rotation | None
    layout: str
    seconds: float
    calibrated: Calibrated | None = None
    expert_use: ExpertUse | None = None

    @property
    def nbytes(self) -> int:
        """Of all tensors in the output."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters

    @property
    def parts(self) -> list[PartReport]:
        grouped: dict[tuple[str, str], list[TensorReport]] = {}
        for tensor in self.tensors:
            grouped.setdefault((tensor.part, tensor.scheme), []).append(tensor)
        return [
            PartReport(
                part=part,
                scheme=scheme,
                num_tensors=len(tensors),
                parameters=sum(tensor.parameters for tensor in tensors),
                nbytes=sum(tensor.nbytes for tensor in tensors),
                relative_error=_mean_error(tensors),
            )
            for (part, scheme), tensors in grouped.items()
        ]


def tensor_report(item: Item, relative_error: float | None) -> TensorReport:
    return TensorReport(
        name=item.name,
        part=item.rule.name if item.rule else "kept",
        scheme=item.rule.type_name if item.rule else item.specs[0].dtype.lower(),
        parameters=math.prod(item.source.shape),
        nbytes=item.nbytes,
        relative_error=relative_error,
    )


def make_report(
    source: Path,
    out: Path | None,
    plan: Plan,
    tensors: Sequence[TensorReport],
    seconds: float,
    calibrated: Calibrated | None = None,
    expert_use: ExpertUse | None = None,
) -> Report:
    return Report(
        source=source,
        out=out,
        parameters=plan.parameters,
        source_nbytes=plan.source_nbytes,
        tensors=tuple(tensors),
        reasons_not_portable=plan.reasons_not_portable,
        left_out=plan.left_out,
        num_smoothed=len(plan.links),
        rotation=plan.recipe.rotation,
        layout=str(plan.quantization_config["quant_method"]),
        seconds=seconds,
        calibrated=calibrated,
        expert_use=expert_use,
    )


def _mean_error(tensors: list[TensorReport]) -> float | None:
    measured = [tensor for tensor in tensors if tensor.relative_error is not None]
    if not measured:
        return None
    weight = sum(tensor.parameters for tensor in measured)
    return sum((t.relative_error or 0.0) * t.parameters for t in measured) / weight
