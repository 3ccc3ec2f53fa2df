"""The bytes of the output files, and the recipe that decides what goes into them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from localr1.errors import UnsupportedError, UsageError
from localr1.quant.atomic import AtomicDirectory
from localr1.quant.layout import DATA_ALIGNMENT, TensorSpec, index_json, plan_shards
from localr1.quant.recipe import Recipe, quantization_config
from localr1.quant.writer import DTYPES, ShardWriter

ODD = [
    [
        TensorSpec("a.weight_packed", "I32", (3, 4)),
        TensorSpec("a.weight_scale", "BF16", (3, 1)),  # 6 bytes: the next I32 would be misplaced.
        TensorSpec("a.weight_shape", "I64", (2,)),
    ],
    [
        TensorSpec("b.weight_packed", "I32", (5, 4)),
        TensorSpec("b.weight_scale", "F16", (5, 1)),
        TensorSpec("b.weight_shape", "I64", (2,)),
    ],
    [TensorSpec("norm.weight", "BF16", (7,))],
]


def test_a_file_opens_in_the_safetensors_library(tmp_path: Path) -> None:
    shards = plan_shards(ODD)
    values = {
        spec.name: (torch.arange(torch.Size(spec.shape).numel()) + index)
        .view(spec.shape)
        .to(DTYPES[spec.dtype])
        for index, unit in enumerate(ODD)
        for spec in unit
    }
    with AtomicDirectory(tmp_path / "out") as directory, ShardWriter(directory, shards) as writer:
        for name, value in values.items():
            writer.put(name, value)
        records = writer.finish()
        directory.commit()
    assert [record.name for record in records] == ["dense-00001-of-00001.safetensors"]
    path = tmp_path / "out" / records[0].name
    assert path.stat().st_size == records[0].nbytes == shards[0].nbytes
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(values)
        for name, value in values.items():
            assert torch.equal(file.get_tensor(name), value), name


def test_data_starts_on_a_page_and_each_tensor_on_its_own_alignment() -> None:
    (shard,) = plan_shards(ODD)
    assert len(shard.header) % DATA_ALIGNMENT == 0
    length = int.from_bytes(shard.header[:8], "little")
    assert length + 8 == len(shard.header)
    header = json.loads(shard.header[8:])
    assert shard.header[8:9] == b"{"
    assert shard.header.endswith(b" ")
    ends = 0
    for spec in shard.tensors:
        begin, end = header[spec.name]["data_offsets"]
        assert begin == ends, "no hole and no overlap"
        assert begin % DTYPES[spec.dtype].itemsize == 0
        assert shard.offsets[spec.name] == len(shard.header) + begin
        ends = end


def test_units_are_not_split_and_files_are_numbered() -> None:
    units = [[TensorSpec(f"{name}{part}", "BF16", (100,)) for part in "xy"] for name in "abcde"]
    shards = plan_shards(units, limit=900)
    assert [shard.file_name for shard in shards] == [
        f"dense-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    assert [len(shard.tensors) for shard in shards] == [4, 4, 2]
    index = index_json(shards)
    assert index["metadata"] == {"total_size": 2000}
    assert index["weight_map"]["cy"] == "dense-00002-of-00003.safetensors"  # type: ignore[index]
    # A unit larger than the limit has a file of its own.
    assert len(plan_shards(units, limit=1)) == 5


def test_the_default_recipe() -> None:
    recipe = Recipe.uniform()
    schemes = {
        module: rule.scheme.name if (rule := recipe.rule_for(module)) else None
        for module in (
            "model.embed_tokens",
            "model.layers.0.self_attn.q_proj",
            "model.layers.11.self_attn.o_proj",
            "model.layers.0.mlp.down_proj",
            "model.layers.0.self_attn.q_norm",
            "model.norm",
            "lm_head",
        )
    }
    assert schemes == {
        "model.embed_tokens": None,
        "model.layers.0.self_attn.q_proj": "int8-g32",
        "model.layers.11.self_attn.o_proj": "int8-g32",
        "model.layers.0.mlp.down_proj": "int4-g32",
        "model.layers.0.self_attn.q_norm": None,
        "model.norm": None,
        "lm_head": "int8-g32",
    }
    assert recipe.for_model(is_mixture=False).rules == recipe.rules


def test_groups_of_the_config_put_more_bits_first() -> None:
    """Otherwise transformers' dequantize=True reads 8-bit codes as 4-bit ones, without an error."""
    config = quantization_config(Recipe.uniform(4, 64), ["model.router"])
    groups = config["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [8, 4]
    assert groups["group_1"] == {
        "targets": [r"re:.*mlp\.(gate|up|down)_proj$"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 64,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
        "format": "pack-quantized",
    }
    assert config["ignore"] == ["model.router"]
    one_group = quantization_config(Recipe.uniform(8, 32), [])["config_groups"]
    assert list(one_group) == ["group_0"]


def test_bits_and_groups_that_do_not_exist() -> None:
    with pytest.raises(UnsupportedError, match="4, 5, 6 or 8 bits"):
        Recipe.uniform(3)
    with pytest.raises(UnsupportedError, match="32, 64 or 128"):
        Recipe.uniform(4, 48)
    with pytest.raises(UsageError, match="at least one part"):
        Recipe.uniform(16, attention_bits=16, head_bits=16)
