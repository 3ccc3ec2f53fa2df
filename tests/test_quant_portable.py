"""What the quantizer writes opens in transformers and means the same there.

The oracle is transformers itself: the quantized directory through AutoModelForCausalLM, against the
source model holding the values that the codes stand for, unpacked by the test's own code.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import dequantized, read_output, relative_error, save_source
from safetensors.torch import load_file, save_file
from tiny_models import prompt, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from localr1.checkpoint.reader import open_checkpoint
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model
from localr1.models.step import Step
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

SAME = 1e-6
"""Relative squared difference between logits of the same weights: float32 rounding, measured below
1e-12. A single scale made twice as large gives more than 1e-5 (test_one_wrong_scale_is_seen)."""

INT8_ACTIVATIONS = 0.004
"""The same, squared, for our kernels, which round activations to int8 as well; tiny peaked models
lose 2 to 3% of the norm of their logits to it."""

WEIGHT_ERROR = {4: 0.012, 8: 6e-5}
"""Relative squared error of a matrix: groups of 128 Gaussian numbers have 0.0094 and 3.8e-5."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}
IDS = prompt(0, 32)


def opened_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return transformer_logits(model, IDS)


def expected_logits(source_model: Any, folder: Path) -> Tensor:
    """The source model with the weights that the directory stands for."""
    weights = dequantized(read_output(folder))
    if "lm_head.weight" in weights and source_model.config.tie_word_embeddings:
        source_model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"])
        source_model.config.tie_word_embeddings = False
    missing, unexpected = source_model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return transformer_logits(source_model, IDS)


RECIPES = {
    "default": Recipe.uniform(4, 32, smooth=False),
    "attention4-g128": Recipe.uniform(4, 128, attention_bits=4, smooth=False),
    "int8-g64": Recipe.uniform(8, 64, smooth=False),
}


@pytest.mark.parametrize(
    ("recipe_name", "case"),
    [("default", case) for case in CASES]
    + [
        (name, case) for name in ("attention4-g128", "int8-g64") for case in ("llama", "qwen3-tied")
    ],
)
def test_transformers_reads_the_same_weights(recipe_name: str, case: str, tmp_path: Path) -> None:
    recipe = RECIPES[recipe_name]
    model_type, changes = CASES[case]
    source_model = save_source(tmp_path / "source", model_type, **changes)
    report = quantize(tmp_path / "source", tmp_path / "out", recipe)
    assert not report.reasons_not_portable
    original = {name: value.clone() for name, value in source_model.state_dict().items()}
    expected = expected_logits(source_model, tmp_path / "out")
    assert relative_error(expected, opened_logits(tmp_path / "out")) < SAME
    for name, value in dequantized(read_output(tmp_path / "out")).items():
        rule = recipe.rule_for(name.removesuffix(".weight")) if value.dim() == 2 else None
        if rule is None:
            assert torch.equal(value, original[name]), name
        else:
            error = relative_error(original[name], value)
            assert 0 < error < WEIGHT_ERROR[rule.scheme.bits], name


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("embedding_bits", [16, 8])
def test_our_model_reads_the_same_weights(
    model_type: str, embedding_bits: int, tmp_path: Path
) -> None:
    """Packed embeddings, which transformers does not open, are checked here alone."""
    source_model = save_source(tmp_path / "source", model_type, tie_word_embeddings=True)
    recipe = Recipe.uniform(8, 32, embedding_bits=embedding_bits)
    quantize(tmp_path / "source", tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (embedding_bits == 8)
    weights = dequantized(read_output(tmp_path / "out"))
    assert ("lm_head.weight" in weights) == (embedding_bits == 16)
    expected = expected_logits(source_model, tmp_path / "out")
    with open_checkpoint(tmp_path / "out") as checkpoint:
        model = load_model(checkpoint, ReferenceKernels())
    found = model.forward(Step(IDS, 0, all_logits=True), model.new_cache(len(IDS)))
    assert relative_error(expected, found) < INT8_ACTIVATIONS


def test_one_wrong_scale_is_seen(tmp_path: Path) -> None:
    source_model = save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(4, 32))
    expected = expected_logits(source_model, tmp_path / "out")
    path = tmp_path / "out" / "dense-00001-of-00001.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][0, 0] *= 2
    save_file(tensors, path, metadata={"format": "pt"})
    assert relative_error(expected, opened_logits(tmp_path / "out")) > SAME


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_of_the_source_decides_that_of_the_scales(dtype: str, tmp_path: Path) -> None:
    save_source(tmp_path / "source", dtype=dtype)
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(8, 32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stored = {"float16": torch.float16, "float32": torch.bfloat16}[dtype]
    assert config["torch_dtype"] == str(stored).removeprefix("torch.")
    kinds = {value.dtype for value in read_output(tmp_path / "out").values()}
    assert kinds == {stored, torch.int32, torch.int64}


def test_auto_tokenizer_gives_the_ids_of_the_source(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(4, 32))
    source, out = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("source", "out"))
    text = "déjà vu, <think> and 42"
    assert source(text)["input_ids"] == out(text)["input_ids"]
    assert out.eos_token == "</s>"
    assert out.chat_template == "{{ messages }}"
    with open_checkpoint(tmp_path / "out") as checkpoint:
        files = checkpoint.tokenizer_files()
    assert files.eos_token_ids == (257,)
    assert files.bos_token == "<s>"
    assert not files.add_bos
