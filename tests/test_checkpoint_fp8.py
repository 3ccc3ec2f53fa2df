"""Block-wise FP8 against compressed-tensors' own dequantizer, and every fault refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import refused
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
    FP8BlockDequantizer,
)
from quant_sources import MIXTURES, save_source
from released_mixtures import FP8
from safetensors.torch import load_file, save_file
from tiny_models import prompt, run_in_chunks, tiny_transformer, transformer_logits
from torch import Tensor

from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import FormatError, LocalR1Error, NumericsError, TensorError, UnsupportedError
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.methods.registry import METHODS
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.quant.recipe_file import find_recipe

NAME = "model.layers.0.mlp.up_proj.weight"
SCALE = NAME + "_scale_inv"


def block_quantized(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Codes and scales, each block's largest value becoming 448, the largest of E4M3."""
    rows, columns = weight.shape
    scales = torch.empty(-(-rows // block), -(-columns // block))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            place = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[place].abs().max().clamp_min(1e-12) / 448
            codes[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def write(folder: Path, tensors: dict[str, Tensor], quantization: Any = FP8, **config: Any) -> Path:
    document = {"model_type": "llama", **config, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors, folder / "model.safetensors")
    return folder


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Blocks of very different size, so that a scale in the wrong place shows."""
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    rise = torch.arange(rows)[:, None] // 128 + 2 * (torch.arange(columns) // 128)
    return noise * 4.0**rise


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(128, 128), (256, 384), (576, 256), (192, 200), (1, 1), (127, 129), (129, 127), (3, 300)],
)
def test_values_are_those_of_compressed_tensors(rows: int, columns: int, tmp_path: Path) -> None:
    weight = matrix(rows, columns)
    codes, scales = block_quantized(weight)
    oracle = FP8BlockDequantizer(targets=["Linear"], dtype=torch.float32)
    expected = oracle.process({NAME: codes.clone(), SCALE: scales.clone()})[NAME]
    with open_checkpoint(write(tmp_path, {NAME: codes, SCALE: scales})) as checkpoint:
        assert list(checkpoint.tensors) == [NAME]
        info = checkpoint.tensors[NAME]
        assert (info.dtype, info.shape) == ("F8_E4M3_BLOCK", (rows, columns))
        assert info.nbytes == codes.nbytes + scales.nbytes
        read = checkpoint.read(NAME)
    assert read.dtype == torch.float32
    assert torch.equal(read, expected)
    # E4M3 keeps 3 bits behind the point: at most 1/16 of a value, or of the smallest step.
    assert ((read - weight).abs() <= weight.abs() / 16 + weight.abs().max() / 448).all()


def test_other_blocks_and_narrow_scales(tmp_path: Path) -> None:
    codes, scales = block_quantized(matrix(100, 90), block=32)
    changes = {"weight_block_size": [32, 32], "scale_fmt": "ue8m0", "modules_to_not_convert": ["x"]}
    tensors = {NAME: codes, SCALE: scales.bfloat16(), "norm.weight": torch.ones(3).bfloat16()}
    with open_checkpoint(write(tmp_path, tensors, {**FP8, **changes})) as checkpoint:
        assert checkpoint.tensors["norm.weight"].dtype == "BF16"
        assert torch.equal(checkpoint.read("norm.weight"), tensors["norm.weight"])
        wide = scales.bfloat16().float().repeat_interleave(32, 0).repeat_interleave(32, 1)
        assert torch.equal(checkpoint.read(NAME), codes.float() * wide[:100, :90])
        assert "quantization_config" not in checkpoint.config
        with pytest.raises(TensorError, match="no tensor"):
            checkpoint.read(SCALE)


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    codes, scales = block_quantized(matrix(128, 128))
    bad = {"bad.weight": codes.clone(), "bad.weight_scale_inv": scales * float("nan")}
    with open_checkpoint(write(tmp_path, {NAME: codes, SCALE: scales, **bad})) as checkpoint:
        assert checkpoint.read(NAME).isfinite().all()
        with pytest.raises(NumericsError, match=r"bad\.weight_scale_inv"):
            checkpoint.read("bad.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -1e-4])
def test_a_bad_scale_is_refused(value: float, tmp_path: Path) -> None:
    codes, scales = block_quantized(matrix(256, 256))
    scales[1, 0] = value
    write(tmp_path, {NAME: codes, SCALE: scales})
    with open_checkpoint(tmp_path) as checkpoint, refused(tmp_path, NumericsError, "none negative"):
        checkpoint.read(NAME)


def test_a_code_that_is_no_number_is_refused(tmp_path: Path) -> None:
    codes, scales = block_quantized(matrix(130, 130))
    codes.view(torch.uint8)[129, 129] = 0x7F
    write(tmp_path, {NAME: codes, SCALE: scales})
    with open_checkpoint(tmp_path) as checkpoint, refused(tmp_path, NumericsError, "NaN or inf"):
        checkpoint.read(NAME)


CODES, SCALES = block_quantized(matrix(192, 300))
WRONG: list[tuple[dict[str, Tensor], str]] = [
    ({NAME: CODES}, "no scales"),
    ({SCALE: SCALES}, "no such tensor"),
    ({NAME: CODES.float(), SCALE: SCALES}, "found another type"),
    (
        {NAME: CODES, SCALE: SCALES.T.contiguous()},
        "F32 or BF16 [2, 3], one scale per block of 128 x 128 of [192, 300], found F32 [3, 2]",
    ),
    ({NAME: CODES, SCALE: SCALES[:1]}, "found F32 [1, 3]"),
    ({NAME: CODES, SCALE: SCALES[:, :2].contiguous()}, "found F32 [2, 2]"),
    ({NAME: CODES, SCALE: SCALES.flatten()}, "found F32 [6]"),
    ({NAME: CODES, SCALE: SCALES.half()}, "found F16 [2, 3]"),
    ({NAME: CODES, SCALE: SCALES.to(torch.int32)}, "found I32 [2, 3]"),
    ({NAME: CODES[0].clone(), SCALE: SCALES}, "found shape [300]"),
]


@pytest.mark.parametrize(("tensors", "said"), WRONG, ids=[each[1] for each in WRONG])
def test_scales_that_do_not_fit_are_refused(
    tensors: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    write(tmp_path, tensors)
    with refused(tmp_path, TensorError, said):
        open_checkpoint(tmp_path)


OTHER: list[tuple[dict[str, Any], type[LocalR1Error], str]] = [
    ({"fmt": "e5m2"}, UnsupportedError, "fmt: expected e4m3"),
    ({"activation_scheme": "static"}, UnsupportedError, "activation_scheme: expected dynamic"),
    ({"weight_block_size": None}, UnsupportedError, "one scale for a whole matrix"),
    ({"weight_block_size": [128]}, UnsupportedError, "two sizes"),
    ({"weight_block_size": [128, 0]}, UnsupportedError, "two sizes"),
    ({"weight_block_size": [128, True]}, UnsupportedError, "two sizes"),
    ({"weight_block_size": [64, 128]}, TensorError, "block of 64 x 128"),
    ({"weight_block_size": "128"}, FormatError, "weight_block_size"),
    ({"rotation": "hadamard"}, UnsupportedError, "unknown field"),
]


@pytest.mark.parametrize(("change", "error", "said"), OTHER, ids=[each[2] for each in OTHER])
def test_another_kind_of_fp8_is_named(
    change: dict[str, Any], error: type[LocalR1Error], said: str, tmp_path: Path
) -> None:
    write(tmp_path, {NAME: CODES, SCALE: SCALES}, {**FP8, **change})
    with refused(tmp_path, error, said):
        open_checkpoint(tmp_path)


def in_fp8(folder: Path) -> Path:
    """Put the projections of a saved model in FP8, in place; returns a copy of the directory with
    the values that these stand for."""
    exact = folder.with_name("exact")
    shutil.copytree(folder, exact)
    config = json.loads((folder / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        tensors[name] = value
        if "_proj" in name and name.endswith(".weight"):
            tensors[name], tensors[name + "_scale_inv"] = block_quantized(value)
    write(folder, tensors, **config)
    with open_checkpoint(folder) as checkpoint:
        values = {name: checkpoint.read(name) for name in checkpoint.tensors}
    save_file(values, exact / "model.safetensors", metadata={"format": "pt"})
    return exact


def test_a_model_in_fp8_computes_what_its_values_say(tmp_path: Path) -> None:
    """A tiny DeepSeek-V3, against transformers given the dequantized values: edge blocks in every
    matrix (no size here divides by 128)."""
    sizes = {"hidden_size": 160, "kv_lora_rank": 130, "moe_intermediate_size": 136}
    original = tiny_transformer("deepseek_v3", 0, **sizes)
    source = tmp_path / "source"
    original.save_pretrained(source)
    exact = type(original).from_pretrained(in_fp8(source), dtype=torch.float32)
    with open_checkpoint(source) as checkpoint:
        ours = load_model(checkpoint, ReferenceKernels())
    ids = prompt(0, 20)
    expected = transformer_logits(exact, ids)
    logits = run_in_chunks(ours, ids, [12])
    assert expected.abs().max() > 3.0
    assert (logits - expected).abs().max() <= 1e-4
    assert (logits - transformer_logits(original, ids)).abs().max() > 1e-2, "FP8 rounds"


@pytest.mark.parametrize("preset", [None, "small"])
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [("llama", {"intermediate_size": 160}), ("deepseek_v3", MIXTURES["deepseek_v3"])],
)
def test_fp8_is_quantized_as_what_it_stands_for(
    model_type: str, sizes: dict[str, Any], preset: str | None, tmp_path: Path
) -> None:
    """A mixture with all its experts, too; expert shards are read as any other file. preset: one
    for which the model reads a text."""
    source = tmp_path / "source"
    save_source(source, model_type, **sizes)
    exact = in_fp8(source)
    results = []
    for folder, out in ((source, tmp_path / "a"), (exact, tmp_path / "b")):
        if preset is None:
            quantize(folder, out, Recipe.uniform(4, 32))
        else:
            few = CalibrationOptions(tokens=64)
            quantize(folder, out, find_recipe(preset, METHODS), calibration=few)
        with open_checkpoint(out) as checkpoint:
            assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
            results.append({name: checkpoint.read(name) for name in checkpoint.tensors})
        assert (out / "experts-001.safetensors").exists() == (model_type == "deepseek_v3")
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
