"""pack-quantized checkpoints as others write them, packed in numpy from the format's definition."""

from typing import Any

import numpy as np
import torch
from tiny_models import MemoryCheckpoint, stored_matrix
from torch import Tensor

from localr1.checkpoint.name_patterns import matches

Array = np.ndarray[Any, Any]

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def pack_words(codes: Array, bits: int) -> Array:
    """Unsigned codes [rows, n] -> int32 [rows, ceil(n * bits / 32)], the first code lowest."""
    digits = codes.astype(np.int64)[:, :, None] >> np.arange(bits) & 1
    ones = digits.reshape(len(codes), -1).astype(np.uint8)
    padded = np.pad(ones, ((0, 0), (0, -ones.shape[1] % 32)))
    result: Array = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    return result


def pack_foreign(
    weight: Tensor, bits: int, group: int | None, *, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """(the parts of a module, the values they stand for). group: None for one of a whole row."""
    rows, columns = weight.shape
    groups = weight.double().numpy().reshape(rows, -1, group or columns)
    half = 1 << (bits - 1)
    if symmetric:
        low = -np.abs(groups).max(2)
        high = -low
    else:
        low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    scale = torch.from_numpy((high - low) / (2 * half - 1)).to(scale_dtype)
    step = scale.double().numpy()[:, :, None]
    zero = np.zeros((rows, groups.shape[1], 1))
    if not symmetric:
        zero = np.clip(np.round(-low[:, :, None] / step) - half, -half, half - 1)
    codes = np.clip(np.round(groups / step) + zero, -half, half - 1)
    unsigned = (codes + half).reshape(rows, columns)
    parts = {
        "weight_packed": torch.from_numpy(pack_words(unsigned, bits)),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        along_out = pack_words((zero[:, :, 0] + half).T, bits).T
        parts["weight_zero_point"] = torch.from_numpy(np.ascontiguousarray(along_out))
    exact = ((codes - zero) * step).reshape(rows, columns)
    return parts, torch.from_numpy(exact).float()


def foreign_checkpoint(model: Any, quantization: dict[str, Any]) -> MemoryCheckpoint:
    """A transformers model in one group's scheme, but for what `ignore` names; the model itself is
    given the values that the codes stand for."""
    weights = quantization["config_groups"]["group_0"]["weights"]

    def pack_all(tensors: dict[str, Tensor]) -> None:
        for name, value in list(tensors.items()):
            prefix, _, part = name.rpartition(".")
            if part != "weight" or "_proj" not in prefix or is_ignored(prefix, quantization):
                continue
            parts, exact = pack_foreign(
                value,
                weights["num_bits"],
                weights["group_size"],
                symmetric=weights["symmetric"],
                scale_dtype=torch.bfloat16,
            )
            del tensors[name]
            tensors.update({f"{prefix}.{each}": content for each, content in parts.items()})
            with torch.no_grad():
                stored_matrix(model, name).copy_(exact)

    checkpoint = MemoryCheckpoint.of(model, pack_all)
    checkpoint.config = {**checkpoint.config, "quantization_config": quantization}
    return checkpoint


def is_ignored(prefix: str, quantization: dict[str, Any]) -> bool:
    return any(
        matches(name[3:], prefix) if name.startswith("re:") else name == prefix
        for name in quantization["ignore"]
    )
