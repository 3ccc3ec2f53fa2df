"""What a text brings to each matrix: measured as transformers computes it, stored once, refused
where it is not of this model."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from arriving_shards import split
from quant_sources import MIXTURES, save_source
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import prompt, transformer_logits
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.main import main
from localr1.errors import (
    FormatError,
    LocalR1Error,
    NumericsError,
    OutputError,
    TensorError,
    UsageError,
)
from localr1.models.registry import parse_config
from localr1.quant.calibrate import Calibration
from localr1.quant.calibrating import calibrate
from localr1.quant.calibration_file import CalibrationFile, section_tensors
from localr1.quant.moments import RARE_TOKENS, ExpertMoments, SectionMoments, importance
from localr1.quant.progress import Progress

IDS = [prompt(0, 32), prompt(1, 32), prompt(2, 20)]
"""Windows of a text; those of one length can be read by transformers as they stand."""

CLOSE = 1e-4
"""Relative difference of sums in float64 and in transformers' float32; measured below 2e-6. One
token more or less in a sum is 1e-2."""


def measured_here(folder: Path, windows: list[Tensor]) -> list[SectionMoments]:
    """Of each layer, then of the head."""
    with open_checkpoint(folder) as checkpoint:
        config = parse_config(checkpoint.config)
        calibration = Calibration(checkpoint, config, windows)
        calibration.embed()
        return [*map(calibration.layer, range(config.num_layers)), calibration.head()]


def inputs_of(
    model: Any, windows: list[Tensor], matches: Callable[[str], bool]
) -> dict[str, Tensor]:
    """The inputs [T, in] of the modules of a transformers model whose names match."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0].reshape(-1, inputs[0].shape[-1]).detach())

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name))
        for name, module in model.named_modules()
        if matches(name)
    ]
    for window in windows:
        transformer_logits(model, window)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("model_type", ["llama", *MIXTURES])
def test_inputs_of_linears_are_those_of_transformers(model_type: str, tmp_path: Path) -> None:
    model = save_source(tmp_path / "source", model_type, **MIXTURES.get(model_type, {}))
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".experts." not in name
    }
    expected = inputs_of(model, IDS, linears.__contains__)
    found = {
        name: columns
        for section in measured_here(tmp_path / "source", IDS)
        for name, columns in section.columns.items()
    }
    assert found.keys() == expected.keys() - {n for n in expected if n.endswith("mlp.gate")}
    for name, columns in found.items():
        squares = expected[name].double().square().mean(0)
        torch.testing.assert_close(columns.inputs, squares, rtol=CLOSE, atol=1e-9)
        weight = model.get_submodule(name).weight.double()
        torch.testing.assert_close(columns.weights, weight.square().sum(0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_experts_are_measured_on_the_tokens_routed_to_them(model_type: str, tmp_path: Path) -> None:
    """Held to transformers' inputs of the block and to weights and experts of its own routing."""
    model = save_source(tmp_path / "source", model_type, **MIXTURES[model_type])
    sections = measured_here(tmp_path / "source", IDS)
    config = model.config
    for layer, section in enumerate(sections[:-1]):
        block = model.model.layers[layer].mlp
        assert (section.experts is not None) == hasattr(block, "experts")
        if section.experts is None:
            continue
        x = inputs_of(model, IDS, f"model.layers.{layer}.mlp".__eq__)[f"model.layers.{layer}.mlp"]
        chosen, weights = _routing(model, layer, x)
        matrices = block.experts.gate_up_proj.double(), block.experts.down_proj.double()
        for expert in range(len(section.experts.tokens)):
            tokens, column = (chosen == expert).nonzero(as_tuple=True)
            assert int(section.experts.tokens[expert]) == len(tokens)
            squares = weights[tokens, column].double().square()
            torch.testing.assert_close(
                section.experts.mass[expert], squares.sum(), rtol=CLOSE, atol=0
            )
            if not len(tokens):
                assert not section.experts.gate_up[expert].any()
                continue
            mine = x[tokens].double()
            gate, up = (mine @ matrices[0][expert].T).chunk(2, dim=1)
            inner = torch.nn.functional.silu(gate) * up
            for values, inputs in ((section.experts.gate_up, mine), (section.experts.down, inner)):
                expected = squares @ inputs.square() / squares.sum()
                # Their mean is near 1; what few tokens leave near 0 has lost its last digits.
                torch.testing.assert_close(values[expert], expected, rtol=CLOSE, atol=1e-6)
    assert config.num_hidden_layers == len(sections) - 1


def _routing(model: Any, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What transformers' block hands to its experts: their numbers and weights [T, k]."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[layer].mlp.experts

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((inputs[1].detach(), inputs[2].detach()))

    handle = experts.register_forward_pre_hook(keep)
    for window in IDS:
        transformer_logits(model, window)
    handle.remove()
    chosen, weights = (torch.cat([pair[i] for pair in seen]) for i in (0, 1))
    assert len(chosen) == len(x)
    return chosen, weights


def test_rarely_chosen_experts_fall_back_to_their_layer() -> None:
    name = "model.layers.0.mlp.experts"
    moments = ExpertMoments(
        prefix=name,
        gate_up=torch.tensor([[4.0, 0.0], [0.0, 8.0], [0.0, 0.0]], dtype=torch.float64),
        down=torch.tensor([[1.0], [3.0], [0.0]], dtype=torch.float64),
        tokens=torch.tensor([RARE_TOKENS, 3 * RARE_TOKENS, 0]),
        mass=torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64),
    )
    section = SectionMoments(experts=moments)
    layer = torch.tensor([1.0, 6.0], dtype=torch.float64)  # (1 * [4, 0] + 3 * [0, 8]) / 4
    assert section.inputs(f"{name}.0.up_proj").tolist() == [2.5, 3.0]
    assert section.inputs(f"{name}.1.gate_proj").tolist() == [0.25, 7.5]
    assert section.inputs(f"{name}.2.gate_proj").tolist() == layer.tolist()
    assert section.inputs(f"{name}.2.down_proj").tolist() == [2.5]


def test_importance_is_positive_and_bears_what_the_text_did_not_reach() -> None:
    found = importance(torch.tensor([1.0, 3.0, 0.0, 1e-12], dtype=torch.float64))
    assert found.tolist()[:2] == [1.0, 3.0]
    assert (found > 0).all()
    assert importance(torch.zeros(4, dtype=torch.float64)).tolist() == [1.0] * 4
    noisy = torch.rand(1000, dtype=torch.float64) + 0.5
    assert torch.equal(importance(noisy), importance(noisy * (1 + 1e-14)))


TEXT = "The quick brown fox jumps over the lazy dog, 1234567890 times. " * 8


def text_file(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module", params=["llama", "deepseek_v3"])
def sharded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    changes = MIXTURES.get(request.param, {})
    save_source(folder / "whole", request.param, num_hidden_layers=3, **changes)
    return split(folder / "whole", folder / "source")


def test_file_holds_what_was_measured_and_opens_in_safetensors(
    sharded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "stats.safetensors"
    report = calibrate(sharded, out, text_file(tmp_path), 200)
    assert report.calibrated.tokens == 200
    with open_checkpoint(sharded) as checkpoint:
        config = parse_config(checkpoint.config)
        is_mixture = config.moe is not None
        assert (report.experts is not None) == is_mixture
        with CalibrationFile(out, checkpoint.tensors, config) as file:
            assert set(file.calibrated.source) == {p.name for p in sharded.glob("*.safetensors")}
            for path in sharded.glob("*.safetensors"):
                with pytest.raises(UsageError, match="is another"):
                    file.check_source(path.name, "0" * 64)
            stored = load_file(out)
            for layer in [*range(config.num_layers), None]:
                again = section_tensors(file.section(layer), layer)
                assert all(torch.equal(stored[name], value) for name, value in again.items())
                assert again
    with safe_open(out, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["tokens"] == "200"
    assert sorted(os.listdir(tmp_path)) == ["stats.safetensors", "text.txt"]


class StoppingError(Exception):
    pass


def stop_after(section: int) -> Callable[[Progress], None]:
    def stop(progress: Progress) -> None:
        if progress.stage == "calibrate" and progress.done == section:
            raise StoppingError

    return stop


@pytest.mark.parametrize("section", [1, 2, 4])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    sharded: Path, section: int, tmp_path: Path
) -> None:
    text = text_file(tmp_path)
    whole = calibrate(sharded, tmp_path / "whole", text, 200)
    with pytest.raises(StoppingError):
        calibrate(sharded, tmp_path / "out", text, 200, stop_after(section))
    assert not (tmp_path / "out").exists()
    seen: list[int] = []
    again = calibrate(
        sharded,
        tmp_path / "out",
        text,
        200,
        lambda p: seen.append(p.done) if p.stage == "calibrate" else None,
    )
    assert seen[0] == section + 1, "what was done is not done again"
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert again.experts == whole.experts
    assert sorted(os.listdir(tmp_path)) == ["out", "text.txt", "whole"]


def test_another_text_number_of_tokens_or_source_is_refused(sharded: Path, tmp_path: Path) -> None:
    text, source = text_file(tmp_path), shutil.copytree(sharded, tmp_path / "source")
    with pytest.raises(StoppingError):
        calibrate(source, tmp_path / "out", text, 200, stop_after(2))
    with pytest.raises(OutputError, match="another text, number of tokens"):
        calibrate(source, tmp_path / "out", text, 100)
    other = tmp_path / "other.txt"
    other.write_text(TEXT.upper())
    with pytest.raises(OutputError, match="another text, number of tokens"):
        calibrate(source, tmp_path / "out", other, 200)
    path = source / "layer-0.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"another layer-0\.safetensors"):
        calibrate(source, tmp_path / "out", text, 200)
    calibrate(source, tmp_path / "out", text, 200, restart=True)


def test_damage_to_what_was_measured_before_is_found(sharded: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    with pytest.raises(StoppingError):
        calibrate(sharded, tmp_path / "out", text, 200, stop_after(3))
    (partial,) = tmp_path.glob(".out.partial-*")
    path = partial / "section-00001"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(OutputError, match="section-00001 read back"):
        calibrate(sharded, tmp_path / "out", text, 200)


def test_same_bytes_for_any_number_of_threads(sharded: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    before = torch.get_num_threads()
    try:
        for name, threads in (("a", 1), ("b", 3)):
            torch.set_num_threads(threads)
            calibrate(sharded, tmp_path / name, text, 200)
    finally:
        torch.set_num_threads(before)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def spoil(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> None:
    with safe_open(path, "pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def without(name: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: tensors.__delitem__(name)


def with_value(
    name: str, place: int, value: float
) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def change(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        tensors[name].view(-1)[place] = value

    return change


def with_metadata(key: str, value: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, metadata: metadata.__setitem__(key, value)


def read_layer_1(path: Path, checkpoint: Checkpoint) -> None:
    with CalibrationFile(path, checkpoint.tensors, parse_config(checkpoint.config)) as file:
        file.section(1)


INPUTS = "model.layers.1.self_attn.o_proj.inputs"
TOKENS = "model.layers.1.mlp.experts.tokens"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (without(INPUTS), TensorError, rf"{INPUTS}.*expected F32 \[\d+\], found none"),
        (with_value(INPUTS, 3, float("nan")), NumericsError, rf"{INPUTS}.*found nan"),
        (with_value(INPUTS, 3, float("inf")), NumericsError, rf"{INPUTS}.*found inf"),
        (with_value(INPUTS, 3, -1.0), NumericsError, rf"{INPUTS}.*found -1"),
        (with_value(TOKENS, 0, 1000), FormatError, rf"{TOKENS}.*expected 600 in all.*for 200"),
        (with_value(TOKENS, 0, -1), NumericsError, rf"{TOKENS}.*found -1"),
        (with_metadata("kind", "other"), FormatError, "expected a file that `localr1 calibrate`"),
        (with_metadata("version", "2"), FormatError, "version: expected 1, found 2"),
        (with_metadata("tokens", "many"), FormatError, "metadata"),
        (with_metadata("source", "[]"), FormatError, "metadata"),
        (with_metadata("source", json.dumps({"a": 1})), FormatError, "metadata"),
    ],
)
def test_bad_files_are_named(
    change: Any, error: type[LocalR1Error], message: str, tmp_path: Path
) -> None:
    save_source(tmp_path / "source", "qwen3_moe", **MIXTURES["qwen3_moe"])
    out = tmp_path / "stats.safetensors"
    calibrate(tmp_path / "source", out, text_file(tmp_path), 200)
    spoil(out, change)
    with (
        open_checkpoint(tmp_path / "source") as checkpoint,
        pytest.raises(error, match=message),
    ):
        read_layer_1(out, checkpoint)


def test_statistics_of_another_model_are_refused(sharded: Path, tmp_path: Path) -> None:
    save_source(tmp_path / "other", "qwen2")
    calibrate(tmp_path / "other", tmp_path / "out", text_file(tmp_path), 50)
    with open_checkpoint(sharded) as checkpoint:
        config = parse_config(checkpoint.config)
        with pytest.raises(TensorError, match="of another model"):
            CalibrationFile(tmp_path / "out", checkpoint.tensors, config)


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(arguments)
    assert exited.value.code == 0


def test_the_command_and_what_quantize_does_with_its_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_source(tmp_path / "source", "qwen3_moe", **MIXTURES["qwen3_moe"])
    source, text, stats = (str(tmp_path / name) for name in ("source", "text.txt", "stats"))
    text_file(tmp_path)
    run(["calibrate", source, "--out", stats, "--text", text, "--tokens", "200", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == 200
    assert document["experts"]["experts"] == 16
    assert document["bytes"] < os.path.getsize(stats)
    out = str(tmp_path / "out")
    run(["quantize", source, out, "--method", "awq+imatrix", "--calibration", stats, "--json"])
    said = json.loads(capsys.readouterr().out)["calibration"]
    assert said == {"text": "text.txt", "tokens": 200, "experts": document["experts"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "F", "--text", "T"], "--calibration beside --text or --tokens"),
        (["--method", "gptq", "--calibration", "F"], "gptq measures more"),
        (["--method", "awq+awq"], "expected one, or awq"),
        (["--no-smooth", "--calibration", "F"], "neither the method nor smoothing"),
        (["--no-smooth", "--text", "T"], "neither the method nor smoothing"),
        (["--no-smooth", "--tokens", "9", "--dry-run"], "neither the method nor smoothing"),
    ],
)
def test_options_that_make_no_sense_together(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_source(tmp_path / "source")
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as exited:
        main(["quantize", str(tmp_path / "source"), str(out), *arguments])
    assert exited.value.code == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
