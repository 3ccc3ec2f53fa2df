"""The JSON files beside the weights: what transformers, vLLM and localr1 itself read."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

import localr1
from localr1.checkpoint.api import Checkpoint, TokenizerFiles
from localr1.checkpoint.manifest import EXPERT_CHECKSUMS, checksum_text
from localr1.checkpoint.paths import HubOrigin
from localr1.quant.experts import EXPERTS_PART
from localr1.quant.name_ranges import name_ranges
from localr1.quant.plan import TORCH_DTYPES, Plan
from localr1.quant.report import TensorReport
from localr1.quant.writer import FileRecord

MANIFEST_VERSION = 1
PREDICTION_LAYERS = "num_nextn_predict_layers"

NOT_CARRIED_OVER = ("auto_map", "dtype", "_name_or_path", "transformers_version")
"""Of config.json: invitations to run code, and facts about the source that are not true here."""


@dataclass(frozen=True)
class Written:
    """What was put into the safetensors files. expert_checksums: ShardWriter's. expert_tokens: how
    many tokens of the calibration text each routed expert saw; none where it was not asked."""

    tensors: Sequence[TensorReport]
    files: Sequence[FileRecord]
    expert_checksums: Mapping[str, Sequence[int]]
    expert_tokens: Sequence[int] = ()


def encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def config_json(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The source's config.json with what changed. `torch_dtype` is the spelling that old and new
    readers both know. Where multi-token-prediction layers were announced there are none any more:
    vLLM would look for their weights."""
    document = {key: value for key, value in config.items() if key not in NOT_CARRIED_OVER}
    document["torch_dtype"] = TORCH_DTYPES[plan.dtype]
    document["tie_word_embeddings"] = plan.tied
    if PREDICTION_LAYERS in document:
        document[PREDICTION_LAYERS] = 0
    document["quantization_config"] = plan.quantization_config
    return document


def generation_config_json(checkpoint: Checkpoint, files: TokenizerFiles) -> dict[str, Any]:
    document = dict(checkpoint.generation_config)
    if files.eos_token_ids:
        document["eos_token_id"] = list(files.eos_token_ids)
    return document


def tokenizer_config_json(files: TokenizerFiles, config: Mapping[str, Any]) -> dict[str, Any]:
    """Makes AutoTokenizer use tokenizer.json as it stands."""
    document: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": files.bos_token,
        "eos_token": files.eos_token,
        "pad_token": files.pad_token,
        "add_bos_token": files.add_bos,
        "chat_template": files.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.get("max_position_embeddings"),
    }
    return {key: value for key, value in document.items() if value is not None}


def manifest_json(
    checkpoint: Checkpoint,
    plan: Plan,
    source_files: Sequence[FileRecord],
    written: Written,
    origin: HubOrigin | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What made this directory. origin: of the source, where it is known. calibration: what text
    was read, None for none. Holds no time and no path, so that the same source, recipe, text and
    versions give the same bytes."""
    reasons = plan.reasons_not_portable
    return {
        "version": MANIFEST_VERSION,
        "made_by": {"localr1": localr1.__version__, "torch": torch.__version__},
        "source": {
            "name": checkpoint.path.name,
            "format": checkpoint.format,
            **({} if origin is None else asdict(origin)),
            "files": [_file(record) for record in source_files],
        },
        "recipe": plan.recipe.to_json(),
        **({} if plan.recipe.target is None else {"target": dict(plan.recipe.target)}),
        "smoothed": name_ranges(link.maker for link in plan.links),
        "awq": plan.recipe.awq,
        "rotation": None if plan.recipe.rotation is None else asdict(plan.recipe.rotation),
        "calibration": calibration,
        "portable": not reasons,
        "not_portable_because": list(reasons),
        "parameters": plan.parameters,
        "bits_per_weight": round(8 * plan.nbytes / plan.parameters, 4),
        "left_out": None if plan.left_out is None else asdict(plan.left_out),
        "files": [_file(record) for record in written.files],
        "tensors": {
            tensor.name: {"scheme": tensor.scheme, "relative_error": tensor.relative_error}
            for tensor in written.tensors
            if tensor.relative_error is not None and EXPERTS_PART not in tensor.name
        },
        "experts": _expert_errors(written.tensors),
        EXPERT_CHECKSUMS: {
            name: [checksum_text(value) for value in values]
            for name, values in written.expert_checksums.items()
        },
    }


def _expert_errors(tensors: Sequence[TensorReport]) -> list[dict[str, Any]]:
    """Of routed experts, which may be tens of thousands, the error of each kind of matrix in each
    layer: its mean and its largest over the experts, and how many those are."""
    errors: dict[tuple[str, str, str], list[float]] = {}
    for tensor in tensors:
        layer, separator, expert = tensor.name.partition(EXPERTS_PART)
        if separator and tensor.relative_error is not None:
            key = (layer, expert.partition(".")[2], tensor.scheme)
            errors.setdefault(key, []).append(tensor.relative_error)
    return [
        {
            "layer": layer,
            "matrix": matrix,
            "scheme": scheme,
            "experts": len(values),
            "relative_error": math.fsum(values) / len(values),
            "largest_error": max(values),
        }
        for (layer, matrix, scheme), values in errors.items()
    ]


def _file(record: FileRecord) -> dict[str, Any]:
    return {"name": record.name, "bytes": record.nbytes, "sha256": record.sha256}
