"""Tiny quantized models: a few lines of packing, independent of the quantizer and the reader."""

from collections.abc import Callable
from typing import Any

import torch
from foreign_packs import pack_words
from tiny_models import MemoryCheckpoint, stored_matrix
from torch import Tensor

GROUP = 32
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
"""Sizes that groups of 32 divide, with a head_dim that is not hidden_size / heads."""

LAYERS = r"re:.*_proj(_with_mqa)?$"
TABLES = r"re:.*(embed_tokens|lm_head)$"


def packed_checkpoint(
    model: Any, layer_bits: int = 4, keep: Callable[[str], bool] = lambda prefix: False
) -> MemoryCheckpoint:
    """A transformers model with every matrix packed (projections at `layer_bits`, tables at 8 bits)
    but those that `keep` names. The model itself is given the values that the codes stand for, so
    that it shows what exact arithmetic would make of them."""
    kept: list[str] = []

    def pack_all(tensors: dict[str, Tensor]) -> None:
        for name, value in list(tensors.items()):
            prefix, _, part = name.rpartition(".")
            if part != "weight" or value.dim() != 2:
                continue
            if keep(prefix):
                kept.append(prefix)
                continue
            bits = layer_bits if "_proj" in prefix else 8
            packed, scale, exact = pack(value, bits)
            del tensors[name]
            tensors[f"{prefix}.weight_packed"] = packed
            tensors[f"{prefix}.weight_scale"] = scale
            tensors[f"{prefix}.weight_shape"] = torch.tensor(value.shape)
            with torch.no_grad():
                stored_matrix(model, name).copy_(exact)

    checkpoint = MemoryCheckpoint.of(model, pack_all)
    config = {**checkpoint.config}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": kept,
        "config_groups": {
            "group_0": scheme(LAYERS, layer_bits),
            "group_1": scheme(TABLES, 8),
        },
    }
    checkpoint.config = config
    return checkpoint


def pack(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round to nearest, a scale per group of 32: (codes int32 [N, K*bits/32], scale bfloat16
    [N, K/32], the values these stand for)."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    top = (1 << (bits - 1)) - 1
    scale = (groups.abs().amax(2) / top).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-top - 1, top)
    stored = (codes + top + 1).to(torch.int64).view(rows, columns)
    packed = torch.from_numpy(pack_words(stored.numpy(), bits))
    return packed, scale, (codes * scale.float()[..., None]).view(rows, columns)


def scheme(target: str, bits: int) -> dict[str, Any]:
    return {
        "targets": [target],
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": GROUP,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
