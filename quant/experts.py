"""The routed experts in a source: each matrix once, under its own name, of the right shape."""

from collections.abc import Mapping

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.expert_ranges import DOWN, GATE, UP
from localr1.checkpoint.paths import quoted
from localr1.errors import TensorError
from localr1.models.config import LAYER_PREFIX, ModelConfig, MoeConfig

EXPERTS_PART = ".mlp.experts."

ExpertTensors = tuple[TensorInfo, TensorInfo, TensorInfo]
"""gate and up [inner, hidden], down [hidden, inner]."""


def find_experts(
    config: ModelConfig, tensors: Mapping[str, TensorInfo]
) -> dict[int, list[ExpertTensors]]:
    """Layer -> its routed experts by number; {} for a dense model.

    Raises TensorError when a matrix is missing or of another shape, and for any other tensor among
    the experts: a second name for one that is there (stacked and separate, "5" and "05"), an expert
    or a layer of experts that config.json does not speak of.
    """
    found = {} if config.moe is None else _expected_experts(config, config.moe, tensors)
    known = {info.name for experts in found.values() for expert in experts for info in expert}
    for name in tensors:
        if EXPERTS_PART in name and name not in known:
            raise TensorError(
                f"tensor {quoted(name)}",
                expected="each matrix of an expert in config.json once, as "
                f"model.layers.L{EXPERTS_PART}E.{{{GATE},{UP},{DOWN}}}.weight",
                found="one that would be ignored",
                fix="config.json and the weights do not belong together.",
            )
    return found


def _expected_experts(
    config: ModelConfig, moe: MoeConfig, tensors: Mapping[str, TensorInfo]
) -> dict[int, list[ExpertTensors]]:
    inner, hidden = moe.intermediate_size, config.hidden_size

    def matrix(prefix: str, part: str, shape: tuple[int, int]) -> TensorInfo:
        name = f"{prefix}{part}.weight"
        info = tensors.get(name)
        if info is None or info.shape != shape:
            raise TensorError(
                f"tensor {name}",
                expected=f"shape {list(shape)}",
                found="no such tensor" if info is None else f"{list(info.shape)}",
                fix="The checkpoint is incomplete, or config.json belongs to another model.",
            )
        return info

    def expert(prefix: str) -> ExpertTensors:
        return (
            matrix(prefix, GATE, (inner, hidden)),
            matrix(prefix, UP, (inner, hidden)),
            matrix(prefix, DOWN, (hidden, inner)),
        )

    return {
        layer: [
            expert(f"{LAYER_PREFIX}{layer}{EXPERTS_PART}{number}.")
            for number in range(moe.router.num_experts)
        ]
        for layer in moe.layers
    }
