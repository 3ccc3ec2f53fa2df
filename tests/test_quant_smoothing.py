"""Smoothing changes how a model rounds, not what it computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import MIXTURES, dequantized, read_output, relative_error, save_source
from tiny_models import prompt, tiny_transformer, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM

from localr1.checkpoint.reader import open_checkpoint
from localr1.checkpoint.stored import CheckpointInPieces
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step
from localr1.qtypes import QuantScheme
from localr1.quant.calibrate import Calibration
from localr1.quant.moments import Columns
from localr1.quant.pipeline import dry_run, quantize
from localr1.quant.recipe import Recipe
from localr1.quant.smoothing import Link, Smoothing, even_scale, links, smoothing

IDS = prompt(0, 32)
SAME = 1e-10
"""Relative squared difference of logits in float32, measured below 1e-12; a link that is left out
on one of its sides gives more than 1e-4."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-no-sharing": ("llama", {"num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
}


def spread(model: Any) -> None:
    """Columns of very different sizes in every norm, as trained models have them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                value.mul_(torch.exp(torch.randn(value.shape, generator=generator)))


def measure_columns(checkpoint: CheckpointInPieces) -> dict[str, Columns]:
    """Of every linear, on IDS."""
    config = parse_config(checkpoint.config)
    calibration = Calibration(checkpoint, config, [IDS])
    calibration.embed()
    measured: dict[str, Columns] = {}
    for index in range(config.num_layers):
        measured |= calibration.layer(index).columns
    return {**measured, **calibration.head().columns}


def even(measured: dict[str, Columns]) -> Callable[[Link], Tensor]:
    return lambda link: even_scale([measured[reader] for reader in link.readers])


def smoothing_of(folder: Path, dtype: torch.dtype) -> Smoothing:
    with open_checkpoint(folder) as checkpoint:
        config = parse_config(checkpoint.config)
        measured = measure_columns(checkpoint)
        schemes = dict.fromkeys(measured, QuantScheme(8, 32))  # As if all were quantized.
        wanted = links(config, schemes, smooth=True, awq=False)
        norms = {
            link.maker: checkpoint.read(f"{link.maker}.weight") for link in wanted if link.is_norm
        }
        return smoothing(wanted, even(measured), norms, dtype, config)


@pytest.mark.parametrize("case", CASES)
def test_smoothed_model_computes_the_same(case: str, tmp_path: Path) -> None:
    """bfloat16: the columns make up for the rounding of the divided norms."""
    model_type, changes = CASES[case]
    model = save_source(tmp_path / "source", model_type, adjust=spread, **changes)
    expected = transformer_logits(model, IDS)
    smooth = smoothing_of(tmp_path / "source", torch.bfloat16)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    changed = 0
    with torch.no_grad():
        for name, value in model.named_parameters():
            smoothed = smooth.applied(name, value.detach().clone()).float()
            changed += not torch.equal(smoothed, value)
            value.copy_(smoothed)
    biases = sum("v_proj.bias" in name or "up_proj.bias" in name for name in model.state_dict())
    assert changed == model.config.num_hidden_layers * 9 + 2 + biases
    assert relative_error(expected, transformer_logits(model, IDS)) < SAME


def test_inputs_are_measured_as_transformers_computes_them(tmp_path: Path) -> None:
    model = save_source(tmp_path / "source", adjust=spread)
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen[name] = inputs[0][0].square().mean(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep(name))
    transformer_logits(model, IDS)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        found = measure_columns(checkpoint)
    assert found.keys() == seen.keys()
    for name, columns in found.items():
        torch.testing.assert_close(columns.inputs.float(), seen[name], rtol=1e-4, atol=1e-6)
        weight = model.get_submodule(name).weight
        expected = weight.double().square().sum(0)
        torch.testing.assert_close(columns.weights, expected, rtol=1e-9, atol=0)


def test_rounding_costs_less_and_transformers_reads_it(tmp_path: Path) -> None:
    model = save_source(tmp_path / "source", adjust=spread)
    expected = transformer_logits(model, IDS)
    errors = []
    for smooth in (False, True):
        out = tmp_path / f"smooth-{smooth}"
        report = quantize(tmp_path / "source", out, Recipe.uniform(8, 32, smooth=smooth))
        assert not report.reasons_not_portable
        with open_checkpoint(out) as checkpoint:
            ours = load_model(checkpoint, ReferenceKernels())
        found = ours.forward(Step(IDS, 0, all_logits=True), ours.new_cache(len(IDS)))
        errors.append(relative_error(expected, found))
        assert report.num_smoothed == (9 if smooth else 0)
    assert errors[1] < 0.6 * errors[0]
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    weights = dequantized(read_output(out))
    model.load_state_dict(weights)
    assert relative_error(transformer_logits(model, IDS), transformer_logits(theirs, IDS)) < SAME


def test_columns_follow_the_measured_sizes_and_bear_a_dead_one() -> None:
    inputs = torch.tensor([1.0, 16.0, 0.0, 4.0]).square()
    weights = torch.tensor([1.0, 0.25, 1.0, 1.0]).square()
    measured = {"lm_head": Columns(inputs, weights)}
    config = parse_config(tiny_transformer("llama", 0).config.to_dict())
    norms = {"model.norm": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    found = smoothing(
        [Link("model.norm", ("lm_head",))], even(measured), norms, torch.float32, config
    )
    columns = found.columns["lm_head"]
    torch.testing.assert_close(columns[1] / columns[0], torch.tensor(8.0))
    assert columns[3] == 1.0
    assert found.replaced["model.norm"][3] == 0.0
    assert torch.isfinite(columns).all()
    assert (columns > 0).all()


@pytest.mark.parametrize("embedding_bits", [16, 8])
def test_a_matrix_shared_with_the_embedding_stays(embedding_bits: int, tmp_path: Path) -> None:
    save_source(tmp_path / "source", tie_word_embeddings=True)
    recipe = Recipe.uniform(8, 32, embedding_bits=embedding_bits, smooth=True)
    quantize(tmp_path / "source", tmp_path / "out", recipe)
    tensors = read_output(tmp_path / "out")
    with open_checkpoint(tmp_path / "source") as checkpoint:
        norm = checkpoint.read("model.norm.weight")
    assert torch.equal(tensors["model.norm.weight"], norm) == (embedding_bits == 8)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_mixtures_are_left_as_they_are(model_type: str, tmp_path: Path) -> None:
    save_source(tmp_path / "source", model_type, **MIXTURES[model_type])
    report = dry_run(tmp_path / "source", Recipe.uniform(4, 32, smooth=True))
    assert report.num_smoothed == 0


def test_same_bytes_for_any_number_of_threads(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    before = torch.get_num_threads()
    for name, threads in (("a", 1), ("b", 3)):
        torch.set_num_threads(threads)
        quantize(tmp_path / "source", tmp_path / name, Recipe.uniform(8, 32, smooth=True))
    torch.set_num_threads(before)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
