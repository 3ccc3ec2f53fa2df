"""`localr1 quantize --target-size`: the options that say what is wanted, and the bits chosen."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localr1.cli.output import Output, format_bytes
from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.quant.choosing import Target
    from localr1.quant.recipe import Recipe


@dataclass(frozen=True)
class Wanted:
    """The options as they were given."""

    size: str | None
    bits_per_weight: float | None
    not_portable: bool
    routing: Path | None

    @property
    def is_given(self) -> bool:
        """Raises UsageError for both targets, and for what means nothing without one."""
        targets = [self.size is not None, self.bits_per_weight is not None]
        if all(targets):
            raise UsageError("--target-size and --target-bpw", expected="one of the two")
        for option, is_set in (("--not-portable", self.not_portable), ("--routing", self.routing)):
            if is_set and not any(targets):
                raise UsageError(option, expected="--target-size or --target-bpw beside it")
        return any(targets)

    def target(
        self,
        group: int,
        method: str,
        *,
        smooth: bool,
        asymmetric: bool,
        calibration: Path | None = None,
    ) -> "Target":
        """Raises UsageError for zero points in what is to be portable."""
        from localr1.experts.budget import parse_size
        from localr1.quant.choosing import Target

        if asymmetric and not self.not_portable:
            raise UsageError(
                "--asymmetric beside a target", expected="--not-portable too: zero points are not"
            )
        return Target(
            nbytes=None if self.size is None else parse_size(self.size, "--target-size"),
            bits_per_weight=self.bits_per_weight,
            group_size=group,
            method=method,
            smooth=smooth,
            is_portable=not self.not_portable,
            asymmetric=asymmetric,
            weighted_by=None if calibration is None else file_sha256(calibration),
            routing=None if self.routing is None else file_sha256(self.routing),
        )


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Choice:
    """errors: as `Chosen.relative_errors`; {} of a choice that an interrupted run had made.
    document: for JSON."""

    recipe: "Recipe"
    errors: Mapping[tuple[str, int], float]
    document: Mapping[str, Any]


def choose(
    output: Output,
    path: Path,
    out: Path,
    wanted: Wanted,
    target: "Target",
    calibration: Path | None = None,
    *,
    is_new: bool,
) -> Choice:
    """The recipe that reaches the target, told on stderr. calibration: a file of
    `localr1 calibrate`, by which errors are weighted; None: the built-in text is read, where
    choosing.py can. is_new: not to go on with what an interrupted run has chosen. Raises as
    `choosing.choose`, `read_trace` and CalibrationFile."""
    from localr1.checkpoint.reader import open_checkpoint
    from localr1.experts.trace import read_trace
    from localr1.models.registry import parse_config
    from localr1.quant import choosing
    from localr1.quant.calibration_file import CalibrationFile
    from localr1.quant.progress import Progress
    from localr1.quant.result_size import result_bytes

    if not is_new and (recipe := choosing.unfinished_choice(out, target)) is not None:
        output.note("The bits are those that the interrupted run has chosen.")
        return Choice(recipe, {}, {})
    with ExitStack() as stack:
        line = stack.enter_context(output.progress("measure"))
        checkpoint = stack.enter_context(open_checkpoint(path))
        config = parse_config(checkpoint.config)
        moments: choosing.Moments | None
        if calibration is None:
            moments = choosing.built_in_moments(checkpoint)
        else:
            moments = stack.enter_context(CalibrationFile(calibration, checkpoint.tensors, config))
        shares = None
        if wanted.routing is not None:
            shares = choosing.routing_shares(
                read_trace(wanted.routing), config, str(wanted.routing)
            )

        def show(progress: Progress) -> None:
            amount = f"{format_bytes(progress.done)} of {format_bytes(progress.total)}"
            line.update(progress.done, progress.total, f"measure: {amount}, {progress.name}")

        chosen = choosing.choose(
            checkpoint,
            target,
            result_bytes,
            moments=moments,
            shares=shares,
            progress=show,
        )
    allocation = chosen.allocation
    document = {
        **target.to_json(),
        "error": allocation.error,
        "least_possible_error": allocation.bound,
    }
    above = 0.0 if not allocation.error else 1 - allocation.bound / allocation.error
    output.note(
        f"Chosen for {target.text()}: "
        + (
            "no other choice has less error."
            if above < 1e-9
            else f"within {above:.2%} of the best."
        )
    )
    return Choice(chosen.recipe, chosen.relative_errors, document)
