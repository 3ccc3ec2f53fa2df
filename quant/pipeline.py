"""From a source checkpoint to a quantized directory, one layer after another."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from localr1.checkpoint.api import TokenizerFiles
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import (
    FormatError,
    NumericsError,
    TensorError,
    TruncatedError,
    UsageError,
)
from localr1.heap import own_pages
from localr1.models.config import ModelConfig
from localr1.models.registry import parse_config
from localr1.quant import documents
from localr1.quant.arrival import Arrival
from localr1.quant.atomic import AtomicDirectory, open_file
from localr1.quant.calibration_options import CalibrationOptions, needs_calibration
from localr1.quant.journal import JOURNAL_NAME, Journal, count_entries, identity
from localr1.quant.layout import Shard, index_json, plan_expert_shard, plan_shards
from localr1.quant.plan import Plan, plan_quantization
from localr1.quant.preparer import (
    Preparer,
    calibration_json,
    expert_use,
    open_calibration,
    text_to_read,
)
from localr1.quant.progress import ProgressCallback, of_stage
from localr1.quant.recipe import Recipe
from localr1.quant.report import Report, make_report, tensor_report
from localr1.quant.rotation import rotated
from localr1.quant.schedule import Schedule
from localr1.quant.sections import Section, plan_sections
from localr1.quant.source import Source
from localr1.quant.work import Work
from localr1.quant.writer import FileRecord
from localr1.quant.written import WrittenCheckpoint

DOCUMENT_BYTES = 64 << 20
"""Room for everything beside the weights, in the check of the free space."""


DAMAGE = (NumericsError, FormatError, TensorError, TruncatedError)
"""Errors that say that the source is no good: another will be needed."""


def quantize(
    source: Path,
    out: Path,
    recipe: Recipe,
    progress: ProgressCallback | None = None,
    *,
    calibration: CalibrationOptions | None = None,
    arrival: Arrival | None = None,
    restart: bool = False,
    open_file: Callable[[Path], BinaryIO] = open_file,
) -> Report:
    """Write `source` (a directory or a .gguf file) to the new directory `out`.

    calibration: where what the recipe's method and smoothing know of the model's inputs is from;
    None: from the built-in text. arrival: how the shards of the directory come and go; None: they
    are there and stay. Memory: three pieces of a tensor (item_maker.py), or a whole one where its
    method wants that; where the model is run, see calibrate.py and hessians.py. The same
    source, recipe, text and versions give the same bytes, in whatever order the shards arrive.
    open_file: see AtomicDirectory.

    Raises the errors of `open_checkpoint`, `plan_quantization` and Preparer, NumericsError for NaN
    or Inf in a weight, OutputError when `out` cannot be written, and what the arrival raises. After
    any error, or a kill, nothing is left under the name `out`; but the layers that were done are
    kept (journal.py), and the same call goes on behind them, to the same bytes. With another
    source, recipe, text or version it raises OutputError instead, unless `restart`: then it begins
    anew. Where the source is damaged nothing is kept, unless shards of it are gone.
    """
    started = time.monotonic()
    directory = AtomicDirectory(out, open_file, None if restart else JOURNAL_NAME)
    with own_pages(), Source(source, arrival, recipe.rotation) as opened:
        if restart:
            _check_restart(opened, source)
        job = _decided(opened, recipe)
        directory.check(_room(opened, job.schedule, job.shards, directory))
        options, show = calibration or CalibrationOptions(), of_stage("calibrate", progress)
        so_far = WrittenCheckpoint(directory, job.shards, job.new_config)
        with (
            Preparer(opened, job.plan, job.config, options, so_far, show) as preparer,
            directory,
        ):
            documents_read = opened.documents(of_stage("hash source", progress))
            written = _write_weights(opened, job, directory, preparer, documents_read, progress)
            calibrated = calibration_json(preparer.calibrated, written.expert_tokens)
            _write_documents(opened, job, directory, documents_read, written, calibrated)
            directory.commit()
    seconds = time.monotonic() - started
    use = expert_use(written.expert_tokens)
    return make_report(source, out, job.plan, written.tensors, seconds, preparer.calibrated, use)


@dataclass(frozen=True)
class _Job:
    """All that is decided before a byte of weights is read. config: of the source's model.
    new_config: what becomes config.json."""

    plan: Plan
    config: ModelConfig
    tokenizer: TokenizerFiles
    shards: Sequence[Shard]
    sections: list[Section]
    schedule: Schedule
    new_config: Mapping[str, Any]


def _decided(source: Source, recipe: Recipe) -> _Job:
    checkpoint = source.checkpoint
    plan = plan_quantization(checkpoint, recipe)
    tokenizer = checkpoint.tokenizer_files()
    config = parse_config(checkpoint.config)
    sections = plan_sections(plan, config.num_layers)
    return _Job(
        plan,
        config,
        tokenizer,
        plan_files(plan),
        sections,
        source.schedule(sections),
        documents.config_json(checkpoint.config, plan),
    )


def _check_restart(source: Source, path: Path) -> None:
    if source.gone:
        raise UsageError(
            f"{path}: {len(source.gone)} of its shards are deleted",
            expected="to go on with the unfinished result, which alone has what was in them",
            found="--restart, which would throw it away",
            fix="Leave --restart out, or download the model again.",
        )


def _write_weights(
    source: Source,
    job: _Job,
    directory: AtomicDirectory,
    preparer: Preparer,
    documents_read: list[FileRecord],
    progress: ProgressCallback | None,
) -> documents.Written:
    """What the journal does not have yet. Of a source that is damaged nothing is kept, unless
    shards of it are gone."""
    expected = identity(source.identity(documents_read), job.plan, job.shards)
    journal = Journal(directory, {**expected, "calibration": preparer.identity})
    work = Work(
        source,
        job.plan,
        job.sections,
        job.schedule,
        job.shards,
        directory,
        journal,
        preparer,
        progress,
    )
    try:
        return work.run()
    except DAMAGE:
        directory.keep &= source.releases or bool(source.gone)
        raise


def _write_documents(
    source: Source,
    job: _Job,
    directory: AtomicDirectory,
    documents_read: list[FileRecord],
    written: documents.Written,
    calibrated: Mapping[str, Any] | None,
) -> None:
    """The files beside the weights."""
    checkpoint, tokenizer = source.checkpoint, job.tokenizer
    records = source.records(documents_read)
    for name, document in (
        ("config.json", job.new_config),
        ("generation_config.json", documents.generation_config_json(checkpoint, tokenizer)),
        ("tokenizer_config.json", documents.tokenizer_config_json(tokenizer, checkpoint.config)),
        (
            MANIFEST_NAME,
            documents.manifest_json(
                checkpoint, job.plan, records, written, source.origin, calibrated
            ),
        ),
        ("model.safetensors.index.json", index_json(job.shards)),
    ):
        directory.write(name, documents.encode(document))
    directory.write("tokenizer.json", tokenizer.tokenizer_json.encode())


def dry_run(
    source: Path,
    recipe: Recipe,
    calibration: CalibrationOptions | None = None,
    errors: Mapping[tuple[str, int], float] | None = None,
) -> Report:
    """What `quantize` would write. Reads no weights and writes nothing. errors: relative, of
    matrices that were measured in some number of bits."""
    known = errors or {}
    started = time.monotonic()
    with rotated(open_checkpoint(source), recipe.rotation) as checkpoint:
        plan = plan_quantization(checkpoint, recipe)
        checkpoint.tokenizer_files()
        config, options = parse_config(checkpoint.config), calibration or CalibrationOptions()
        calibrated = None
        if (file := open_calibration(plan, options, checkpoint, config)) is not None:
            calibrated = file.calibrated
            file.close()
        elif needs_calibration(plan):
            calibrated, _ = text_to_read(plan, options, checkpoint, config)
    tensors = [
        tensor_report(item, known.get((item.name, item.rule.scheme.bits)) if item.rule else None)
        for item in plan.items
    ]
    return make_report(source, None, plan, tensors, time.monotonic() - started, calibrated)


def plan_files(plan: Plan) -> list[Shard]:
    """In the order of the plan's items."""
    return plan_shards([item.specs for item in plan.dense]) + [
        plan_expert_shard(layer, [[item.specs for item in expert] for expert in experts])
        for layer, experts in plan.experts.items()
    ]


def _room(
    source: Source, schedule: Schedule, shards: Sequence[Shard], directory: AtomicDirectory
) -> int:
    """Bytes that must be free before anything is begun, or gone on with."""
    if source.device != directory.device:  # What comes and goes there changes nothing here.
        schedule = replace(schedule, sizes=dict.fromkeys(schedule.sizes, 0))
    begin = count_entries(directory)
    peak = schedule.peak(source.there, releases=source.releases, begin=begin)
    return peak + sum(len(shard.header) for shard in shards) + DOCUMENT_BYTES
