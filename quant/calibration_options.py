"""Where a quantization takes what it knows of a model's inputs from."""

from dataclasses import dataclass
from pathlib import Path

from localr1.quant.calibrate import DEFAULT_TEXT, SMOOTHING_TOKENS
from localr1.quant.methods.base import CalibratedMethod
from localr1.quant.methods.registry import method_named
from localr1.quant.plan import Plan
from localr1.quant.recipe import NF4, Rule

DEFAULT_TOKENS = 8192
"""Of a text, for methods that choose by what it brings to each matrix."""


@dataclass(frozen=True)
class CalibrationOptions:
    """file: what `localr1 calibrate` wrote; then nothing is measured. text: what is read otherwise,
    its first `tokens` tokens; None: as many as what is done with them needs."""

    file: Path | None = None
    text: Path = DEFAULT_TEXT
    tokens: int | None = None

    def tokens_for(self, plan: Plan, max_positions: int) -> int:
        if self.tokens is not None:
            return self.tokens
        if needs_moments(plan):
            return DEFAULT_TOKENS
        return min(SMOOTHING_TOKENS, max_positions)


def calibrated_method(name: str) -> CalibratedMethod | None:
    method = None if name == NF4 else method_named(name)
    return method if isinstance(method, CalibratedMethod) else None


def needs_moments(plan: Plan) -> bool:
    """Whether a method of the plan, or AWQ, chooses by its matrices' inputs."""
    return plan.recipe.awq or any(
        calibrated_method(rule.method) is not None for rule in plan.recipe.quantizing
    )


def needs_hessian(rule: Rule) -> bool:
    method = calibrated_method(rule.method)
    return method is not None and method.needs_hessian


def needs_hessians(plan: Plan) -> bool:
    return any(needs_hessian(rule) for rule in plan.recipe.quantizing)


def needs_calibration(plan: Plan) -> bool:
    """Whether anything of the plan is measured."""
    return bool(plan.links) or needs_moments(plan)
