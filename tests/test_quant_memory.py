"""The quantizer holds a few tensors at a time, not the model."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import SIZES, save_source, write_source
from tiny_models import tiny_transformer, unfused
from torch import Tensor

TESTS = Path(__file__).parent

HIDDEN, INNER, LAYERS = 512, 4096, 12
GROWTH = {"llama": 56 << 20, "qwen3_moe": 40 << 20}
"""Bytes beyond the peak of quantizing a tiny model. The largest tensors have 4 MB each, a layer of
the first 13 (in float32 27), the sources 156 and 152; measured 22 to 30 for the first."""

LARGE: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": INNER},
    "qwen3_moe": {"moe_intermediate_size": INNER, "num_experts": LAYERS, "num_experts_per_tok": 2},
}
"""The second has as many experts in its one layer as the first has layers."""

VOCABULARY = 131_072
WIDE_GROWTH = 80 << 20
"""The same where the embedding and the head have 128 MiB each. A piece of them has 16, and three
are there at a time, in one form or two. Measured: 53; 205 where a matrix is taken whole."""

SMOOTH_GROWTH = 112 << 20
"""The same while such a model is smoothed, whose pieces are widened to float32. Measured: 90; 154
where smoothing reads a matrix whole."""

PROGRAM = """
import sys
from pathlib import Path
import torch
from localr1.quant import item_maker
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

torch.set_num_threads(1)
small, large, out = map(Path, sys.argv[1:4])
recipe = Recipe.uniform(4, 32, smooth="smooth" in sys.argv)
if "whole" in sys.argv:
    item_maker.PIECE_BYTES = 1 << 40
options = CalibrationOptions(tokens=16) if "short" in sys.argv else None
quantize(small, out / "small", recipe, calibration=options)  # Imports and warms.
Path("/proc/self/clear_refs").write_text("5")  # The peak is counted anew from what is held now.
before = peak()
quantize(large, out / "large", recipe, calibration=options)
print(peak() - before)
"""
"""Not getrusage: a process inherits the peak of the one that started it (getrusage(2))."""


def save_large(folder: Path, model_type: str) -> int:
    """A model of many layers that share their values, or of one layer with many experts; returns
    the bytes of its tensors."""
    changes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, **LARGE[model_type]}
    model = tiny_transformer(model_type, 0, **{**SIZES, **changes})
    layers = LAYERS if model_type == "llama" else 1
    config = {**model.config.to_dict(), "num_hidden_layers": layers}
    tensors: dict[str, Tensor] = {}
    for stacked_name, stacked in model.state_dict().items():
        for name, value in unfused(stacked_name, stacked).items():
            for layer in range(layers if ".layers.0." in name else 1):
                copied = name.replace(".layers.0.", f".layers.{layer}.")
                tensors[copied] = value.bfloat16().clone()
    write_source(folder, config, tensors)
    return sum(value.nbytes for value in tensors.values())


def save_wide(folder: Path) -> None:
    """A tiny layer between a large embedding and a large head."""
    changes = {"hidden_size": HIDDEN, "num_hidden_layers": 1}
    model = tiny_transformer("llama", 0, **{**SIZES, **changes})
    tensors = {name: value.bfloat16() for name, value in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.rand(VOCABULARY, HIDDEN, dtype=torch.bfloat16)
    write_source(folder, {**model.config.to_dict(), "vocab_size": VOCABULARY}, tensors)


def save_wide_layer(folder: Path) -> None:
    """Beside an embedding and a head of 128 MiB each, a layer whose MLP has three such matrices."""
    rows, columns = VOCABULARY // 2, 2 * HIDDEN
    model = tiny_transformer(
        "llama", 0, **{**SIZES, "hidden_size": columns, "num_hidden_layers": 1}
    )
    tensors = {name: value.bfloat16() for name, value in model.state_dict().items()}
    values, mlp = torch.rand(rows, columns, dtype=torch.bfloat16), "model.layers.0.mlp."
    for name in ("model.embed_tokens", "lm_head", f"{mlp}gate_proj", f"{mlp}up_proj"):
        tensors[f"{name}.weight"] = values.clone()
    tensors[f"{mlp}down_proj.weight"] = values.view(columns, rows)
    config = {**model.config.to_dict(), "vocab_size": rows, "intermediate_size": rows}
    write_source(folder, config, tensors)


def growth(folder: Path, *options: str) -> int:
    """Bytes beyond a tiny model's peak that quantizing `folder`/large takes."""
    arguments = [str(folder / name) for name in ("small", "large", "out")]
    completed = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr
    return int(completed.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("model_type", LARGE)
def test_memory_does_not_grow_with_the_model(model_type: str, tmp_path: Path) -> None:
    save_source(tmp_path / "small")
    nbytes = save_large(tmp_path / "large", model_type)
    assert nbytes > 1.5 * GROWTH[model_type]
    assert 0 <= growth(tmp_path, "smooth") < GROWTH[model_type]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory_does_not_grow_with_the_largest_tensor(tmp_path: Path) -> None:
    save_source(tmp_path / "small")
    save_wide(tmp_path / "large")
    assert 0 <= growth(tmp_path) < WIDE_GROWTH


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_smoothing_holds_no_tensor_whole(tmp_path: Path) -> None:
    save_source(tmp_path / "small")
    save_wide_layer(tmp_path / "large")
    assert 0 <= growth(tmp_path, "smooth", "short") < SMOOTH_GROWTH


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_tensor_that_is_held_whole_is_seen(tmp_path: Path) -> None:
    save_source(tmp_path / "small")
    save_wide(tmp_path / "large")
    assert growth(tmp_path, "whole") > 2 * WIDE_GROWTH
