"""From a source checkpoint to a quantized directory, one layer after another."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

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
from localr1.quant.sections import plan_sections
from localr1.quant.source import Source
from localr1.quant.work import Work
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
    are there and stay. Memory: the largest tensor, its codes and their packed form; with smoothing
    or rotation, that tensor in float32 too; where the model is run, see calibrate.py. The same
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
        checkpoint = opened.checkpoint
        if restart and opened.gone:
            raise UsageError(
                f"{source}: {len(opened.gone)} of its shards are deleted",
                expected="to go on with the unfinished result, which alone has what was in them",
                found="--restart, which would throw it away",
                fix="Leave --restart out, or download the model again.",
            )
        plan = plan_quantization(checkpoint, recipe)
        tokenizer = checkpoint.tokenizer_files()
        shards = plan_files(plan)
        config = parse_config(checkpoint.config)
        sections = plan_sections(plan, config.num_layers)
        schedule = opened.schedule(sections)
        directory.check(_room(opened, schedule, shards, directory))
        options, show = calibration or CalibrationOptions(), of_stage("calibrate", progress)
        new_config = documents.config_json(checkpoint.config, plan)
        so_far = WrittenCheckpoint(directory, shards, new_config)
        with Preparer(opened, plan, config, options, so_far, show) as preparer, directory:
            documents_read = opened.documents(of_stage("hash source", progress))
            expected = identity(opened.identity(documents_read), plan, shards)
            journal = Journal(directory, {**expected, "calibration": preparer.identity})
            work = Work(
                opened, plan, sections, schedule, shards, directory, journal, preparer, progress
            )
            try:
                written = work.run()
            except DAMAGE:
                directory.keep &= opened.releases or bool(opened.gone)
                raise
            manifest = documents.manifest_json(
                checkpoint,
                plan,
                opened.records(documents_read),
                written,
                opened.origin,
                calibration_json(preparer.calibrated, written.expert_tokens),
            )
            for name, document in (
                ("config.json", new_config),
                ("generation_config.json", documents.generation_config_json(checkpoint, tokenizer)),
                (
                    "tokenizer_config.json",
                    documents.tokenizer_config_json(tokenizer, checkpoint.config),
                ),
                (MANIFEST_NAME, manifest),
                ("model.safetensors.index.json", index_json(shards)),
            ):
                directory.write(name, documents.encode(document))
            directory.write("tokenizer.json", tokenizer.tokenizer_json.encode())
            directory.commit()
    seconds = time.monotonic() - started
    use = expert_use(written.expert_tokens)
    return make_report(source, out, plan, written.tensors, seconds, preparer.calibrated, use)


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
    source: Source, schedule: Schedule, shards: list[Shard], directory: AtomicDirectory
) -> int:
    """Bytes that must be free before anything is begun, or gone on with."""
    if source.device != directory.device:  # What comes and goes there changes nothing here.
        schedule = replace(schedule, sizes=dict.fromkeys(schedule.sizes, 0))
    begin = count_entries(directory)
    peak = schedule.peak(source.there, releases=source.releases, begin=begin)
    return peak + sum(len(shard.header) for shard in shards) + DOCUMENT_BYTES
