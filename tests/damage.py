"""Damage done to checkpoints by the thousand, seeded: a failure names the seed that repeats it.

Mutations know the structure: they change a field to a boundary value, a count, an offset, a type, a
name, cut, repeat or swap pieces, or flip bits.
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from checkpoint_files import gguf_bytes, tensor_info

from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import LocalR1Error

MUTATIONS = 2_000
SOAK_MUTATIONS = 100_000
SECONDS = 2.0
"""Of processor time for one file."""

EXTREMES = [
    0, 1, 2, 7, 8, 31, 32, 33, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1,
    1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1,
]  # fmt: skip
JSON_VALUES: list[object] = [
    None, True, False, 0, -1, 1.5, 1e308, 1 << 40, 1 << 62, "", "x", "../x", "\0", "\ud83d", [], {},
    [[]], [0], [-1], {"a": 1}, "F32", "BF16", "I64", "pack-quantized", [1 << 62, 4], "é" * 300,
]  # fmt: skip

PREFIX = "model.layers.0.mlp.up_proj"
"""A module that may be packed."""


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


def damaged_gguf(
    keys: Mapping[str, bytes],
    shapes: Sequence[tuple[str, Sequence[int], int, int]],
    data: bytes,
    generator: random.Random,
    damaged: int,
) -> bytes:
    """A GGUF file of which `damaged` pieces are changed. keys: name -> `value(...)`. shapes: name,
    dimensions, type and bytes of each tensor."""
    pairs = list(keys.items())
    tensors: list[list[Any]] = []
    offset = 0
    for name, dimensions, type_id, nbytes in shapes:
        tensors.append([name, dimensions, type_id, offset])
        offset += (nbytes + 31) // 32 * 32
    numbers: dict[str, Any] = {}
    for _ in range(damaged):
        change = generator.randrange(8)
        place = generator.randrange(len(pairs))
        tensor: list[Any] = generator.choice(tensors)
        if change == 0:
            pairs[place] = (pairs[place][0], generator.choice(pairs)[1])
        elif change == 1:
            pairs[place] = (pairs[place][0], mutate_bytes(pairs[place][1], generator))
        elif change == 2:
            pairs.insert(generator.randrange(len(pairs)), pairs[place])
        elif change == 3:
            del pairs[place]
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
    return gguf_bytes(pairs, [tensor_info(*each) for each in tensors], data, **numbers)


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
