"""Matrices as bitsandbytes stores them, and directories of them."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit
from quant_sources import SIZES, write_source
from safetensors.torch import save_file
from tiny_models import tiny_transformer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"

CONFIG: dict[str, Any] = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
"""As pre-quantized distills were published."""


def matrix(rows: int, columns: int) -> Tensor:
    """Values of very different size, so that a scale in the wrong place shows."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return noise * torch.logspace(-1, 1, rows * columns).view(rows, columns)


def parts_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    *,
    nested: bool = True,
    block: int = 64,
    storage: torch.dtype = torch.uint8,
) -> dict[str, Tensor]:
    """What the library stores of a matrix."""
    codes, state = quantize_4bit(
        weight,
        blocksize=block,
        quant_type=quant_type,
        compress_statistics=nested,
        quant_storage=storage,
    )
    parts = {f"{NAME}.{name}": value for name, value in state.as_dict(packed=True).items()}
    return {NAME: codes, **parts}


def parts_int8(weight: Tensor) -> dict[str, Tensor]:
    layer = bitsandbytes.nn.Linear8bitLt(
        weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False
    )
    layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False).to("cpu")
    return {f"{MODULE}.{name}": value.clone() for name, value in layer.state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    document = {"model_type": "llama", "quantization_config": {**CONFIG, **changes}}
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors, folder / "model.safetensors")
    return folder


def save_quantized(folder: Path, model_type: str, **options: Any) -> Any:
    """A tiny model whose layers the library quantized, under the names it saves; returns it."""
    model = tiny_transformer(model_type, 0, **SIZES)
    config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head"], **options)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, quantized_layer(layer, config))
    document = {**model.config.to_dict(), "quantization_config": config.to_dict()}
    tensors = {name: value.contiguous() for name, value in model.state_dict().items()}
    write_source(folder, json.loads(json.dumps(document)), tensors)
    return model


def quantized_layer(layer: nn.Linear, config: Any) -> nn.Module:
    sizes = (layer.in_features, layer.out_features, layer.bias is not None)
    weight = layer.weight.detach()
    result: Any
    if config.load_in_8bit:
        result = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        result.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False).to("cpu")
    else:
        options = {
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "quant_type": config.bnb_4bit_quant_type,
        }
        result = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.float32, **options)
        result.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options).to("cpu")
    if layer.bias is not None:
        result.bias = layer.bias
    module: nn.Module = result
    return module
