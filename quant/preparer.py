"""As a quantization goes on: what each section is smoothed by, and what a text says of its inputs,
when its turn comes."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from localr1.cgroup import available_memory
from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.stored import CheckpointInPieces
from localr1.errors import MemoryLimitError, UnsupportedError, UsageError
from localr1.models.config import ModelConfig
from localr1.quant.awq import ScaleSearch, searched_rows
from localr1.quant.calibrate import Calibration, calibration_windows
from localr1.quant.calibration_file import Calibrated, CalibrationFile, section_specs
from localr1.quant.calibration_options import (
    CalibrationOptions,
    calibrated_method,
    needs_calibration,
    needs_hessian,
    needs_hessians,
)
from localr1.quant.evaluate import read_text
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.hessians import hessian_bytes
from localr1.quant.methods.base import Inputs
from localr1.quant.moments import ExpertUse, SectionMoments, importance
from localr1.quant.plan import Item, Plan
from localr1.quant.sections import Section
from localr1.quant.smoothing import Link, Smoothing, even_scale, smoothing
from localr1.quant.source import Source
from localr1.quant.stored_rows import float_pieces, rows_at
from localr1.quant.writer import DTYPES, hash_file

NOTHING = Smoothing({}, {}, {})

LayerProgress = Callable[[int, int, str], None]
"""Called with layers measured, layers in all and the name of the text."""


@dataclass(frozen=True)
class Prepared:
    """Of one section. moments: None where nothing is measured. expert_tokens: how many tokens each
    of its routed experts saw."""

    smoothing: Smoothing
    moments: SectionMoments | None

    @property
    def expert_tokens(self) -> list[int]:
        if self.moments is None or self.moments.experts is None:
            return []
        tokens: list[int] = self.moments.experts.tokens.tolist()
        return tokens

    def inputs(self, item: Item) -> Inputs | None:
        """Of an item whose method chooses by them."""
        if item.rule is None or calibrated_method(item.rule.method) is None:
            return None
        assert self.moments is not None
        squares, hessians = self.moments.inputs(item.name), self.moments.hessians
        # Where columns were multiplied, inputs were divided.
        columns = self.smoothing.columns.get(item.name, torch.ones(1)).to(torch.float64)
        if hessians is None:
            return Inputs(importance(squares / columns.square()))

        def hessian() -> Tensor:
            return hessians.of(item.name).div_(columns).div_(columns[:, None])

        return Inputs(importance(squares / columns.square()), hessian)


class Preparer:
    """Hand it every section, in order, to `prepare` before and to `finish` after it is written: the
    calibration text goes through each, or what is known of it is read from a file. Of a plan that
    needs neither it reads nothing.

    The text goes through the unquantized model; where a method asks for Hessians, through the
    quantized layers before, as the paper has it (Frantar et al. 2022, section 4, "Setup"): a layer
    is measured as it was, on what the written layers before it make of the text.

    Use it in a `with`. Raises UsageError for a file that is given and not needed, or of another
    model, what opening it raises, and UsageError for a text that is too short.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        config: ModelConfig,
        options: CalibrationOptions,
        written: CheckpointInPieces,
        progress: LayerProgress | None = None,
    ) -> None:
        """written: of the sections that are finished."""
        self._source = source
        self._plan = plan
        self._config = config
        self._rules = {item.name: item.rule for item in plan.items if item.rule}
        self._stored = {item.name: item.source for item in plan.items if item.rule}
        self._progress = progress
        self._pass: Calibration | None = None
        self._written_pass: Calibration | None = None
        self.calibrated: Calibrated | None = None
        """What was read; None where nothing is needed. Its source is that of a file alone."""
        checkpoint = source.checkpoint
        self._file = open_calibration(plan, options, checkpoint, config)
        if not needs_calibration(plan):
            return
        if self._file is not None:
            self.calibrated = self._file.calibrated
            self._file.check_names(source.file_names)
            return
        self.calibrated, windows = text_to_read(plan, options, checkpoint, config)
        self._pass = Calibration(checkpoint, config, windows)
        if needs_hessians(plan):
            self._written_pass = Calibration(written, config, windows, observes=False)

    @property
    def identity(self) -> dict[str, Any] | None:
        """What must be the same for an unfinished result to be gone on with, for JSON."""
        if self.calibrated is None:
            return None
        if self._file is not None:
            return {"file_sha256": hash_file(self._file.path).sha256}
        return {"text_sha256": self.calibrated.text_sha256, "tokens": self.calibrated.tokens}

    @property
    def hidden(self) -> Tensor | None:
        """float32 [T, hidden_size], what the next section starts from; None if it is not needed."""
        passed = self._written_pass or self._pass
        return None if passed is None else passed.hidden

    def resume(self, hidden: Tensor) -> None:
        """Go on behind the section after which `hidden` was this, in any shape."""
        passed = self._written_pass or self._pass
        assert passed is not None
        passed.hidden = hidden.view(-1, self._config.hidden_size)

    def prepare(self, section: Section) -> Prepared:
        """Raises as Calibration's methods, or CalibrationFile's."""
        if self._file is not None:
            for file_name, sha256 in self._source.sha256.items():
                self._file.check_source(file_name, sha256)
        moments = self._moments(section)
        if moments is None:
            return Prepared(NOTHING, None)
        return Prepared(self._smoothing(moments), moments)

    def finish(self, section: Section) -> None:
        """All of the section is written."""
        if self._written_pass is None:
            return
        if section.layer is not None:
            self._written_pass.layer(section.layer)
        elif section.name == "embedding":
            self._written_pass.embed()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> "Preparer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _moments(self, section: Section) -> SectionMoments | None:
        """None where none are needed."""
        if self.calibrated is None:
            return None
        if section.name == "embedding":
            if self._pass is not None and self._written_pass is None:
                self._pass.embed()
            return None
        if section.layer is None and not self._needs_head(section):
            return None
        if self._file is not None:
            return self._file.section(section.layer)
        assert self._pass is not None
        if self._written_pass is not None:
            self._pass.hidden = self._written_pass.hidden.clone()
        wanted = [item.name for item in section.items if item.rule and needs_hessian(item.rule)]
        if section.layer is None:
            return self._pass.head(wanted)
        moments = self._pass.layer(section.layer, wanted)
        if self._progress is not None:
            done, total = section.layer + 1, self._config.num_layers
            self._progress(done, total, self.calibrated.text)
        return moments

    def _needs_head(self, section: Section) -> bool:
        links = any("lm_head" in link.readers for link in self._plan.links)
        rules = [item.rule for item in section.items if item.rule is not None]
        return links or any(calibrated_method(rule.method) is not None for rule in rules)

    def _smoothing(self, moments: SectionMoments) -> Smoothing:
        """By the links whose readers were measured."""
        links = [link for link in self._plan.links if moments.has(link.readers[0])]
        norms = {
            link.maker: self._source.checkpoint.read(f"{link.maker}.weight")
            for link in links
            if link.is_norm
        }
        dtype = DTYPES[self._plan.dtype]
        search = ScaleSearch(moments, self._read_searched, self._rules, self._config, dtype)
        # As there: what stays of every expert is given its place before any is read.
        searched = [link for link in links if link.searched]
        sizes = [len(moments.inputs(link.readers[0])) for link in searched]
        room = torch.split(torch.empty(sum(sizes)), sizes)
        places: dict[Link, Tensor] = dict(zip(searched, room, strict=True))

        def scale_of(link: Link) -> Tensor:
            if link.searched:
                return places[link].copy_(search.scale_of(link))
            return even_scale([moments.columns[reader] for reader in link.readers])

        return smoothing(links, scale_of, norms, dtype, self._config)

    def _read_searched(self, module: str) -> Tensor:
        stored = self._stored[module]
        pieces = float_pieces(self._source.checkpoint, stored.name)
        return rows_at(pieces, searched_rows(stored.shape[0]))


def text_to_read(
    plan: Plan, options: CalibrationOptions, checkpoint: Checkpoint, config: ModelConfig
) -> tuple[Calibrated, list[Tensor]]:
    """What a plan that needs a calibration reads where no file has it, and its windows. Raises
    UsageError for a text that is too short."""
    text = read_text(options.text)
    tokens = options.tokens_for(plan, config.max_positions)
    windows = calibration_windows(checkpoint, config, text, tokens)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Calibrated({}, options.text.name, digest, sum(map(len, windows))), windows


def open_calibration(
    plan: Plan, options: CalibrationOptions, checkpoint: Checkpoint, config: ModelConfig
) -> CalibrationFile | None:
    """The file of the options, if they have one.

    Raises UsageError for options that the plan has no use for, UnsupportedError for a plan that
    asks for inputs of what has none, MemoryLimitError where there is too little for what it
    measures, and what opening the file raises.
    """
    if not needs_calibration(plan):
        # What a target's bits were chosen by has had its use.
        if options != CalibrationOptions() and plan.recipe.target is None:
            raise UsageError(
                "calibration",
                expected="none: neither the method nor smoothing looks at a model's inputs",
                found="a file or a text",
                fix="Leave it out, or choose --method imatrix.",
            )
        return None
    _check_measurable(plan, checkpoint, config)
    _check_memory(plan)
    if options.file is None:
        return None
    needed = None
    if plan.recipe.rotation is not None:
        needed = "a text: rotation changes what is measured"
    if needs_hessians(plan):
        needed = "a text: gptq measures more than such a file holds"
    if needed is not None:
        raise UsageError(
            f"{options.file}",
            expected=needed,
            found="a calibration file",
            fix="Leave --calibration out; --text and --tokens choose the text.",
        )
    return CalibrationFile(options.file, checkpoint.tensors, config)


def _check_measurable(plan: Plan, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raises UnsupportedError for a matrix whose method chooses by its inputs, which has none."""
    specs = section_specs(checkpoint.tensors, config)
    measured = {spec.name.removesuffix(".inputs") for section in specs for spec in section}
    for item in plan.items:
        if item.rule is None or calibrated_method(item.rule.method) is None:
            continue
        if item.name not in measured and EXPERTS_PART not in item.name:
            raise UnsupportedError(
                f"recipe: {item.name}",
                expected="rtn: it is looked up, or routes, and no inputs of it are measured",
                found=item.rule.method,
            )


def _check_memory(plan: Plan) -> None:
    """Raises MemoryLimitError where this machine has less than gptq takes: all else goes by one
    matrix at a time, of whatever model."""
    columns = {
        item.name: item.source.shape[1]
        for item in plan.items
        if item.rule is not None and needs_hessian(item.rule)
    }
    if not columns:
        return
    needed, available = hessian_bytes(columns), available_memory()
    if needed > available:
        raise MemoryLimitError(
            f"gptq of matrices with {max(columns.values()):,} inputs",
            expected=f"{needed / 2**30:.1f} GiB of memory for products of inputs",
            found=f"{available / 2**30:.1f} GiB free",
            fix="Use --method awq+imatrix or --recipe balanced, which need one matrix at a time.",
        )


def calibration_json(
    calibrated: Calibrated | None, expert_tokens: Sequence[int]
) -> dict[str, Any] | None:
    """For localr1.json. expert_tokens: of all experts of all layers."""
    if calibrated is None:
        return None
    use = expert_use(expert_tokens)
    document: Mapping[str, Any] = {
        "text": calibrated.text,
        "text_sha256": calibrated.text_sha256,
        "tokens": calibrated.tokens,
        "experts": None if use is None else asdict(use),
    }
    return dict(document)


def expert_use(expert_tokens: Sequence[int]) -> ExpertUse | None:
    if not expert_tokens:
        return None
    return ExpertUse.of(torch.tensor(expert_tokens))
