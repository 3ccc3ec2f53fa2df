"""Damaged checkpoints by the thousand: each loads or costs one typed error, in bounded time."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_parts import CONFIG as BNB_CONFIG
from bnb_parts import STATE, matrix, parts_4bit, parts_int8
from checkpoint_files import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    TINY_KEYS,
    U32,
    entry,
    safetensors_bytes,
    value,
)
from damage import (
    MUTATIONS,
    PREFIX,
    SOAK_MUTATIONS,
    campaign,
    damaged_gguf,
    mutate_bytes,
    mutate_json,
    use,
)
from safetensors.torch import save

from localr1.checkpoint.gguf_rope import llama3_factors
from localr1.checkpoint.index import INDEX_NAME

Q8_0 = 8
ROPE_THETA = 1e30
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 10,
}
"""Of the two pairs of a head of 4, one lies between the bounds of llama3 and one beyond."""
GROUP = 32
INT8 = parts_int8(matrix(4, 6))


def good_config() -> dict[str, Any]:
    weights = {
        "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP,
        "dynamic": False, "actorder": None,
    }  # fmt: skip
    group = {"targets": [r"re:.*(up|down)_proj$", "Linear"], "weights": weights, "format": None}
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "eos_token_id": [1, 2],
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head", "re:.*norm$"],
        },
    }


def good_header() -> tuple[dict[str, Any], bytes]:
    """A packed, asymmetric matrix of 8 rows and 64 columns, and a plain tensor."""
    parts = [
        (f"{PREFIX}.weight_packed", "I32", [8, 8]),
        (f"{PREFIX}.weight_scale", "BF16", [8, 2]),
        (f"{PREFIX}.weight_shape", "I64", [2]),
        (f"{PREFIX}.weight_zero_point", "I32", [1, 2]),
        ("model.norm.weight", "F32", [8]),
    ]
    sizes = {"I32": 4, "BF16": 2, "I64": 8, "F32": 4}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, dtype, shape in parts:
        count = sizes[dtype]
        for size in shape:
            count *= size
        header[name] = entry(dtype, shape, len(data), len(data) + count)
        data += struct.pack("<2q", 8, 64) if name.endswith("shape") else b"\x3f" * count
    return header, data


def safetensors_case(directory: Path, generator: random.Random) -> None:
    """A directory in which the header, the index, the config or raw bytes are damaged."""
    header, data = good_header()
    config, names = good_config(), {name: "a.safetensors" for name in header if name[0] != "_"}
    index: Any = {"metadata": {"total_size": len(data)}, "weight_map": names}
    kind = generator.randrange(4)
    for _ in range(generator.randint(1, 3)):
        if kind == 0:
            header = mutate_json(header, generator)
        elif kind == 1:
            config = mutate_json(config, generator)
        elif kind == 2:
            index = mutate_json(index, generator)
    content = safetensors_bytes(header, data)
    if kind == 3:
        content = mutate_bytes(content, generator)
    (directory / "a.safetensors").write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / INDEX_NAME).write_text(json.dumps(index))


def good_gguf(generator: random.Random, damaged: int) -> bytes:
    """A model of one layer; of its pieces `damaged` are changed."""
    keys = {
        **TINY_KEYS,
        "llama.rope.freq_base": value(F32, ROPE_THETA),
        "llama.rope.dimension_count": value(U32, 4),
        "general.tags": value(ARRAY, (STRING, ["a", "b"])),
        "tokenizer.chat_template": value(STRING, "{{ messages }}"),
    }
    shapes = [
        ("token_embd.weight", [8, 4], 0, 128),
        ("blk.0.attn_q.weight", [8, 8], 0, 256),
        ("blk.0.ffn_down.weight", [32, 8], Q8_0, 272),
        ("rope_freqs.weight", [2], 0, 8),
    ]
    factors = llama3_factors(ROPE, ROPE_THETA, head_dim=4)
    data = generator.randbytes(128 + 256 + 288) + struct.pack("<2f24x", *factors)
    return damaged_gguf(keys, shapes, data, generator, damaged)


def good_mixture(generator: random.Random, damaged: int) -> bytes:
    """A DeepSeek of one layer of 4 experts, its stacks in blocks."""
    numbers = {
        "block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.head_count_kv": 1, "leading_dense_block_count": 0,
        "expert_count": 4, "expert_used_count": 2, "expert_shared_count": 1, "vocab_size": 4,
        "expert_group_count": 2, "expert_group_used_count": 1, "expert_gating_func": 2,
        "expert_feed_forward_length": 32, "attention.kv_lora_rank": 6, "rope.dimension_count": 2,
        "attention.key_length": 8, "attention.value_length": 6, "attention.key_length_mla": 5,
        "attention.value_length_mla": 4, "rope.scaling.original_context_length": 16,
    }  # fmt: skip
    keys = {
        **{key: raw for key, raw in TINY_KEYS.items() if not key.startswith("llama.")},
        "general.architecture": value(STRING, "deepseek2"),
        **{f"deepseek2.{key}": value(U32, number) for key, number in numbers.items()},
        "deepseek2.attention.layer_norm_rms_epsilon": value(F32, 1e-5),
        "deepseek2.expert_weights_scale": value(F32, 2.5),
        "deepseek2.expert_weights_norm": value(BOOL, True),
        "deepseek2.rope.scaling.type": value(STRING, "yarn"),
        "deepseek2.rope.scaling.factor": value(F32, 4.0),
        "deepseek2.rope.scaling.yarn_log_multiplier": value(F32, 0.1),
    }
    shapes = [
        ("token_embd.weight", [32, 4], 0, 512),
        ("blk.0.attn_k_b.weight", [3, 6, 2], 0, 144),
        ("blk.0.attn_v_b.weight", [6, 4, 2], 0, 192),
        ("blk.0.exp_probs_b.bias", [4], 0, 16),
        ("blk.0.ffn_gate_exps.weight", [32, 32, 4], Q8_0, 4352),
        ("blk.0.ffn_down_exps.weight", [32, 32, 4], 0, 16384),
    ]
    data = generator.randbytes(512 + 160 + 192 + 32 + 4352 + 16384)
    return damaged_gguf(keys, shapes, data, generator, damaged)


def bnb_case(directory: Path, generator: random.Random) -> None:
    """A nested NF4 matrix and an int8 one, in which the header, a quant_state, the config or raw
    bytes are damaged."""
    nested = parts_4bit(matrix(8, 34))
    kept = {"model.norm.weight": torch.ones(8)}
    rows = {name.replace("up_proj", "gate_proj"): part for name, part in INT8.items()}
    header, data = header_and_data({**nested, **rows, **kept})
    config: Any = {"model_type": "llama", "quantization_config": dict(BNB_CONFIG)}
    kind = generator.randrange(4)
    for _ in range(generator.randint(1, 3)):
        if kind == 0:
            header = mutate_json(header, generator)
        elif kind == 1:
            state = mutate_json(json.loads(bytes(nested[STATE].numpy())), generator)
            text = json.dumps(state).encode()
            nested[STATE] = torch.tensor(list(text), dtype=torch.uint8)
            header, data = header_and_data({**nested, **rows, **kept})
        elif kind == 2:
            config = mutate_json(config, generator)
    content = safetensors_bytes(header, data)
    if kind == 3:
        content = mutate_bytes(content, generator)
    (directory / "model.safetensors").write_bytes(content)
    (directory / "config.json").write_text(json.dumps(config))


def header_and_data(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, Any], bytes]:
    """Of a safetensors file, through the library."""
    content = save(tensors)
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def gguf_case(directory: Path, generator: random.Random) -> None:
    content = good_gguf(generator, generator.randrange(4))
    if generator.random() < 0.4:
        content = mutate_bytes(content, generator)
    (directory / "a.gguf").write_bytes(content)


def mixture_case(directory: Path, generator: random.Random) -> None:
    content = good_mixture(generator, generator.randrange(4))
    if generator.random() < 0.3:
        content = mutate_bytes(content, generator)
    (directory / "a.gguf").write_bytes(content)


def test_damaged_safetensors(tmp_path: Path) -> None:
    campaign(safetensors_case, ".", tmp_path, MUTATIONS // 2)


def test_damaged_gguf(tmp_path: Path) -> None:
    campaign(gguf_case, "a.gguf", tmp_path, MUTATIONS // 2)


def test_damaged_gguf_mixture(tmp_path: Path) -> None:
    campaign(mixture_case, "a.gguf", tmp_path, MUTATIONS // 4)


def test_damaged_bnb(tmp_path: Path) -> None:
    campaign(bnb_case, ".", tmp_path, MUTATIONS // 4)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_damaged_safetensors_for_long(tmp_path: Path) -> None:
    campaign(safetensors_case, ".", tmp_path, SOAK_MUTATIONS // 2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_damaged_gguf_for_long(tmp_path: Path) -> None:
    campaign(gguf_case, "a.gguf", tmp_path, SOAK_MUTATIONS // 2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_damaged_mixtures_for_long(tmp_path: Path) -> None:
    campaign(mixture_case, "a.gguf", tmp_path, SOAK_MUTATIONS // 4)
    campaign(bnb_case, ".", tmp_path, SOAK_MUTATIONS // 4)


def test_the_undamaged_files_load(tmp_path: Path) -> None:
    """Else every mutation could be refused for a reason of the files' own."""
    header, data = good_header()
    names = {name: "a.safetensors" for name in header if name[0] != "_"}
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header, data))
    (tmp_path / "config.json").write_text(json.dumps(good_config()))
    (tmp_path / INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": len(data)}, "weight_map": names})
    )
    use(tmp_path)
    (tmp_path / "a.gguf").write_bytes(good_gguf(random.Random(0), damaged=0))
    use(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(good_mixture(random.Random(0), damaged=0))
    use(tmp_path / "a.gguf")
