"""The random-weight mixtures of benchmarks/geometry.py: of the released sizes, whole, and alike in
every program that opens them."""

import hashlib
import itertools
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quant_sources import dequantized, read_output, relative_error
from released_mixtures import QWEN3_30B_A3B, R1, V2_LITE
from tiny_models import MemoryCheckpoint, transformer_logits
from torch import Tensor

from localr1.checkpoint.reader import open_checkpoint
from localr1.engine.events import Delta, GenerationParams
from localr1.experts.statistics import routing_statistics
from localr1.experts.trace import Trace
from localr1.kernels.reference import ReferenceKernels
from localr1.load import load_engine
from localr1.models.config import ModelConfig
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step
from localr1.quant.gguf_export import export_gguf
from localr1.quant.recipe import Recipe
from localr1.sampler import SamplingParams

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from geometry import belady_rate, record_sampled, write
from geometry_sizes import GEOMETRIES, Geometry, sized

RELEASED = {"v2-lite": V2_LITE, "qwen3-30b-a3b": QWEN3_30B_A3B, "r1": R1}
SMALL = {"v2-lite": (32, 3), "qwen3-30b-a3b": (16, 3), "r1": (64, 4)}
"""Divisor of the widths and layers."""
IDS = torch.arange(40, 64)
SAME = 1e-9
"""Relative squared difference between logits of the same weights in float32: measured below 1e-12.
A scale made twice as large gives 1e-6 and more."""


def tiny(name: str, out: Path, *, seed: int = 0, bits: int = 4, dense_bits: int = 8) -> Path:
    small, layers = SMALL[name]
    recipe = Recipe.uniform(bits, attention_bits=dense_bits, shared_bits=dense_bits, smooth=False)
    write(GEOMETRIES[name], out, recipe, layers=layers, small=small, seed=seed)
    return out


def digests(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
    }


def float_logits(folder: Path) -> Tensor:
    """Of the values that the codes stand for, in float32; those of experts as transformers has
    them, rounded to the dtype of their scales."""
    with open_checkpoint(folder) as checkpoint:
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
    tensors = {
        name: (value.bfloat16() if ".mlp.experts." in name else value).float()
        for name, value in dequantized(read_output(folder)).items()
    }
    model = load_model(MemoryCheckpoint(config, tensors), ReferenceKernels())
    return model.forward(Step(IDS, 0, all_logits=True), model.new_cache(64))


def own_config(geometry: Geometry) -> ModelConfig:
    return parse_config(geometry.config)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_sizes_are_the_released_ones(name: str) -> None:
    """But for the layers of multi-token prediction, which localr1 leaves out."""
    assert own_config(GEOMETRIES[name]) == replace(parse_config(RELEASED[name]), mtp_layers=0)


def test_full_size_is_not_changed() -> None:
    for geometry in GEOMETRIES.values():
        assert sized(geometry.config) == geometry.config


@pytest.mark.parametrize("name", GEOMETRIES)
def test_opens_in_the_runtime_and_talks(name: str, tmp_path: Path) -> None:
    with closing(load_engine(tiny(name, tmp_path / "model"), threads=2)) as engine:
        ids = engine.prompt([{"role": "user", "content": "hello"}]).ids
        params = GenerationParams(SamplingParams(temperature=1.0, seed=1), max_tokens=12)
        text = "".join(e.text for e in engine.generate(ids, params) if isinstance(e, Delta))
        assert len(text.split()) >= 6, "words of the vocabulary"
        logits = engine.model.forward(
            Step(IDS, 0, all_logits=True), engine.model.new_cache(len(IDS))
        )
    assert 0.5 < float(logits.std()) < 3.0, "values of order one through all layers"


@pytest.mark.parametrize("name", GEOMETRIES)
def test_transformers_computes_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny(name, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in model.parameters():  # Experts stay in the dtype of their scales.
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    assert relative_error(transformer_logits(model, IDS), float_logits(folder)) < SAME


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again = (digests(tiny("v2-lite", tmp_path / name / "m")) for name in ("a", "b"))
    other = digests(tiny("v2-lite", tmp_path / "c" / "m", seed=1))
    assert first == again
    weights = [name for name in first if name.endswith(".safetensors")]
    assert all(first[name] != other[name] for name in weights)


def test_an_expert_does_not_depend_on_what_else_is_written(tmp_path: Path) -> None:
    whole = digests(tiny("v2-lite", tmp_path / "whole"))
    with_8_bits = digests(tiny("v2-lite", tmp_path / "narrow", dense_bits=4))
    assert whole["experts-001.safetensors"] == with_8_bits["experts-001.safetensors"]


@pytest.mark.parametrize("dense_bits", [4, 8])
@pytest.mark.parametrize("name", ["v2-lite", "qwen3-30b-a3b"])
def test_the_gguf_holds_the_same_values(name: str, dense_bits: int, tmp_path: Path) -> None:
    """Read back by our own reader, which tests hold to llama.cpp's library."""
    folder = tiny(name, tmp_path / "model", dense_bits=dense_bits)
    export_gguf(folder, tmp_path / "model.gguf", with_tokenizer=False)
    expected = dequantized(read_output(folder))
    with open_checkpoint(tmp_path / "model.gguf") as converted, open_checkpoint(folder) as source:
        assert parse_config(converted.config) == parse_config(
            {k: v for k, v in source.config.items() if k != "quantization_config"}
        )
        assert converted.tensors.keys() == expected.keys()
        for tensor in converted.tensors:
            value = converted.read(tensor).float()
            if tensor.endswith("kv_b_proj.weight"):  # Quantized there, as llama.cpp does.
                assert relative_error(value, expected[tensor]) < (0.02 if dense_bits == 4 else 1e-4)
            else:
                assert torch.equal(value, expected[tensor].float()), tensor


def rate_by_hand(choices: list[int], slots: int) -> float:
    """The best of all ways to evict, by trying them."""
    best = {frozenset[int](): 0}
    for expert in choices:
        following: dict[frozenset[int], int] = {}
        for cache, hits in best.items():
            grown = cache | {expert}
            gained = hits + (expert in cache)
            kept = [grown - {victim} for victim in grown] if len(grown) > slots else [grown]
            for each in kept:
                following[each] = max(following.get(each, 0), gained)
        best = following
    return max(best.values()) / len(choices)


def test_belady_is_the_best_that_any_eviction_can_do() -> None:
    generator = np.random.default_rng(0)
    for slots, _ in itertools.product((1, 2, 3), range(20)):
        choices = generator.integers(0, 6, 24)
        assert belady_rate(choices, slots) == pytest.approx(rate_by_hand(choices.tolist(), slots))


def test_the_stream_makes_experts_popular_for_good_and_for_a_while(tmp_path: Path) -> None:
    """With neither, a cache hits its share of the experts; each of the two alone raises that."""

    def hit_rate(name: str, common: float, topic: float) -> float:
        geometry = GEOMETRIES["v2-lite"]
        stream = replace(geometry.stream, common=common, topic=topic)
        recipe = Recipe.uniform(smooth=False)
        write(replace(geometry, stream=stream), tmp_path / name, recipe, layers=3, small=16)
        with closing(load_engine(tmp_path / name, threads=2)) as engine:
            trace: Trace = record_sampled(engine, ["a"], 150)
        return routing_statistics(trace).hit_rate(0.25)

    even = hit_rate("even", 0.0, 1e-6)
    assert even == pytest.approx(0.25, abs=0.05)
    assert hit_rate("popular", 0.4, 1e-6) > even + 0.1
    assert hit_rate("topical", 0.0, 0.4) > even + 0.1
