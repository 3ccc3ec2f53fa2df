"""NF4 in the layout of bitsandbytes (Dettmers et al. 2023, "QLoRA", section 3), encoded by it.

The 16 numbers that codes mean are quantiles of a normal distribution between -1 and 1; a block of
64 values, row after row, shares a scale, its largest magnitude. Scales are quantized themselves
("double quantization"): less their mean, in 8 bits by blocks of 256. That is 4.127 bits a weight.
`localr1/checkpoint/bnb.py` describes the tensors; transformers and vLLM read them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from localr1.checkpoint.bnb import METHOD as BITSANDBYTES
from localr1.checkpoint.bnb import bitsandbytes_functional
from localr1.errors import NumericsError
from localr1.quant.layout import TensorSpec

BLOCK = 64
SCALE_BLOCK = 256
STATE_BYTES = 256
"""Of the JSON that describes a matrix, filled up with spaces, which JSON allows: where every tensor
lies is known before the first weight is read, and the JSON holds the mean of the scales."""
STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Encoded:
    """parts: by the names that `specs` gives them. relative_error: as of a QuantizedTensor."""

    parts: Mapping[str, Tensor]
    relative_error: float


def specs(module: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    """What becomes of `module`.weight [out, in]."""
    values = shape[0] * shape[1]
    blocks = -(-values // BLOCK)
    name = f"{module}.weight"
    return (
        TensorSpec(name, "U8", (-(-values // 2), 1)),
        TensorSpec(f"{name}.absmax", "U8", (blocks,)),
        TensorSpec(f"{name}.quant_map", "F32", (16,)),
        TensorSpec(f"{name}.nested_absmax", "F32", (-(-blocks // SCALE_BLOCK),)),
        TensorSpec(f"{name}.nested_quant_map", "F32", (256,)),
        TensorSpec(f"{name}.{STATE}", "U8", (STATE_BYTES,)),
    )


def encode(weight: Tensor, module: str, dtype: torch.dtype) -> Encoded:
    """weight: [out, in] of any floats. dtype: what the matrix is to be multiplied in, for others.
    Raises NumericsError for NaN and Inf."""
    weight = weight.to(torch.float32)
    energy = float(weight.to(torch.float64).square().sum())
    if not energy < float("inf"):  # Also false for NaN.
        raise NumericsError(
            f"{module}.weight: weights",
            expected="finite numbers",
            found="NaN or Inf",
            fix="The source checkpoint is damaged: download or convert it again.",
        )
    library = bitsandbytes_functional()
    with torch.compiler.set_stance("force_eager"):  # Its fallbacks would start a compiler.
        codes, state = library.quantize_4bit(
            weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True
        )
    state.dtype = dtype
    stored: dict[str, Tensor] = state.as_dict(packed=True)
    parts = {f"{module}.weight": codes}
    for suffix, value in stored.items():
        parts[f"{module}.weight.{suffix}"] = _padded(value) if suffix == STATE else value
    outer = state.state2
    scales = outer.code[stored["absmax"].long()].view(-1)
    repeated = stored["nested_absmax"].repeat_interleave(SCALE_BLOCK)
    scales = scales * repeated[: len(scales)] + state.offset
    pairs = codes.view(-1)
    flat = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[: weight.numel()].long()
    read_back = stored["quant_map"][flat] * scales.repeat_interleave(BLOCK)[: weight.numel()]
    error = float((weight.reshape(-1) - read_back).to(torch.float64).square().sum())
    return Encoded(parts, error / energy if energy else 0.0)


def quantization_config(skipped: list[str], dtype: str) -> dict[str, Any]:
    """config.json's, for transformers. skipped: linears that stay floats. dtype: to multiply in."""
    return {
        "quant_method": BITSANDBYTES,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def _padded(state: Tensor) -> Tensor:
    text = bytes(state.numpy()).ljust(STATE_BYTES)
    assert len(text) == STATE_BYTES
    assert json.loads(text)["blocksize"] == BLOCK
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
