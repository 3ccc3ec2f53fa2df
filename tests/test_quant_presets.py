"""What every preset makes opens in transformers and means the same there, dense and mixture, and
goes through GGUF and back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import MIXTURES, dequantized, read_output, relative_error, save_source
from test_gguf_export import known_tokenizer
from tiny_models import prompt, stored_matrix, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from localr1.checkpoint.reader import open_checkpoint
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.gguf_export import export_gguf
from localr1.quant.methods.registry import METHODS
from localr1.quant.pipeline import quantize
from localr1.quant.recipe_file import PRESETS, find_recipe

SAME = 1e-9
"""Relative squared difference of logits of the same weights in float32, as in
test_quant_experts_portable.py. A code of each group of one row, off by one, gives 2e-7 and more."""
IDS = prompt(0, 32)
KINDS: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {"tie_word_embeddings": True}, **MIXTURES}


def logits_of(model: Any, weights: dict[str, Tensor]) -> Tensor:
    """Of the source model, given these weights."""
    if "lm_head.weight" in weights and model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"].clone())
        model.config.tie_word_embeddings = False
    with torch.no_grad():
        for name, value in weights.items():
            is_buffer = name.endswith("e_score_correction_bias")
            place = model.get_buffer(name) if is_buffer else stored_matrix(model, name)
            place.copy_(value)
    return transformer_logits(model, IDS)


def values_in_transformers(folder: Path) -> dict[str, Tensor]:
    """It multiplies an expert's codes by their scales in the dtype of the scales."""
    return {
        name: value.bfloat16().float() if ".experts." in name else value
        for name, value in dequantized(read_output(folder)).items()
    }


@pytest.mark.parametrize("preset", PRESETS[:3])
@pytest.mark.parametrize("model_type", KINDS)
def test_transformers_and_gguf_have_the_same_weights(
    preset: str, model_type: str, tmp_path: Path
) -> None:
    source = save_source(tmp_path / "source", model_type, **KINDS[model_type])
    known_tokenizer(tmp_path / "source")
    out = tmp_path / "out"
    few = CalibrationOptions(tokens=64) if preset == "small" else None
    report = quantize(tmp_path / "source", out, find_recipe(preset, METHODS), calibration=few)
    assert not report.reasons_not_portable
    opened = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    for parameter in opened.parameters():  # Experts stay in the dtype of their scales.
        if parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()
    expected = logits_of(source, values_in_transformers(out))
    assert relative_error(expected, transformer_logits(opened, IDS)) < SAME

    if model_type == "qwen3_moe":  # Its tiny weights do not add up to one, which GGUF cannot say.
        return
    export_gguf(out, tmp_path / "a.gguf")
    weights = dequantized(read_output(out))
    with open_checkpoint(tmp_path / "a.gguf") as found:
        assert found.tensors.keys() == weights.keys()
        for name, value in weights.items():
            if not name.endswith("kv_b_proj.weight"):  # Rounded there to 8 bits.
                assert torch.equal(found.read(name).float(), value), name


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_one_wrong_code_is_seen(model_type: str, tmp_path: Path) -> None:
    """By the tolerance."""
    source = save_source(tmp_path / "source", model_type, **KINDS[model_type])
    quantize(tmp_path / "source", tmp_path / "out", find_recipe("balanced", METHODS))
    weights = values_in_transformers(tmp_path / "out")
    expected = logits_of(source, weights)
    name = "model.layers.1.self_attn.o_proj.weight"
    scale = read_output(tmp_path / "out")[f"{name}_scale"].float().abs()
    row = int(scale.amax(1).argmax())
    weights[name][row, : scale.shape[1]] += scale[row].max()
    assert relative_error(expected, logits_of(source, weights)) > SAME
