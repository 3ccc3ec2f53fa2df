"""From a source checkpoint to a quantized directory, one layer after another."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.gguf_split import part_paths
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.paths import resolve
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import NumericsError
from localr1.models.registry import parse_config
from localr1.quant import documents
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
from localr1.quant.writer import DTYPES, FileRecord, ShardWriter, hash_file

DOCUMENT_BYTES = 64 << 20
"""Room for everything beside the weights, in the check of the free space."""

SOURCE_DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class Progress:
    """stage: "quantize" (bytes of the source's tensors), "hash source" or "verify" (bytes of
    files), "calibrate" (layers); all but "hash source" take turns, layer by layer, and each goes on
    where it was. name: the tensor or file at work."""

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
    open_file: Callable[[Path], BinaryIO] = open_file,
) -> Report:
    """Write `source` (a directory or a .gguf file) to the new directory `out`.

    Memory: the largest tensor, its codes and their packed form; with smoothing, that tensor in
    float32, or what a text comes to in one layer. The same source, recipe and versions give the
    same bytes. open_file: see AtomicDirectory.

    Raises the errors of `open_checkpoint` and `plan_quantization`, NumericsError for NaN or Inf in
    a weight, OutputError when `out` cannot be written. After any error, or a kill, nothing is left
    under the name `out`.
    """
    started = time.monotonic()
    directory = AtomicDirectory(out, open_file)
    with open_checkpoint(source) as checkpoint:
        plan = plan_quantization(checkpoint, recipe)
        tokenizer = checkpoint.tokenizer_files()
        shards = plan_files(plan)
        directory.check(sum(shard.nbytes for shard in shards) + DOCUMENT_BYTES)
        source_files = _hash_source(checkpoint, progress)
        with directory:
            written = _write_tensors(checkpoint, plan, shards, directory, progress)
            for name, document in (
                ("config.json", documents.config_json(checkpoint.config, plan)),
                ("generation_config.json", documents.generation_config_json(checkpoint, tokenizer)),
                (
                    "tokenizer_config.json",
                    documents.tokenizer_config_json(tokenizer, checkpoint.config),
                ),
                (
                    MANIFEST_NAME,
                    documents.manifest_json(checkpoint, plan, source_files, written),
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


def _write_tensors(
    checkpoint: Checkpoint,
    plan: Plan,
    shards: list[Shard],
    directory: AtomicDirectory,
    progress: ProgressCallback | None,
) -> documents.Written:
    def show_layer(done: int, total: int) -> None:
        if progress is not None:
            progress(Progress("calibrate", done, total, DEFAULT_TEXT.name))

    config = parse_config(checkpoint.config)
    smoother = Smoother(checkpoint, plan, config, show_layer)
    count_verified = _byte_counter("verify", sum(shard.nbytes for shard in shards), "", progress)
    done = 0
    reports: dict[str, TensorReport] = {}
    with ShardWriter(directory, shards) as writer:
        for section in plan_sections(plan, config.num_layers):
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


def _hash_source(checkpoint: Checkpoint, progress: ProgressCallback | None) -> list[FileRecord]:
    """Of the GGUF file, all its parts, or of a directory's safetensors files and the documents that
    were read."""
    path = checkpoint.path
    if path.is_dir():
        names = sorted(file.name for file in path.glob("*.safetensors"))
        names += [name for name in SOURCE_DOCUMENTS if (path / name).exists()]
        paths = [resolve(path.resolve(), name) for name in names]
    else:
        paths = part_paths(path)
        names = [part.name for part in paths]
    total = sum(file.stat().st_size for file in paths)
    counter = _byte_counter("hash source", total, path.name, progress)
    records = [hash_file(file, counter) for file in paths]
    # A file of the Hugging Face cache is a link to a blob of another name.
    return [
        FileRecord(name, record.nbytes, record.sha256)
        for name, record in zip(names, records, strict=True)
    ]


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
