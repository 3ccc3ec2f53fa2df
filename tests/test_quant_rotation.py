"""Rotation changes how a model rounds, not what it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from arriving_shards import Download, contents, split
from quant_sources import MIXTURES, read_output, relative_error, save_source
from safetensors.torch import load_file, save_file
from tiny_models import prompt, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.main import app
from localr1.errors import OutputError, UnsupportedError, UsageError
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model
from localr1.models.step import Step
from localr1.quant.calibrating import calibrate
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.hadamard import make_orthogonal
from localr1.quant.pipeline import dry_run, quantize
from localr1.quant.recipe import HADAMARD, RANDOM, Recipe, Rotation
from localr1.quant.rotation import RotatedCheckpoint

IDS = prompt(0, 32)
PARITY = 1e-4
"""Of logits of about 10, in float32. Measured below 3e-5; a norm that is not folded, a matrix left
out or a transposed rotation gives more than 0.1."""

SMALL = 5e-3
"""Relative squared difference of logits that 8-bit weights make, measured 1.4e-3; a column
scaled on one side alone gives more than 0.1."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": ("qwen3_moe", MIXTURES["qwen3_moe"]),
    "deepseek_v2": ("deepseek_v2", MIXTURES["deepseek_v2"]),
    "deepseek_v3": ("deepseek_v3", MIXTURES["deepseek_v3"]),
    "deepseek_v3-biases": ("deepseek_v3", {**MIXTURES["deepseek_v3"], "attention_bias": True}),
}
STAY = ("q_b_proj.weight", "kv_b_proj.weight", "_norm.weight", "a_layernorm.weight",
        "correction_bias", "_proj.bias", "mqa.bias")  # fmt: skip
"""Names end so of what is within attention or behind a matrix that reads."""
HADAMARD_RECIPE = Recipe.uniform(4, 32, rotation=Rotation(HADAMARD))


def logits(model: Any) -> Tensor:
    found: Tensor = model.forward(Step(IDS, 0, all_logits=True), model.new_cache(len(IDS)))
    return found


def outliers(model: Any) -> None:
    """A few columns far larger than the others before every matrix, as in trained models."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("layernorm.weight", "model.norm.weight")):
                value[::37] *= 10


@pytest.mark.parametrize("kind", [HADAMARD, RANDOM])
@pytest.mark.parametrize("case", CASES)
def test_rotated_model_computes_the_same(case: str, kind: str, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    save_source(tmp_path / "source", model_type, dtype="float32", **changes)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        expected = logits(load_model(checkpoint, ReferenceKernels()))
        rotated = RotatedCheckpoint(checkpoint, Rotation(kind, seed=1))
        found = logits(load_model(rotated, ReferenceKernels()))
        read = {name: rotated.read(name).float() for name in rotated.tensors}
        stored = {name: checkpoint.read(name).float() for name in checkpoint.tensors}
    assert (expected - found).abs().max() <= PARITY
    for name, value in read.items():
        if name == "model.norm.weight" or name.endswith(
            ("input_layernorm.weight", "n_layernorm.weight")
        ):
            assert (value == 1).all()
        else:
            stays = name.endswith(STAY) and not name.endswith(("o_proj.bias", "down_proj.bias"))
            assert (name in stored and torch.equal(value, stored[name])) == stays, name


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_rounding_costs_less_and_transformers_reads_it(model_type: str, tmp_path: Path) -> None:
    changes = {"tie_word_embeddings": model_type == "llama", **MIXTURES.get(model_type, {})}
    model = save_source(tmp_path / "source", model_type, adjust=outliers, **changes)
    expected = transformer_logits(model, IDS)
    errors = []
    for rotation in (None, Rotation(HADAMARD)):
        out = tmp_path / f"{rotation is not None}"
        recipe = Recipe.uniform(8, 32, smooth=False, rotation=rotation)
        report = quantize(tmp_path / "source", out, recipe)
        assert not report.reasons_not_portable
        with open_checkpoint(out) as checkpoint:
            found = logits(load_model(checkpoint, ReferenceKernels()))
        errors.append(relative_error(expected, found))
    assert errors[1] < 0.9 * errors[0], errors
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not theirs.config.tie_word_embeddings
    assert relative_error(expected, transformer_logits(theirs, IDS)) < errors[1]


def test_large_columns_no_longer_decide_how_others_are_rounded() -> None:
    """The int8 error of activations of which four columns are ten times the others."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, ::32] *= 10
    errors = []
    for values in (x, make_orthogonal(Rotation(HADAMARD), 128).applied_to_rows(x.double()).float()):
        q, scale = ReferenceKernels().quantize_activations(values)
        read_back = (q.float().view(64, -1, 32) * scale[..., None]).flatten(1)
        errors.append(relative_error(values, read_back))
    assert errors[1] < 0.5 * errors[0], errors


def test_rotation_goes_with_smoothing(tmp_path: Path) -> None:
    """Norms of ones are divided by what is measured on the rotated stream."""
    model = save_source(tmp_path / "source", adjust=outliers)
    expected = transformer_logits(model, IDS)
    recipe = Recipe.uniform(8, 32, rotation=Rotation(HADAMARD))
    report = quantize(tmp_path / "source", tmp_path / "out", recipe)
    assert report.num_smoothed == 9
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative_error(expected, transformer_logits(theirs, IDS)) < SMALL


def test_what_was_done_is_recorded(tmp_path: Path) -> None:
    save_source(tmp_path / "source", tie_word_embeddings=True)
    plain = dry_run(tmp_path / "source", Recipe.uniform(4, 32))
    recipe = Recipe.uniform(4, 32, rotation=Rotation(RANDOM, seed=7))
    report = quantize(tmp_path / "source", tmp_path / "out", recipe)
    manifest = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert manifest["rotation"] == {"kind": "random", "seed": 7}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert (report.parameters, report.source_nbytes) == (plain.parameters, plain.source_nbytes)
    tensors = read_output(tmp_path / "out")
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight"):
        assert (tensors[name] == 1).all() or recipe.smooth


def test_the_command_rotates_and_says_so(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    out = tmp_path / "out"
    arguments = ["quantize", str(tmp_path / "source"), str(out), "--rotate", "random"]
    result = CliRunner().invoke(app, [*arguments, "--rotation-seed", "4", "--json"])
    assert json.loads(result.stdout)["rotation"] == {"kind": "random", "seed": 4}
    assert "random, seed 4" in CliRunner().invoke(app, ["show", str(out)]).stdout
    refused = CliRunner().invoke(app, [*arguments[:-1], "givens"])
    assert refused.exit_code != 0


def test_a_router_is_stored_in_float32(tmp_path: Path) -> None:
    save_source(tmp_path / "source", "qwen3_moe", **MIXTURES["qwen3_moe"])
    quantize(tmp_path / "source", tmp_path / "out", HADAMARD_RECIPE)
    tensors = read_output(tmp_path / "out")
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.float32
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_same_bytes_when_interrupted_and_for_any_number_of_threads(tmp_path: Path) -> None:
    save_source(tmp_path / "whole", num_hidden_layers=3, tie_word_embeddings=True)
    complete = split(tmp_path / "whole", tmp_path / "complete")
    before = torch.get_num_threads()
    for name, threads in (("one", 1), ("three", 3)):
        torch.set_num_threads(threads)
        quantize(complete, tmp_path / name, HADAMARD_RECIPE)
    torch.set_num_threads(before)
    expected = contents(tmp_path / "one")
    assert contents(tmp_path / "three") == expected

    class Interrupted(Download):
        def wait(self, file_name: str) -> Path:
            path = super().wait(file_name)
            if file_name == "layer-2.safetensors":
                raise KeyboardInterrupt
            return path

    (tmp_path / "first").mkdir()
    download = Interrupted(complete, tmp_path / "first" / "complete")
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize(download.work, out, HADAMARD_RECIPE, arrival=download)
    for other in (None, Rotation(RANDOM), Rotation(HADAMARD, seed=1)):
        recipe = Recipe.uniform(4, 32, rotation=other)
        with pytest.raises(OutputError, match="another recipe"):
            quantize(download.work, out, recipe, arrival=Download(complete, tmp_path / f"{other}"))
    again = Download(complete, tmp_path / "first-again")
    quantize(download.work, out, HADAMARD_RECIPE, arrival=again)
    assert contents(out) == expected
    assert ("wait", "layer-0") not in again.events


def test_methods_see_the_rotated_inputs_and_no_others(tmp_path: Path) -> None:
    """gptq after a rotation, and a file measured without one refused."""
    source = tmp_path / "source"
    model = save_source(source, adjust=outliers, tie_word_embeddings=True)
    expected = transformer_logits(model, IDS)
    errors = []
    for method in ("rtn", "gptq"):
        recipe = Recipe.uniform(
            4, 32, attention_bits=4, method=method, smooth=False, rotation=Rotation(HADAMARD)
        )
        options = CalibrationOptions(tokens=512) if method == "gptq" else None
        quantize(source, tmp_path / method, recipe, calibration=options)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / method, dtype=torch.float32)
        errors.append(relative_error(expected, transformer_logits(theirs, IDS)))
    assert errors[1] < errors[0], errors
    measured = tmp_path / "measured.safetensors"
    calibrate(source, measured, tokens=64)
    imatrix = Recipe.uniform(4, 32, method="imatrix", rotation=Rotation(HADAMARD))
    with pytest.raises(UsageError, match="rotation changes what is measured"):
        quantize(source, tmp_path / "out", imatrix, calibration=CalibrationOptions(file=measured))


def test_a_tensor_of_an_unknown_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    save_source(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UnsupportedError, match=r"self_attn\.sinks"):
        dry_run(folder, HADAMARD_RECIPE)


def test_what_is_quantized_already_is_refused_as_such(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", HADAMARD_RECIPE)
    with pytest.raises(UnsupportedError, match="unquantized weights"):
        dry_run(tmp_path / "out", HADAMARD_RECIPE)
