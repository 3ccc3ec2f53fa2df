"""The sections of one quantization, one after another, each in the journal when it is done."""

from collections.abc import Sequence

import torch
from torch import Tensor

from localr1.errors import NumericsError
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.documents import Written
from localr1.quant.hidden import HiddenFiles
from localr1.quant.journal import JOURNAL_NAME, Entry, Journal, refusal
from localr1.quant.layout import Shard
from localr1.quant.methods import nf4
from localr1.quant.methods.base import CalibratedMethod, Inputs
from localr1.quant.methods.registry import method_named
from localr1.quant.packing import pack_codes, pack_zero_points
from localr1.quant.plan import Item, Plan
from localr1.quant.preparer import Preparer
from localr1.quant.progress import Progress, ProgressCallback, byte_counter, of_stage
from localr1.quant.recipe import NF4
from localr1.quant.report import TensorReport, tensor_report
from localr1.quant.schedule import Schedule
from localr1.quant.sections import Section
from localr1.quant.source import Source
from localr1.quant.writer import DTYPES, Settled, ShardWriter


class Work:
    """Writes what the journal does not say is written.

    Raises what reading, the arrival and writing raise, OutputError for an unfinished result of a
    source that has changed since, NumericsError for NaN or Inf in a weight.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        sections: Sequence[Section],
        schedule: Schedule,
        shards: Sequence[Shard],
        directory: AtomicDirectory,
        journal: Journal,
        preparer: Preparer,
        progress: ProgressCallback | None,
    ) -> None:
        self._source = source
        self._plan = plan
        self._sections = sections
        self._schedule = schedule
        self._directory = directory
        self._journal = journal
        self._progress = progress
        self._hidden = HiddenFiles(directory)
        self._writer = ShardWriter(directory, shards)
        self._preparer = preparer
        total = sum(shard.nbytes for shard in shards)
        self._verified = byte_counter("verify", total, progress)
        self._done = 0  # Bytes of the source's tensors.
        self._reports: dict[str, TensorReport] = {}
        self._expert_tokens: list[int] = []

    def run(self) -> Written:
        with self._writer:
            begin = len(self._journal.entries)
            if begin:
                self._resume(self._journal.entries)
            for number in range(begin, len(self._sections)):
                self._run_section(number)
            self._show("")
            files = self._writer.finish(self._verified)
        return Written(
            [self._reports[item.name] for item in self._plan.items],
            files,
            self._writer.expert_checksums(),
            self._expert_tokens,
        )

    def _resume(self, entries: Sequence[Entry]) -> None:
        for section, entry in zip(self._sections, entries, strict=False):
            written = {spec.name for item in section.items for spec in item.specs}
            if entry.section != section.name or entry.checksums.keys() != written:
                raise self._directory.damaged(JOURNAL_NAME)
        sha256 = {name: digest for each in entries for name, digest in each.source_sha256.items()}
        changed = self._source.resume(sha256, of_stage("hash source", self._progress))
        if changed:
            raise refusal(self._directory.path, f"another {changed[0]}")
        settled = [Settled(each.checksums, each.files) for each in entries]
        self._writer.resume(settled, self._verified)
        hidden = entries[-1].hidden
        self._hidden.remove(but=len(entries) - 1)
        if hidden is not None:
            self._preparer.resume(self._hidden.read(len(entries) - 1, hidden))
        for number, entry in enumerate(entries):
            self._expert_tokens += entry.expert_tokens
            for item in self._sections[number].items:
                self._note(item, entry.errors[item.name])
            self._release(number)

    def _run_section(self, number: int) -> None:
        section = self._sections[number]
        hashed_before = set(self._source.sha256)
        for file_name in sorted(self._schedule.needed[number]):
            self._source.require(file_name, of_stage("hash source", self._progress))
        prepared = self._preparer.prepare(section)
        self._expert_tokens += prepared.expert_tokens
        errors: dict[str, float | None] = {}
        for item in section.items:
            self._show(item.name)
            value = self._source.checkpoint.read(item.source.name)
            value = prepared.smoothing.applied(item.name, value)
            inputs = prepared.inputs(item)
            errors[item.name] = write_item(item, value, inputs, self._plan, self._writer)
            del value  # Before its successor is read.
            self._note(item, errors[item.name])
        settled = self._writer.settle(self._verified)
        self._preparer.finish(section)
        hidden = self._write_hidden(number)
        sha256 = self._source.sha256.items()
        self._journal.append(
            Entry(
                section.name,
                settled.checksums,
                errors,
                settled.files,
                {name: digest for name, digest in sha256 if name not in hashed_before},
                hidden,
                prepared.expert_tokens,
            )
        )
        self._hidden.remove(but=number)
        self._release(number)

    def _note(self, item: Item, error: float | None) -> None:
        self._reports[item.name] = tensor_report(item, error)
        self._done += item.source.nbytes

    def _release(self, number: int) -> None:
        for file_name in self._schedule.gone_after(number):
            self._source.release(file_name)

    def _write_hidden(self, number: int) -> str | None:
        """What the section behind this one starts from, as a file of its own; its SHA-256."""
        hidden = self._preparer.hidden
        if hidden is None or number == len(self._sections) - 1:
            return None
        return self._hidden.write(number, hidden)

    def _show(self, name: str) -> None:
        if self._progress is not None:
            self._progress(Progress("quantize", self._done, self._plan.read_nbytes, name))


def write_item(
    item: Item, value: Tensor, inputs: Inputs | None, plan: Plan, writer: ShardWriter
) -> float | None:
    """inputs: of the item, if its method chooses by them. Returns the relative squared error of a
    quantized item, None of a kept one."""
    if item.rule is None:
        (spec,) = item.specs
        writer.put(item.name, _kept(value, DTYPES[spec.dtype], item.source.name))
        return None
    if value.dtype == torch.float64:
        value = value.to(torch.float32)
    if item.rule.method == NF4:
        encoded = nf4.encode(value, item.name, DTYPES[plan.dtype])
        for name, part in encoded.parts.items():
            writer.put(name, part)
        return encoded.relative_error
    scheme = item.rule.scheme
    method = method_named(item.rule.method, symmetric=scheme.symmetric)
    what = (value, scheme, DTYPES[plan.dtype], item.source.name)
    if isinstance(method, CalibratedMethod):
        assert inputs is not None
        quantized = method.quantize_for(inputs, *what)
    else:
        quantized = method.quantize(*what)
    writer.put(f"{item.name}.weight_packed", pack_codes(quantized.codes, scheme))
    if quantized.zero_point is not None:
        zero_point = pack_zero_points(quantized.zero_point, scheme)
        writer.put(f"{item.name}.weight_zero_point", zero_point)
    writer.put(f"{item.name}.weight_scale", quantized.scale)
    writer.put(f"{item.name}.weight_shape", torch.tensor(value.shape, dtype=torch.int64))
    return quantized.relative_error


def _kept(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    kept = value.to(dtype)
    if not torch.isfinite(kept).all():
        raise NumericsError(
            f"{name}: values",
            expected=f"finite numbers within the range of {dtype}",
            found="NaN, Inf or a larger number",
            fix="The source checkpoint is damaged: download or convert it again.",
        )
    return kept
