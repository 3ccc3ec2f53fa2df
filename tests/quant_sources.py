"""Small source checkpoints on disk, and what a quantized directory stands for, unpacked by other
code than the one under test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_tokenizer import VOCAB_SIZE, tokenizer_document
from safetensors.torch import load_file, save_file
from tiny_models import tiny_transformer, unfused
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
}
"""Every supported group size divides these."""

MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 64},
    "deepseek_v2": {"head_dim": 8, "moe_intermediate_size": 64, "q_lora_rank": None,
                    "kv_lora_rank": 32, "v_head_dim": 16, "n_shared_experts": 2},
    "deepseek_v3": {"head_dim": 8, "moe_intermediate_size": 64, "q_lora_rank": 64,
                    "kv_lora_rank": 32, "v_head_dim": 16},
}  # fmt: skip
"""Changes to SIZES that make mixtures whose every matrix divides by groups of 32."""


def save_source(
    folder: Path,
    model_type: str = "llama",
    seed: int = 0,
    dtype: str = "bfloat16",
    adjust: Callable[[Any], None] | None = None,
    **changes: Any,
) -> Any:
    """Write a tiny model, after `adjust` has changed its weights, as a Hugging Face directory;
    returns the transformers model, in float32 with the values that were stored."""
    model = tiny_transformer(model_type, seed, **{**SIZES, **changes})
    if adjust is not None:
        adjust(model)
    with torch.no_grad():  # Not model.to(dtype): that would round rope's frequencies too.
        for parameter in model.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if model.config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for own_name, each in unfused(name, value).items():
            # A buffer, which DeepSeek releases in float32 whatever the weights are stored in.
            is_bias = own_name.endswith("e_score_correction_bias")
            stored = each if is_bias else each.to(getattr(torch, dtype))
            tensors[own_name] = stored.contiguous()
    config = model.config.to_dict()
    config["dtype"] = dtype
    write_source(folder, config, tensors)
    return model


def write_source(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257}))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_document()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"})
    )


def read_output(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the directory, through the safetensors library."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file_name in sorted(set(index["weight_map"].values())):
        tensors |= load_file(folder / file_name)
    assert set(tensors) == set(index["weight_map"])
    return tensors


def unpack(packed: Tensor, bits: int) -> Tensor:
    """int32 [out, words] -> signed codes int64 [out, words * 32 // bits], bit by bit."""
    stored = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    ones = np.unpackbits(stored, axis=1, bitorder="little")
    count = ones.shape[1] // bits
    digits = ones[:, : count * bits].reshape(len(ones), count, bits).astype(np.int64)
    codes = (digits << np.arange(bits)).sum(2)
    return torch.from_numpy(codes - (1 << (bits - 1)))


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights that a quantized directory stands for."""
    result = {
        name: value.float()
        for name, value in tensors.items()
        if not name.endswith(("_packed", "_scale", "_shape", "_zero_point"))
    }
    for name, packed in tensors.items():
        if not name.endswith(".weight_packed"):
            continue
        prefix = name.removesuffix("_packed")
        rows, columns = tensors[f"{prefix}_shape"].tolist()
        bits = 32 * packed.shape[1] // columns
        codes = unpack(packed, bits)[:, :columns]
        scale = tensors[f"{prefix}_scale"].float()
        groups = codes.view(rows, scale.shape[1], -1).float()
        if f"{prefix}_zero_point" in tensors:  # Packed along the rows.
            words = tensors[f"{prefix}_zero_point"].T.contiguous()
            groups -= unpack(words, bits)[:, :rows].T[:, :, None]
        result[prefix] = (groups * scale[:, :, None]).view(rows, columns)
    return result


def relative_error(expected: Tensor, found: Tensor) -> float:
    """Sum of squared differences over the sum of squares."""
    return float((expected - found).double().square().sum() / expected.double().square().sum())
