"""Damaged checkpoints by the thousand: each loads or costs one typed error, in bounded time.

Mutations know the structure: they change a field to a boundary value, a count, an offset, a type, a
name, cut, repeat or swap pieces, or flip bits. Seeded: a failure names the seed that repeats it.
"""

import json
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import (
    ARRAY,
    F32,
    STRING,
    TINY_KEYS,
    U32,
    entry,
    gguf_bytes,
    safetensors_bytes,
    tensor_info,
    value,
)

from localr1.checkpoint.gguf_rope import llama3_factors
from localr1.checkpoint.index import INDEX_NAME
from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import LocalR1Error

MUTATIONS = 2_000
SOAK_MUTATIONS = 100_000
SECONDS = 2.0
"""Of processor time for one file."""

Q8_0 = 8
ROPE_THETA = 1e30
ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 10,
}
"""Of the two pairs of a head of 4, one lies between the bounds of llama3 and one beyond."""
EXTREMES = [
    0, 1, 2, 7, 8, 31, 32, 33, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
]  # fmt: skip
JSON_VALUES: list[object] = [
    None, True, False, 0, -1, 1.5, 1e308, 1 << 40, 1 << 62, "", "x", "../x", "\0", "\ud83d", [], {},
    [[]], [0], [-1], {"a": 1}, "F32", "BF16", "I64", "pack-quantized", [1 << 62, 4], "é" * 300,
]  # fmt: skip

PREFIX = "model.layers.0.mlp.up_proj"
GROUP = 32


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


def mutate_json(document: Any, generator: random.Random) -> Any:
    """One change somewhere in a document, which is not changed itself."""
    places: list[tuple[Any, Any]] = []
    copy = json.loads(json.dumps(document))

    def visit(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            places.append((node, key))
            if isinstance(node[key], dict | list):
                visit(node[key])

    visit(copy)
    if not places:  # Earlier changes may have left nothing to change.
        return copy
    node, key = generator.choice(places)
    change = generator.randrange(5)
    if change == 0:
        del node[key]
    elif change == 1 and isinstance(node[key], int):
        node[key] = generator.choice([node[key] + 1, node[key] - 1, -node[key], node[key] * 2])
    elif change == 2 and isinstance(node, dict):
        node[generator.choice(list(node))] = node[key]
    elif change == 3 and isinstance(node, dict):
        node[str(key) + generator.choice(["", "x", "\0", "/"])] = node.pop(key)
    else:
        node[key] = generator.choice(JSON_VALUES)
    return copy


def mutate_bytes(content: bytes, generator: random.Random) -> bytes:
    """Changes that know nothing but where integers may lie."""
    data = bytearray(content or b"\0")
    place = generator.randrange(len(data))
    change = generator.randrange(6)
    if change == 0:
        data[place] ^= 1 << generator.randrange(8)
    elif change == 1:
        del data[place:]
    elif change == 2:
        width = generator.choice([4, 8])
        number = generator.choice(EXTREMES) & ((1 << 8 * width) - 1)
        data[place : place + width] = number.to_bytes(width, "little")
    elif change == 3:
        other = generator.randrange(len(data))
        data[place:place] = data[other : other + generator.randrange(64)]
    elif change == 4:
        del data[place : place + generator.randrange(1, 16)]
    else:
        data += bytes(generator.randrange(1, 64))
    return bytes(data)


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
    keys = [
        *TINY_KEYS.items(),
        ("llama.rope.freq_base", value(F32, ROPE_THETA)),
        ("llama.rope.dimension_count", value(U32, 4)),
        ("general.tags", value(ARRAY, (STRING, ["a", "b"]))),
        ("tokenizer.chat_template", value(STRING, "{{ messages }}")),
    ]
    shapes = [
        ("token_embd.weight", [8, 4], 0, 128),
        ("blk.0.attn_q.weight", [8, 8], 0, 256),
        ("blk.0.ffn_down.weight", [32, 8], Q8_0, 272),
        ("rope_freqs.weight", [2], 0, 8),
    ]
    tensors: list[list[Any]] = []
    offset = 0
    for name, dimensions, type_id, nbytes in shapes:
        tensors.append([name, dimensions, type_id, offset])
        offset += (nbytes + 31) // 32 * 32
    factors = llama3_factors(ROPE, ROPE_THETA, head_dim=4)
    data = generator.randbytes(offset - 32) + struct.pack("<2f24x", *factors)
    numbers: dict[str, Any] = {}
    for _ in range(damaged):
        change = generator.randrange(8)
        place = generator.randrange(len(keys))
        tensor: list[Any] = generator.choice(tensors)
        if change == 0:
            keys[place] = (keys[place][0], generator.choice(keys)[1])
        elif change == 1:
            keys[place] = (keys[place][0], mutate_bytes(keys[place][1], generator))
        elif change == 2:
            keys.insert(generator.randrange(len(keys)), keys[place])
        elif change == 3:
            del keys[place]
        elif change == 4:
            tensor[3] = generator.choice([*EXTREMES, tensor[3] + 32, tensor[3] - 32]) % (1 << 64)
        elif change == 5:
            tensor[1] = [generator.choice([*EXTREMES, 4, 8, 64]) for _ in range(len(tensor[1]))]
        elif change == 6:
            tensor[generator.choice([0, 2])] = generator.choice(tensors)[0]
            tensor[2] = tensor[2] if isinstance(tensor[2], int) else generator.randrange(64)
        else:
            field = generator.choice(["num_tensors", "num_keys", "version"])
            numbers[field] = generator.choice(EXTREMES) % (1 << (32 if field == "version" else 64))
    return gguf_bytes(keys, [tensor_info(*each) for each in tensors], data, **numbers)


def gguf_case(directory: Path, generator: random.Random) -> None:
    content = good_gguf(generator, generator.randrange(4))
    if generator.random() < 0.4:
        content = mutate_bytes(content, generator)
    (directory / "a.gguf").write_bytes(content)


def use(path: Path) -> None:
    """All that opening a model asks of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config is not None
        for name, info in checkpoint.tensors.items():
            tensor = checkpoint.read(name)
            assert tuple(tensor.shape) == info.shape
        packed = PackedReader(checkpoint).read(PREFIX)
        assert packed is None or bool(torch.isfinite(packed.scale.float()).all())
        if checkpoint.format == "gguf":
            checkpoint.tokenizer_files()


def campaign(
    make: Callable[[Path, random.Random], None], name: str, directory: Path, count: int
) -> None:
    loaded = 0
    for seed in range(count):
        make(directory, random.Random(seed))
        begin = time.process_time()
        try:
            use(directory / name)
            loaded += 1
        except LocalR1Error:
            pass
        except BaseException as error:
            raise AssertionError(f"{make.__name__} with seed {seed}") from error
        assert time.process_time() - begin < SECONDS, f"{make.__name__} with seed {seed}"
    # Some changes are harmless; if none or all were, the campaign would test nothing.
    assert 0.02 * count < loaded < 0.6 * count, loaded


def test_damaged_safetensors(tmp_path: Path) -> None:
    campaign(safetensors_case, ".", tmp_path, MUTATIONS // 2)


def test_damaged_gguf(tmp_path: Path) -> None:
    campaign(gguf_case, "a.gguf", tmp_path, MUTATIONS // 2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_damaged_safetensors_for_long(tmp_path: Path) -> None:
    campaign(safetensors_case, ".", tmp_path, SOAK_MUTATIONS // 2)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_damaged_gguf_for_long(tmp_path: Path) -> None:
    campaign(gguf_case, "a.gguf", tmp_path, SOAK_MUTATIONS // 2)


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
