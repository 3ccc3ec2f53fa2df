"""NF4 is written as bitsandbytes and transformers read it, and runs as integers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from arriving_shards import Download, contents, split
from bnb_parts import save_quantized
from kernel_cases import in_8_bits
from quant_sources import MIXTURES, relative_error, save_source
from tiny_models import prompt, transformer_logits
from transformers import AutoModelForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from typer.testing import CliRunner

from localr1.checkpoint.bnb import BnbCheckpoint, bitsandbytes_functional
from localr1.checkpoint.nf4 import Nf4Checkpoint, runnable
from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.main import app
from localr1.errors import NumericsError, UnsupportedError
from localr1.kernels.api import PackedWeight
from localr1.kernels.native import NativeKernels
from localr1.kernels.native_weight import NativeWeight
from localr1.kernels.reference import ReferenceKernels
from localr1.layers.linear import PackedLinear
from localr1.load import footprint_of
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step
from localr1.models.weights import WeightLoader
from localr1.qtypes import NF4_STEPS, STEPS_OF_ONE
from localr1.quant import evaluate
from localr1.quant.methods import nf4
from localr1.quant.pipeline import dry_run, quantize
from localr1.quant.recipe import HADAMARD, Recipe, Rotation

IDS = prompt(0, 32)
RECIPE = Recipe.nf4(smooth=False)
BFLOAT16 = 2e-3
"""Relative squared difference of the logits of a model that multiplies in bfloat16, as the library
does, from those of the same weights in float32."""
GAUSSIAN = 0.0087
"""Relative squared error of Gaussian weights: NF4 alone 0.0085; scales that are not quantized again
change it by 1%, a code map of equal steps leaves 0.011."""
STEPS_ALONE = 3e-5
"""Relative squared difference of the integers from NF4's numbers: 2.3e-5; 127 steps: 3.7e-5."""
INT8_ACTIVATIONS = 0.004
FLIPPED = 4e-4
"""See test_quant_zero_points.py."""


@pytest.fixture
def transformers_loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """transformers' own loader, which asks for accelerate and needs nothing of it on one CPU."""
    place = "transformers.quantizers.quantizer_bnb_4bit.is_accelerate_available"
    monkeypatch.setattr(place, lambda *_: True)

    def load(folder: Path) -> Any:
        # For inference the library would switch to bfloat16 kernels where the CPU has them.
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    return load


class In8Bits(NativeKernels):
    """That keep the values of codes, a byte each."""

    def prepare(self, weight: PackedWeight) -> NativeWeight:
        return super().prepare(in_8_bits(weight))


def logits(checkpoint: Any, kernels: Any) -> torch.Tensor:
    model = load_model(checkpoint, kernels)
    return model.forward(Step(IDS, 0, all_logits=True), model.new_cache(len(IDS)))


@pytest.mark.parametrize("rows", [512, 7])
def test_parts_are_those_planned_and_lose_what_is_said(rows: int) -> None:
    weight = torch.randn(rows, 576, generator=torch.Generator().manual_seed(0))
    encoded = nf4.encode(weight, "m", torch.bfloat16)
    planned = {spec.name: (spec.dtype, spec.shape) for spec in nf4.specs("m", (rows, 576))}
    names = {torch.uint8: "U8", torch.float32: "F32"}
    assert planned == {
        name: (names[part.dtype], tuple(part.shape)) for name, part in encoded.parts.items()
    }
    state = json.loads(bytes(encoded.parts[f"m.weight.{nf4.STATE}"].numpy()))
    assert (state["dtype"], state["shape"]) == ("bfloat16", [rows, 576])
    assert 0.008 < encoded.relative_error < GAUSSIAN
    bits = 8 * sum(part.nbytes for name, part in encoded.parts.items() if "map" not in name)
    assert rows == 7 or bits / weight.numel() < 4.14


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_by_name(value: float) -> None:
    weight = torch.ones(4, 64)
    weight[3, 63] = value
    with pytest.raises(NumericsError, match=r"m\.weight: weights"):
        nf4.encode(weight, "m", torch.bfloat16)


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("qwen3", {})],
)
def test_transformers_opens_what_is_written(
    model_type: str,
    changes: dict[str, Any],
    tmp_path: Path,
    transformers_loads: Callable[[Path], Any],
) -> None:
    model = save_source(tmp_path / "source", model_type, **changes)
    report = quantize(tmp_path / "source", tmp_path / "out", RECIPE)
    assert (report.layout, report.reasons_not_portable) == ("bitsandbytes", ())
    theirs = transformers_loads(tmp_path / "out")
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    assert isinstance(theirs.model.layers[1].self_attn.o_proj, bitsandbytes.nn.Linear4bit)
    expected = transformer_logits(theirs, IDS)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        found = logits(checkpoint, ReferenceKernels())
        for name, layer in theirs.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear4bit):
                read = checkpoint.read(f"{name}.weight")
                state = layer.weight.quant_state
                assert torch.equal(dequantize_bnb_weight(layer.weight, state), read.bfloat16())
        part = {part.part: part for part in report.parts}["mlp"]
        name = "model.layers.0.mlp.up_proj.weight"
        error = relative_error(model.state_dict()[name], checkpoint.read(name))
    assert relative_error(expected, found) < BFLOAT16
    assert part.scheme == "nf4"
    assert part.relative_error is not None
    assert error == pytest.approx(part.relative_error, rel=0.1)
    assert relative_error(transformer_logits(model, IDS), found) > 4 * BFLOAT16


def test_it_runs_as_integers(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", RECIPE)
    with runnable(open_checkpoint(tmp_path / "out")) as checkpoint:
        assert isinstance(checkpoint, Nf4Checkpoint)
        reference = logits(checkpoint, ReferenceKernels())
        native = logits(checkpoint, NativeKernels())
        assert torch.equal(native, logits(checkpoint, In8Bits()))
        footprint = footprint_of(checkpoint.tensors, parse_config(checkpoint.config))
        loader = WeightLoader(checkpoint, ReferenceKernels())
        linear = loader.linear("model.layers.0.mlp.up_proj", 256, 128, bias=False)
        assert isinstance(linear, PackedLinear)
        assert linear.weight.scheme.name == "nf4-g64"
        stepped = loader.unpacked("model.layers.0.mlp.up_proj", 256, 128, widen=True)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        exact = logits(checkpoint, ReferenceKernels())
        weight = checkpoint.read("model.layers.0.mlp.up_proj.weight")
    assert 0 < relative_error(weight, stepped) < STEPS_ALONE
    assert relative_error(exact, reference) < INT8_ACTIVATIONS
    assert relative_error(reference, native) < FLIPPED
    model, _ = evaluate.load(tmp_path / "out", NativeKernels())
    assert footprint.weights == model.weight_bytes
    found = model.forward(Step(IDS, 0, all_logits=True), model.new_cache(len(IDS)))
    assert torch.equal(found, native)


def test_the_steps_are_the_nearest_to_the_librarys_numbers() -> None:
    numbers = bitsandbytes_functional().get_4bit_type("nf4", device="cpu").double()
    steps = torch.tensor(NF4_STEPS, dtype=torch.float64)
    assert ((numbers * STEPS_OF_ONE).round() == steps).all()
    assert (numbers - steps / STEPS_OF_ONE).abs().max() < 0.0037


def test_what_the_steps_add_to_the_error_of_gaussian_weights() -> None:
    numbers = bitsandbytes_functional().get_4bit_type("nf4", device="cpu").double()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8192, 64, generator=generator, dtype=torch.float64)
    largest = weight.abs().amax(1, keepdim=True)
    codes = torch.searchsorted((numbers[1:] + numbers[:-1]) / 2, weight / largest)
    rounded = numbers[codes] * largest
    stepped = torch.tensor(NF4_STEPS)[codes] / STEPS_OF_ONE * largest
    energy = weight.square().sum()
    alone, added, both = (
        float((a - b).square().sum() / energy)
        for a, b in ((weight, rounded), (rounded, stepped), (weight, stepped))
    )
    assert alone == pytest.approx(8.46e-3, abs=2e-5)
    assert added == pytest.approx(2.3e-5, abs=5e-7)
    assert both == pytest.approx(8.47e-3, abs=2e-5)
    assert alone < both


def test_blocks_that_cross_rows_and_other_types_stay_floats(tmp_path: Path) -> None:
    for name, options in (
        ("nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        ("fp4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
        ("int8", {"load_in_8bit": True}),
    ):
        save_quantized(tmp_path / name, "llama", **options)
        with open_checkpoint(tmp_path / name) as checkpoint:
            assert isinstance(checkpoint, BnbCheckpoint)
            found = Nf4Checkpoint(checkpoint)
            packed = [each for each in found.tensors if each.endswith(".weight_packed")]
            assert len(packed) == (14 if name == "nf4" else 0)
            if name == "nf4":
                assert torch.equal(logits(found, NativeKernels()), logits(found, In8Bits()))
    save_source(tmp_path / "narrow", head_dim=12)  # o_proj has 48 columns.
    quantize(tmp_path / "narrow", tmp_path / "out", RECIPE)
    with runnable(open_checkpoint(tmp_path / "out")) as checkpoint:
        assert "model.layers.0.self_attn.o_proj.weight" in checkpoint.tensors
        assert "model.layers.0.self_attn.q_proj.weight_packed" in checkpoint.tensors
        stepped = logits(checkpoint, NativeKernels())
    with open_checkpoint(tmp_path / "out") as checkpoint:
        exact = logits(checkpoint, ReferenceKernels())
    assert relative_error(exact, stepped) < INT8_ACTIVATIONS


def test_same_bytes_when_interrupted_and_for_any_number_of_threads(tmp_path: Path) -> None:
    recipe = Recipe.nf4(rotation=Rotation(HADAMARD))
    save_source(tmp_path / "whole", num_hidden_layers=3)
    complete = split(tmp_path / "whole", tmp_path / "complete")
    before = torch.get_num_threads()
    for name, threads in (("one", 1), ("three", 3)):
        torch.set_num_threads(threads)
        quantize(complete, tmp_path / name, recipe)
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
    with pytest.raises(KeyboardInterrupt):
        quantize(download.work, tmp_path / "out", recipe, arrival=download)
    again = Download(complete, tmp_path / "again")
    quantize(download.work, tmp_path / "out", recipe, arrival=again)
    assert contents(tmp_path / "out") == expected
    assert ("wait", "layer-0") not in again.events


def test_the_command_writes_it_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    arguments = ["quantize", str(tmp_path / "source"), str(tmp_path / "out"), "--method", "nf4"]
    refused = CliRunner().invoke(app, [*arguments, "--head-bits", "4"])
    assert refused.exit_code != 0
    done = CliRunner().invoke(app, arguments)
    assert "what else reads bitsandbytes" in done.stdout
    manifest = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert {rule["method"] for rule in manifest["recipe"]} == {"nf4"}
    assert "NF4" in CliRunner().invoke(app, ["show", str(tmp_path / "out")]).stdout.upper()


def test_mixtures_are_refused(tmp_path: Path) -> None:
    save_source(tmp_path / "source", "qwen3_moe", **MIXTURES["qwen3_moe"])
    with pytest.raises(UnsupportedError, match="a dense model"):
        dry_run(tmp_path / "source", RECIPE)
