"""Bits for each tensor, so that the whole is no larger than wanted and the error the least.

What each matrix loses in 4 and in 8 bits, or in 4, 5, 6 and 8, is measured, one matrix in memory at
a time: the squared error of its rounded weights over the sum of their squares, each column weighted
by the mean square of its inputs (moments). That is the share of noise in its outputs on a text;
without moments all inputs count 1. Shares of noise are added up over the matrices, and not the
noise itself: norms scale what is passed on, so that how large it is says little of what it decides
(docs/quantization.md has both measured). A routed expert's counts by the square of its weight, the
mean over tokens.

The knapsack of these errors against bytes is solved in allocation.py; units.py says what shares a
choice and makes the recipe.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.files import read_text
from localr1.checkpoint.paths import quoted
from localr1.checkpoint.stored import CheckpointInPieces
from localr1.errors import MemoryLimitError, UsageError
from localr1.experts.trace import Trace
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.registry import parse_config
from localr1.quant.allocation import Allocation, Choice, allocate, least_bytes
from localr1.quant.calibrate import (
    DEFAULT_TEXT,
    SMOOTHING_TOKENS,
    Calibration,
    calibration_windows,
)
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.journal import begun_recipe
from localr1.quant.methods.base import CalibratedMethod
from localr1.quant.methods.imatrix import rounding
from localr1.quant.methods.registry import method_named
from localr1.quant.moments import importance
from localr1.quant.plan import HEAD_WEIGHT, Item, Plan, plan_quantization
from localr1.quant.progress import Progress, ProgressCallback
from localr1.quant.recipe import KEEP_BITS, Recipe, rules_from_json
from localr1.quant.sections import EMBEDDING as EMBEDDING_MODULE
from localr1.quant.sections import Section, plan_sections
from localr1.quant.stored_rows import float_pieces, rows_at
from localr1.quant.units import (
    EXPERTS,
    Unit,
    bits_to_choose,
    find_units,
    recipe_in,
    recipe_of,
    scheme_in,
)
from localr1.quant.writer import DTYPES

SAMPLE_WEIGHTS: Final = 1 << 20
"""Of a larger matrix so many are rounded, in whole rows evenly apart."""
SAMPLE_EXPERTS: Final = 8
"""Of a layer, where all experts share a choice."""
HEAD_MODULE: Final = HEAD_WEIGHT.removesuffix(".weight")
HEAD_PART: Final = "head"
EMBEDDING: Final = "embedding"
"""The section that no moments are asked for."""


class SectionInputs(Protocol):
    def inputs(self, module: str) -> Tensor:
        """Floats [in]: the mean squares of a module's inputs over the tokens of a text; of a
        routed expert over the tokens that go to it."""
        ...


class Moments(Protocol):
    """What a text says of a model's inputs; asked for layer by layer, in order, then for the head
    (None)."""

    def section(self, layer: int | None) -> SectionInputs: ...


Shares = Mapping[int, Sequence[float]]
"""Layer -> of each routed expert the square of its weight, the mean over tokens."""


@dataclass(frozen=True)
class Target:
    """What is wanted: nbytes, of the whole directory, or bits_per_weight, of its tensors; the other
    is None. is_portable: within what other runtimes open, 4 and 8 bits. asymmetric: with
    zero points where there are fewer than 8. weighted_by: what the errors are weighted
    by, for the record."""

    nbytes: int | None
    bits_per_weight: float | None
    group_size: int = 32
    method: str = "rtn"
    smooth: bool = True
    is_portable: bool = True
    asymmetric: bool = False
    weighted_by: str | None = None
    routing: str | None = None

    def to_json(self) -> dict[str, Any]:
        values = {
            "bytes": self.nbytes,
            "bits_per_weight": self.bits_per_weight,
            "group_size": self.group_size,
            "method": self.method,
            "portable": self.is_portable,
            "asymmetric": self.asymmetric or None,
            "weighted_by": self.weighted_by,
            "routing": self.routing,
        }
        return {key: value for key, value in values.items() if value is not None}

    def text(self) -> str:
        if self.nbytes is not None:
            return f"{self.nbytes:,} bytes"
        return f"{self.bits_per_weight} bits a weight"


@dataclass(frozen=True)
class Chosen:
    """relative_errors: of each matrix at each number of bits, squared, without weights.
    allocation: of the units, in the measure of the module's head. nbytes: what was to be kept
    below the target, of `Target.nbytes` or of the tensors."""

    recipe: Recipe
    plan: Plan
    allocation: Allocation
    relative_errors: Mapping[tuple[str, int], float]


class TextMoments:
    """Of a dense model on the built-in calibration text, which is read as it is asked for."""

    def __init__(self, checkpoint: CheckpointInPieces, config: ModelConfig) -> None:
        text = read_text(DEFAULT_TEXT, DEFAULT_TEXT.name, DEFAULT_TEXT.stat().st_size)
        tokens = min(SMOOTHING_TOKENS, config.max_positions)
        windows = calibration_windows(checkpoint, config, text, tokens)
        self._calibration = Calibration(checkpoint, config, windows)

    def section(self, layer: int | None) -> SectionInputs:
        if layer == 0:
            self._calibration.embed()
        return self._calibration.head() if layer is None else self._calibration.layer(layer)


def built_in_moments(checkpoint: CheckpointInPieces) -> TextMoments | None:
    """None for a model that TextMoments cannot read: a mixture, whose every expert would have to be
    run."""
    config = parse_config(checkpoint.config)
    has_linears_alone = config.moe is None and config.latent is None
    return TextMoments(checkpoint, config) if has_linears_alone else None


def choose(
    checkpoint: CheckpointInPieces,
    target: Target,
    size_of: Callable[[Checkpoint, Plan], int],
    *,
    moments: Moments | None = None,
    shares: Shares | None = None,
    progress: ProgressCallback | None = None,
) -> Chosen:
    """size_of: bytes of the result of a plan (result_size.py). moments: None: all inputs count 1.
    shares: None: those of tokens that go to all experts alike.

    Raises as `plan_quantization`, MemoryLimitError for a target that 4 bits everywhere exceed, with
    the least that is possible, or that all in 16 bits does not reach, and NumericsError.
    """
    recipes = {
        bits: recipe_in(
            bits,
            target.group_size,
            target.method,
            smooth=target.smooth,
            is_portable=target.is_portable,
            asymmetric=target.asymmetric,
        )
        for bits in bits_to_choose(is_portable=target.is_portable)
    }
    plans = {bits: plan_quantization(checkpoint, recipe) for bits, recipe in recipes.items()}
    units = find_units(plans, is_portable=target.is_portable)
    like = recipes[min(recipes)]

    def made(bits: Sequence[int]) -> tuple[Recipe, Plan, int]:
        recipe = replace(recipe_of(units, bits, like), target=target.to_json())
        plan = plan_quantization(checkpoint, recipe)
        return recipe, plan, plan.nbytes if target.nbytes is None else size_of(checkpoint, plan)

    smallest = made([min(unit.nbytes, key=lambda bits: unit.nbytes[bits]) for unit in units])
    wanted = _wanted_bytes(target, smallest[1])
    _check_reachable(target, wanted, units, smallest)
    errors, relative = measure(checkpoint, plans, units, moments, shares, progress)
    items = [
        [Choice(nbytes, error[bits]) for bits, nbytes in unit.nbytes.items()]
        for unit, error in zip(units, errors, strict=True)
    ]
    least = least_bytes(items)
    limit = wanted - (smallest[2] - least)
    while True:
        # What a choice takes beside its codes, headers and names, is known when it is made.
        allocation = allocate(items, max(limit, least))
        bits = [
            list(unit.nbytes)[index] for unit, index in zip(units, allocation.chosen, strict=True)
        ]
        recipe, plan, nbytes = made(bits)
        if nbytes <= wanted:
            return Chosen(recipe, plan, allocation, relative)
        assert limit > least, "the smallest choice fits"
        limit = min(limit, allocation.nbytes) - (nbytes - wanted)


def _wanted_bytes(target: Target, plan: Plan) -> int:
    if target.nbytes is not None:
        return target.nbytes
    assert target.bits_per_weight is not None
    return math.floor(target.bits_per_weight * plan.parameters / 8)


def _check_reachable(
    target: Target, wanted: int, units: Collection[Unit], smallest: tuple[Recipe, Plan, int]
) -> None:
    _, plan, nbytes = smallest

    def shown(count: int) -> str:
        if target.nbytes is not None:
            return f"{count:,} bytes"
        return f"{8 * count / plan.parameters:.4f} bits a weight"

    if nbytes > wanted:
        raise MemoryLimitError(
            "the target",
            expected=f"at least {shown(nbytes)}, the smallest that is possible",
            found=target.text(),
            fix="A larger --group makes it smaller"
            + ("; so may --not-portable." if target.is_portable else "."),
        )
    largest = nbytes + sum(max(u.nbytes.values()) - min(u.nbytes.values()) for u in units)
    if wanted >= largest and all(KEEP_BITS in unit.nbytes for unit in units):
        raise MemoryLimitError(
            "the target",
            expected=f"less than {shown(largest)}, all in 16 bits",
            found=target.text(),
            fix="The model needs no quantization for that.",
        )


def measure(
    checkpoint: CheckpointInPieces,
    plans: Mapping[int, Plan],
    units: Sequence[Unit],
    moments: Moments | None,
    shares: Shares | None,
    progress: ProgressCallback | None,
) -> tuple[list[dict[int, float]], dict[tuple[str, int], float]]:
    """Of each unit its error at each number of bits, and of each matrix that was measured its
    relative squared error. Memory: the largest matrix, and what is rounded of it."""
    config = parse_config(checkpoint.config)
    plan = plans[min(plans)]
    unit_of = {item.name: number for number, unit in enumerate(units) for item in unit.items}
    measured = {item.name for unit in units for item in _sampled(unit, config)}
    total = sum(item.source.nbytes for item in plan.items if item.name in measured)
    losses = [dict.fromkeys(unit.nbytes, 0.0) for unit in units]
    relative: dict[tuple[str, int], float] = {}
    done = 0
    for section, items in _in_order(plan, config):
        inputs = moments.section(section.layer) if moments and section.name != EMBEDDING else None
        for item in items:
            if item.name not in measured:
                continue
            if progress is not None:
                progress(Progress("measure", done, total, item.name))
            weights = None
            if inputs is not None:
                is_head = item.name == EMBEDDING_MODULE
                weights = inputs.inputs(HEAD_MODULE if is_head else item.name)
            number = unit_of[item.name]
            count = _count_of(item, units[number], config, shares)
            numbers = [bits for bits in units[number].nbytes if bits != KEEP_BITS]
            found = _errors(checkpoint, item, plan.dtype, weights, numbers)
            for bits, (error, unweighted) in found.items():
                losses[number][bits] += count * error
                relative[item.name, bits] = unweighted
            done += item.source.nbytes
    return losses, relative


def _in_order(plan: Plan, config: ModelConfig) -> Iterator[tuple[Section, Sequence[Item]]]:
    """The sections; an embedding that is the head too is measured as the head."""
    sections = plan_sections(plan, config.num_layers)
    moved = sections[0].items if plan.tied else ()
    for section in sections:
        if section is sections[0] and plan.tied:
            yield section, ()
        elif section is sections[-1]:
            yield section, (*section.items, *moved)
        else:
            yield section, section.items


def _sampled(unit: Unit, config: ModelConfig) -> Sequence[Item]:
    """The matrices of a unit that are measured: of the experts that share a choice some."""
    if unit.part != EXPERTS or unit.expert is not None:
        return unit.items
    assert config.moe is not None
    step = _expert_step(config)
    return [item for item in unit.items if _expert_of(item) % step == 0]


def _expert_step(config: ModelConfig) -> int:
    assert config.moe is not None
    return -(-config.moe.router.num_experts // SAMPLE_EXPERTS)


def _expert_of(item: Item) -> int:
    return int(item.name.partition(EXPERTS_PART)[2].partition(".")[0])


def _count_of(item: Item, unit: Unit, config: ModelConfig, shares: Shares | None) -> float:
    """What a matrix's error counts. Attention and MLP of each layer add to one residual stream, so
    the error of a matrix in one of them is that of a part in 2 num_layers of what reaches the head,
    alike as they are; the head's own error is in the logits whole, the embedding's in all that the
    first layer reads, and a tied matrix is both."""
    is_embedding = item.name == EMBEDDING_MODULE
    if unit.part == HEAD_PART or is_embedding:
        both = is_embedding and config.tie_embeddings
        return (4.0 if both else 2.0) * config.num_layers
    if unit.part != EXPERTS:
        return 1.0
    assert config.moe is not None
    router = config.moe.router
    share = router.experts_per_token / router.num_experts * _squared_weight(config)
    if shares is not None:
        layer = int(item.name.removeprefix(LAYER_PREFIX).partition(".")[0])
        share = shares[layer][_expert_of(item)]
    if unit.expert is not None:
        return share
    return share * router.num_experts / len(range(0, router.num_experts, _expert_step(config)))


def _squared_weight(config: ModelConfig) -> float:
    """Of an expert that is chosen, where nothing better is known: the weights of a token's experts
    are alike and add up to one."""
    assert config.moe is not None
    return 1.0 / config.moe.router.experts_per_token**2


def _errors(
    checkpoint: CheckpointInPieces,
    item: Item,
    dtype: str,
    weights: Tensor | None,
    numbers_of_bits: Collection[int],
) -> dict[int, tuple[float, float]]:
    """By number of bits: the relative squared error, columns weighted by `weights` [in], and the
    same without weights; of whole rows if the matrix is large. A method that chooses by inputs is
    measured by rounding with `weights`: what it gains beyond that is alike for all matrices."""
    assert item.rule is not None
    rows, columns = item.source.shape
    sampled = torch.arange(0, rows, -(-rows * columns // SAMPLE_WEIGHTS))
    sample = rows_at(float_pieces(checkpoint, item.source.name), sampled)
    counts = torch.ones(columns, dtype=torch.float64) if weights is None else weights.double()
    energy = float(sample.square().sum(0, dtype=torch.float64) @ counts)
    found = {}
    for bits in numbers_of_bits:
        scheme = scheme_in(bits, item.rule.scheme)
        method = method_named(item.rule.method, symmetric=scheme.symmetric)
        what = (sample, scheme, DTYPES[dtype], item.source.name)
        if isinstance(method, CalibratedMethod):
            quantized = rounding(scheme).quantize(*what, importance(counts))
        else:
            quantized = method.quantize(*what)
        steps = quantized.codes.view(len(sample), -1, scheme.group_size).to(torch.float32)
        if quantized.zero_point is not None:
            steps = steps - quantized.zero_point.to(torch.float32)[:, :, None]
        rounded = (steps * quantized.scale.to(torch.float32)[:, :, None]).view_as(sample)
        squares = (sample - rounded).square().sum(0, dtype=torch.float64)
        error = float(squares @ counts)
        found[bits] = error / energy if energy else 0.0, quantized.relative_error
    return found


def unfinished_choice(out: Path, target: Target) -> Recipe | None:
    """What was chosen for the same target by a run that was interrupted: its journal has it, and
    the source may be partly deleted by now. None where there is none."""
    known = begun_recipe(out)
    if known.get("target") != target.to_json():
        return None
    try:
        rules = rules_from_json(known["rules"])
    except (KeyError, TypeError):
        return None
    return Recipe(rules, smooth=target.smooth, target=target.to_json())


def routing_shares(trace: Trace, config: ModelConfig, shown: str) -> Shares:
    """The share of a trace's tokens that went to each expert, times the square of the weight that
    such an expert has. Raises UsageError for a trace of another model."""
    expected = None if config.moe is None else (config.moe.router.num_experts, *config.moe.layers)
    if expected != (trace.num_experts, *trace.layers) or not trace.num_tokens:
        raise UsageError(
            f"{shown}: routing",
            expected="a trace of this model",
            found=f"{trace.num_tokens:,} tokens of {quoted(trace.model)}, "
            f"{len(trace.layers)} layers of {trace.num_experts} experts",
        )
    each = _squared_weight(config) / trace.num_tokens
    chosen = trace.experts.transpose(1, 0, 2).reshape(len(trace.layers), -1)
    return {
        layer: (np.bincount(row, minlength=trace.num_experts) * each).tolist()
        for layer, row in zip(trace.layers, chosen, strict=True)
    }
