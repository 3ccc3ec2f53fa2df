"""How large a result will be, all its files together, before it is written."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.gguf_split import part_paths
from localr1.quant import documents
from localr1.quant.documents import Written
from localr1.quant.layout import Shard, index_json
from localr1.quant.pipeline import plan_files
from localr1.quant.plan import Plan
from localr1.quant.report import tensor_report
from localr1.quant.writer import FileRecord

LONGEST_ERROR = 1.2345678901234567e-100
"""No float that is written takes more characters."""
LONGEST_SIZE = 10**18
ANY_SHA256 = "0" * 64
UNKNOWN_BYTES = 4096
"""More than the repository and the commit of the source take, which are not asked for here."""


def result_bytes(checkpoint: Checkpoint, plan: Plan) -> int:
    """Bytes of the weights' files, exactly, and those of the JSON files, at most."""
    target = plan.recipe.target
    if target is not None and "bytes" in target:  # The size must not depend on what is wanted.
        longest = replace(plan.recipe, target={**target, "bytes": LONGEST_SIZE})
        plan = replace(plan, recipe=longest)
    shards = plan_files(plan)
    tokenizer = checkpoint.tokenizer_files()
    manifest = documents.manifest_json(
        checkpoint, plan, _source_records(checkpoint.path), _written(plan, shards)
    )
    texts = [
        documents.encode(each)
        for each in (
            documents.config_json(checkpoint.config, plan),
            documents.generation_config_json(checkpoint, tokenizer),
            documents.tokenizer_config_json(tokenizer, checkpoint.config),
            index_json(shards),
            manifest,
        )
    ]
    texts.append(tokenizer.tokenizer_json.encode())
    return sum(shard.nbytes for shard in shards) + sum(map(len, texts)) + UNKNOWN_BYTES


def _source_records(path: Path) -> list[FileRecord]:
    """Of every file there, of which those that are not used will not be recorded."""
    files = part_paths(path) if path.is_file() else list(path.iterdir())
    return [FileRecord(file.name, file.stat().st_size, ANY_SHA256) for file in files]


def _written(plan: Plan, shards: Sequence[Shard]) -> Written:
    reports = [
        tensor_report(item, None if item.rule is None else LONGEST_ERROR) for item in plan.items
    ]
    records = [FileRecord(shard.file_name, shard.nbytes, ANY_SHA256) for shard in shards]
    checksums = {
        shard.file_name: list(itertools.repeat(0, len(shard.experts)))
        for shard in shards
        if shard.experts
    }
    return Written(reports, records, checksums)
