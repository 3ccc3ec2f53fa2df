"""Weights in 5 and 6 bits, from the source to logits: what is written, who opens it, and that it
runs as the same values in 8 bits do."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_packs import pack_words
from quant_sources import (
    MIXTURES,
    dequantized,
    read_output,
    relative_error,
    save_source,
    unpack,
)
from tiny_models import MemoryCheckpoint, prompt, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from typer.testing import CliRunner

from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.main import app
from localr1.embedded import R1_NANO
from localr1.errors import CheckpointError
from localr1.experts.footprint import measure
from localr1.experts.options import ExpertOptions
from localr1.kernels.api import Kernels
from localr1.kernels.native import NativeKernels
from localr1.kernels.reference import ReferenceKernels
from localr1.load import load_engine
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step
from localr1.qtypes import CARD_BITS, SUPPORTED_BITS
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

IDS = prompt(0, 32)
SAME = 1e-6
"""Relative squared difference between logits of the same weights in float32; one code off by one
gives more than 1e-5 (test_one_wrong_code_is_seen)."""
TIGHT = ExpertOptions(ram="20%")
"""Most experts are read again and again."""

RECIPES = {
    "6 bits": Recipe.uniform(6, 32, attention_bits=6, head_bits=6, smooth=False),
    "5 bits": Recipe.uniform(5, 64, attention_bits=5, head_bits=5, smooth=False),
    "5, 6 and 8": Recipe.uniform(5, 32, attention_bits=6, head_bits=8, smooth=False),
}
WITH_ZEROS = {
    bits: Recipe.uniform(
        bits, 32, attention_bits=bits, head_bits=bits, smooth=False, asymmetric=True
    )
    for bits in (5, 6)
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("qwen3", True)])
def test_transformers_reads_the_same_weights(
    recipe: str, model_type: str, tied: bool, tmp_path: Path
) -> None:
    model = save_source(tmp_path / "source", model_type, tie_word_embeddings=tied)
    report = quantize(tmp_path / "source", tmp_path / "out", RECIPES[recipe])
    assert any("4 and 8 bits alone" in reason for reason in report.reasons_not_portable)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits_with(model, dequantized(read_output(tmp_path / "out")))
    assert relative_error(expected, transformer_logits(theirs, IDS)) < SAME


@pytest.mark.parametrize("bits", WITH_ZEROS)
def test_transformers_reads_zero_points_where_it_does(bits: int, tmp_path: Path) -> None:
    """As those of 4 bits: with dequantize=True, in the dtype of the scales."""
    model = save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", WITH_ZEROS[bits])
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    weights = dequantized(read_output(tmp_path / "out"))
    expected = logits_with(model, {name: w.bfloat16().float() for name, w in weights.items()})
    assert relative_error(expected, transformer_logits(theirs, IDS)) < SAME


def test_one_wrong_code_is_seen(tmp_path: Path) -> None:
    model = save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", RECIPES["6 bits"])
    tensors = read_output(tmp_path / "out")
    right = logits_with(model, dequantized(tensors))
    # A bit of one code becomes the lowest of the next: what a wrong place in a word does.
    name = "model.layers.0.mlp.up_proj.weight_packed"
    tensors[name] = tensors[name] ^ torch.tensor(0b1100000, dtype=torch.int32)
    assert relative_error(right, logits_with(model, dequantized(tensors))) > 10 * SAME


def logits_with(model: Any, weights: dict[str, Tensor]) -> Tensor:
    """Of the source's model, untied where these weights have a head."""
    if "lm_head.weight" in weights and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
        model.config.tie_word_embeddings = False
    model.load_state_dict(weights, strict=False)
    return transformer_logits(model, IDS)


def our_logits(checkpoint: Any, kernels: Kernels) -> Tensor:
    model = load_model(checkpoint, kernels)
    return model.forward(Step(IDS, 0, all_logits=True), model.new_cache(len(IDS)))


def in_eight_bits(folder: Path) -> MemoryCheckpoint:
    """The same values as codes of 8 bits, by the tests' own packing."""
    tensors = read_output(folder)
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 8
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix("_packed")
        rows, columns = tensors[f"{module}_shape"].tolist()
        bits = 32 * tensors[name].shape[1] // columns
        codes = unpack(tensors[name], bits)[:, :columns].numpy() + 128
        tensors[name] = torch.from_numpy(pack_words(codes, 8))
        zeros = tensors.get(f"{module}_zero_point")
        if zeros is not None:
            values = unpack(zeros.T.contiguous(), bits)[:, :rows].numpy() + 128
            packed = torch.from_numpy(pack_words(values, 8)).T.contiguous()
            tensors[f"{module}_zero_point"] = packed
    return MemoryCheckpoint(config, tensors)


@pytest.mark.parametrize("make_kernels", [ReferenceKernels, NativeKernels])
@pytest.mark.parametrize(
    ("model_type", "recipe"),
    [
        ("llama", RECIPES["6 bits"]),
        ("llama", RECIPES["5 bits"]),
        ("qwen2", WITH_ZEROS[5]),
        ("qwen2", WITH_ZEROS[6]),
        ("deepseek_v3", Recipe.uniform(6, 32, attention_bits=5, shared_bits=6)),
        ("qwen3_moe", Recipe.uniform(5, 32, attention_bits=6)),
    ],
)
def test_it_runs_as_the_same_values_in_eight_bits(
    model_type: str, recipe: Recipe, make_kernels: type[Kernels], tmp_path: Path
) -> None:
    save_source(tmp_path / "source", model_type, **MIXTURES.get(model_type, {}))
    quantize(tmp_path / "source", tmp_path / "out", recipe)
    expected = our_logits(in_eight_bits(tmp_path / "out"), make_kernels())
    with open_checkpoint(tmp_path / "out") as checkpoint:
        found = our_logits(checkpoint, make_kernels())
    assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_takes_the_memory_that_is_planned(recipe: str, tmp_path: Path) -> None:
    """On a CPU as little as on disk, but for what fills up blocks; as 8 bits for a card."""
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", RECIPES[recipe])
    with open_checkpoint(tmp_path / "out") as checkpoint:
        config, infos = parse_config(checkpoint.config), list(checkpoint.tensors.values())
        taken = {}
        for numbers_of_bits in (SUPPORTED_BITS, CARD_BITS):
            for_card = numbers_of_bits == CARD_BITS
            planned = measure(((info, 1) for info in infos), config, for_card=for_card).weights
            kernels = NativeKernels(numbers_of_bits=numbers_of_bits)
            taken[for_card] = load_model(checkpoint, kernels).weight_bytes
            # Planned is the instruction set whose blocks take more.
            assert taken[for_card] <= planned <= 1.04 * taken[for_card]
    assert taken[False] < 0.9 * taken[True]


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """r1-nano, its experts in 6 bits."""
    out = tmp_path_factory.mktemp("nano") / "int6"
    quantize(R1_NANO, out, Recipe.uniform(6, 32))
    return out


def test_experts_are_read_as_they_are_needed(nano: Path) -> None:
    with open_checkpoint(nano) as checkpoint:
        expected = our_logits(checkpoint, NativeKernels())
    engine = load_engine(nano, experts=TIGHT)
    try:
        assert engine.experts is not None
        cache = engine.model.new_cache(len(IDS))
        found = engine.model.forward(Step(IDS, 0, all_logits=True), cache)
    finally:
        engine.close()
    assert torch.equal(found, expected)


def test_a_damaged_expert_is_refused(nano: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in nano.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    shard = min(damaged.glob("experts-*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        load_engine(damaged).close()


@pytest.mark.parametrize("bits", [5, 6])
def test_the_bytes_are_those_that_are_counted(bits: int, tmp_path: Path) -> None:
    """Of a matrix in groups of 32: its bits and 16 for the scale."""
    save_source(tmp_path / "source")
    arguments = ["quantize", str(tmp_path / "source"), str(tmp_path / "out"), "--bits", str(bits)]
    dry = json.loads(CliRunner().invoke(app, [*arguments, "--dry-run", "--json"]).stdout)
    done = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert dry["bits_per_weight"] == done["bits_per_weight"]
    (mlp,) = [part for part in done["parts"] if part["scheme"] == f"int{bits}-g32"]
    stored = read_output(tmp_path / "out")
    packed = [value for name, value in stored.items() if ".mlp." in name]
    weights = sum(
        int(value.prod()) for name, value in stored.items() if ".mlp." in name and "_shape" in name
    )
    codes_and_scales = sum(value.nbytes for value in packed if value.dtype != torch.int64)
    assert codes_and_scales == weights * (bits + 0.5) / 8
    assert mlp["nbytes"] == sum(value.nbytes for value in packed)
    assert f"int{bits}-g32" in CliRunner().invoke(app, ["show", str(tmp_path / "out")]).stdout
