"""From a source checkpoint to a quantized directory, one layer after another."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import NumericsError
from localr1.models.registry import parse_config
from localr1.quant import documents
from localr1.quant.arrival import Arrival
from localr1.quant.atomic import AtomicDirectory, open_file
from localr1.quant.calibrate import DEFAULT_TEXT
from localr1.quant.layout import Shard, index_json, plan_expert_shard, plan_shards
from localr1.quant.methods.registry import method_named
from localr1.quant.packing import pack_codes
from localr1.quant.plan import Item, Plan, plan_quantization
from localr1.quant.recipe import Recipe
from localr1.quant.report import Report, TensorReport, make_report, tensor_report
from localr1.quant.sections import plan_sections
from localr1.quant.smoother import Smoother
from localr1.quant.source import HashProgress, Source
from localr1.quant.writer import DTYPES, ShardWriter

DOCUMENT_BYTES = 64 << 20
"""Room for everything beside the weights, in the check of the free space."""


@dataclass(frozen=True)
class Progress:
    """stage: "quantize" (bytes of the source's tensors), "hash source" or "verify" (bytes of
    files), "calibrate" (layers); they take turns, layer by layer, and each goes on where it was.
    name: the tensor or file at work."""

    stage: str
    done: int
    total: int
    name: str


ProgressCallback = Callable[[Progress], None]


def quantize(
    source: Path,
    out: Path,
    recipe: Recipe,
    progress: ProgressCallback | None = None,
    *,
    arrival: Arrival | None = None,
    open_file: Callable[[Path], BinaryIO] = open_file,
) -> Report:
    """Write `source` (a directory or a .gguf file) to the new directory `out`.

    arrival: how the shards of the directory come and go; None: they are there and stay.
    Memory: the largest tensor, its codes and their packed form; with smoothing, that tensor in
    float32, or what a text comes to in one layer. The same source, recipe and versions give the
    same bytes, in whatever order the shards arrive. open_file: see AtomicDirectory.

    Raises the errors of `open_checkpoint` and `plan_quantization`, NumericsError for NaN or Inf in
    a weight, OutputError when `out` cannot be written, and what the arrival raises. After any
    error, or a kill, nothing is left under the name `out`.
    """
    started = time.monotonic()
    directory = AtomicDirectory(out, open_file)
    with Source(source, arrival) as opened:
        checkpoint = opened.checkpoint
        plan = plan_quantization(checkpoint, recipe)
        tokenizer = checkpoint.tokenizer_files()
        shards = plan_files(plan)
        directory.check(_room(opened, plan, shards, directory))
        with directory:
            documents_read = opened.documents(_hash_shower(progress))
            written = _write_tensors(opened, plan, shards, directory, progress)
            source_files = opened.records(documents_read)
            for name, document in (
                ("config.json", documents.config_json(checkpoint.config, plan)),
                ("generation_config.json", documents.generation_config_json(checkpoint, tokenizer)),
                (
                    "tokenizer_config.json",
                    documents.tokenizer_config_json(tokenizer, checkpoint.config),
                ),
                (
                    MANIFEST_NAME,
                    documents.manifest_json(checkpoint, plan, source_files, written, opened.origin),
                ),
            ):
                directory.write(name, documents.encode(document))
            directory.write("tokenizer.json", tokenizer.tokenizer_json.encode())
            directory.write("model.safetensors.index.json", documents.encode(index_json(shards)))
            directory.commit()
    seconds = time.monotonic() - started
    return make_report(source, out, plan, written.tensors, seconds)


def dry_run(source: Path, recipe: Recipe) -> Report:
    """What `quantize` would write. Reads no weights and writes nothing."""
    started = time.monotonic()
    with open_checkpoint(source) as checkpoint:
        plan = plan_quantization(checkpoint, recipe)
        checkpoint.tokenizer_files()
    tensors = [tensor_report(item, None) for item in plan.items]
    return make_report(source, None, plan, tensors, time.monotonic() - started)


def plan_files(plan: Plan) -> list[Shard]:
    """In the order of the plan's items."""
    return plan_shards([item.specs for item in plan.dense]) + [
        plan_expert_shard(layer, [[item.specs for item in expert] for expert in experts])
        for layer, experts in plan.experts.items()
    ]


def _room(source: Source, plan: Plan, shards: list[Shard], directory: AtomicDirectory) -> int:
    """Bytes that must be free before anything is begun."""
    num_layers = parse_config(source.checkpoint.config).num_layers
    schedule = source.schedule(plan_sections(plan, num_layers))
    if source.device != directory.device:  # What comes and goes there changes nothing here.
        schedule = replace(schedule, sizes=dict.fromkeys(schedule.sizes, 0))
    headers = sum(len(shard.header) for shard in shards)
    return schedule.peak(source.there, releases=source.releases) + headers + DOCUMENT_BYTES


def _write_tensors(
    source: Source,
    plan: Plan,
    shards: list[Shard],
    directory: AtomicDirectory,
    progress: ProgressCallback | None,
) -> documents.Written:
    def show_layer(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("calibrate", done, total, DEFAULT_TEXT.name))

    checkpoint = source.checkpoint
    config = parse_config(checkpoint.config)
    smoother = Smoother(checkpoint, plan, config, show_layer)
    count_verified = _byte_counter("verify", sum(shard.nbytes for shard in shards), "", progress)
    sections = plan_sections(plan, config.num_layers)
    schedule = source.schedule(sections)
    done = 0
    reports: dict[str, TensorReport] = {}
    with ShardWriter(directory, shards) as writer:
        for number, section in enumerate(sections):
            for file_name in sorted(schedule.needed[number]):
                source.require(file_name, _hash_shower(progress))
            smooth = smoother.smoothing_of(section)
            for item in section.items:
                if progress is not None:
                    progress(Progress("quantize", done, plan.read_nbytes, item.name))
                value = smooth.applied(item.name, checkpoint.read(item.source.name))
                error = _write_item(item, value, plan, writer)
                del value  # Before its successor is read.
                reports[item.name] = tensor_report(item, error)
                done += item.source.nbytes
            writer.settle(count_verified)
            for file_name in schedule.gone_after(number):
                source.release(file_name)
        if progress is not None:
            progress(Progress("quantize", done, plan.read_nbytes, ""))
        files = writer.finish(count_verified)
    return documents.Written(
        [reports[item.name] for item in plan.items], files, writer.expert_checksums()
    )


def _write_item(item: Item, value: Tensor, plan: Plan, writer: ShardWriter) -> float | None:
    """Returns the relative squared error of a quantized item, None of a kept one."""
    if item.rule is None:
        (spec,) = item.specs
        writer.put(item.name, _kept(value, DTYPES[spec.dtype], item.source.name))
        return None
    if value.dtype == torch.float64:
        value = value.to(torch.float32)
    quantized = method_named(item.rule.method).quantize(
        value, item.rule.scheme, DTYPES[plan.dtype], item.source.name
    )
    writer.put(f"{item.name}.weight_packed", pack_codes(quantized.codes, item.rule.scheme))
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


def _hash_shower(progress: ProgressCallback | None) -> HashProgress | None:
    if progress is None:
        return None
    return lambda done, total, name: progress(Progress("hash source", done, total, name))


def _byte_counter(
    stage: str, total: int, name: str, progress: ProgressCallback | None
) -> Callable[[int], None] | None:
    """A callback for `hash_file` that adds up."""
    if progress is None:
        return None
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(Progress(stage, done, total, name))

    return count
