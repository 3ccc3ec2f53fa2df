"""bitsandbytes' matrices against an independent decoder and against transformers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from bnb_parts import MODULE, NAME, STATE, matrix, parts_4bit, parts_int8, save_quantized, write
from quant_sources import SIZES, write_source
from tiny_models import prompt, run_in_chunks, tiny_transformer, transformer_logits
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import TensorError
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

LOGIT_TOLERANCE = 1e-4
"""Between float32 models with the same weights, whose logits reach 10; rounding to 4 bits moves
them by more than 0.1 (asserted)."""


def decoded(parts: dict[str, Tensor], quant_type: str = "nf4") -> np.ndarray[Any, Any]:
    """The format's definition in numpy: the high half of a byte first, blocks over flat values."""
    arrays = {
        name.removeprefix(f"{NAME}."): value.numpy()
        for name, value in parts.items()
        if value.dtype != torch.bfloat16
    }
    state = json.loads(arrays[f"quant_state.bitsandbytes__{quant_type}"].tobytes())
    scales = arrays["absmax"]
    if "nested_absmax" in arrays:
        outer = np.repeat(arrays["nested_absmax"], state["nested_blocksize"])[: len(scales)]
        scales = arrays["nested_quant_map"][scales] * outer + np.float32(state["nested_offset"])
    raw = parts[NAME].reshape(-1).view(torch.uint8).numpy()
    codes = np.stack((raw >> 4, raw & 15), axis=1).reshape(-1)
    values = arrays["quant_map"][codes][: np.prod(state["shape"])]
    values = values * np.repeat(scales, state["blocksize"])[: len(values)]
    result: np.ndarray[Any, Any] = values.reshape(state["shape"])
    return result


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("rows", "columns", "block"),
    [(64, 64, 64), (48, 80, 64), (64, 64, 128), (3, 50, 64), (5, 7, 64), (1, 1, 64), (1, 2, 64),
     (256, 576, 64), (130, 136, 1024), (40, 120, 2048)],
)  # fmt: skip
def test_4_bits_are_what_the_format_says(
    rows: int, columns: int, block: int, quant_type: str, nested: bool, tmp_path: Path
) -> None:
    """Rows that are no multiple of the block too, which the library itself misreads."""
    weight = matrix(rows, columns)
    parts = parts_4bit(weight, quant_type, nested=nested, block=block)
    norm = {"model.norm.weight": torch.ones(3).bfloat16()}
    with open_checkpoint(write(tmp_path, {**parts, **norm})) as checkpoint:
        assert checkpoint.tensors.keys() == {NAME, "model.norm.weight"}
        info = checkpoint.tensors[NAME]
        assert (info.dtype, info.shape) == (f"{quant_type.upper()}_BLOCK", (rows, columns))
        state_name = f"{NAME}.quant_state.bitsandbytes__{quant_type}"
        assert info.nbytes == sum(v.nbytes for n, v in parts.items() if n != state_name)
        assert "quantization_config" not in checkpoint.config
        read = checkpoint.read(NAME)
        assert torch.equal(checkpoint.read("model.norm.weight"), norm["model.norm.weight"])
        with pytest.raises(TensorError, match="no tensor"):
            checkpoint.read(f"{NAME}.absmax")
    assert read.dtype == torch.float32
    assert read.shape == (rows, columns)
    assert np.array_equal(read.numpy(), decoded(parts, quant_type))


def test_codes_may_be_labelled_with_another_type(tmp_path: Path) -> None:
    parts = parts_4bit(matrix(64, 64), storage=torch.bfloat16)
    assert parts[NAME].dtype == torch.bfloat16
    with open_checkpoint(write(tmp_path, parts)) as checkpoint:
        assert np.array_equal(checkpoint.read(NAME).numpy(), decoded(parts))


def test_8_bits_are_what_the_format_says(tmp_path: Path) -> None:
    weight = matrix(48, 80)
    parts = parts_int8(weight)
    assert parts.keys() == {NAME, f"{MODULE}.SCB", f"{MODULE}.weight_format"}
    expected = parts[NAME].double() * parts[f"{MODULE}.SCB"].double()[:, None] / 127
    with open_checkpoint(write(tmp_path, parts)) as checkpoint:
        assert list(checkpoint.tensors) == [NAME]
        assert checkpoint.tensors[NAME].dtype == "I8_ROW"
        assert checkpoint.tensors[NAME].nbytes == 48 * 80 + 4 * 48
        read = checkpoint.read(NAME)
    assert read.dtype == torch.float32
    # One rounding of scale / 127 and two of products.
    assert ((read - expected).abs() <= 3e-7 * expected.abs()).all()
    # Half a step; the library rounds to float16 first.
    assert ((read - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * 1.2).all()
    del parts[f"{MODULE}.weight_format"]  # Files of before 2023 lack it.
    with open_checkpoint(write(tmp_path, parts)) as checkpoint:
        assert torch.equal(checkpoint.read(NAME), read)


def test_opening_reads_no_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_4bit(matrix(256, 256))
    write(tmp_path, parts)
    reads: list[int] = []
    read_tensor = RandomAccessFile.read_tensor

    def watched(self: RandomAccessFile, offset: int, length: int) -> Tensor:
        reads.append(length)
        return read_tensor(self, offset, length)

    monkeypatch.setattr(RandomAccessFile, "read_tensor", watched)
    with open_checkpoint(tmp_path) as checkpoint:
        assert reads == [parts[STATE].nbytes]
        assert checkpoint.tensors[NAME].shape == (256, 256)


def test_the_library_brings_no_code_from_elsewhere(tmp_path: Path) -> None:
    """Nor says that it could not: a fresh process, where a package `kernels` waits to be asked."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('asked for a kernel')")
    write(tmp_path, parts_4bit(matrix(64, 64)))
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from localr1.checkpoint.reader import open_checkpoint\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        f"checkpoint.read({NAME!r})\n"
        "assert 'kernels' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


# Whole models, as transformers quantizes and saves them.


@pytest.fixture
def transformers_loads(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """transformers' own loader. It asks for accelerate, of which it needs nothing on one CPU."""
    for bits in (4, 8):
        place = f"transformers.quantizers.quantizer_bnb_{bits}bit.is_accelerate_available"
        monkeypatch.setattr(place, lambda *_: True)

    def load(folder: Path) -> Any:
        # For inference the library would switch to bfloat16 kernels where the CPU has them.
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()

    return load


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}


@pytest.mark.parametrize("options", [NF4, FP4], ids=["nf4", "fp4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_a_model_computes_what_transformers_does(
    model_type: str,
    options: dict[str, Any],
    tmp_path: Path,
    transformers_loads: Callable[[Path], Any],
) -> None:
    save_quantized(tmp_path / "source", model_type, **options)
    theirs = transformers_loads(tmp_path / "source")
    assert isinstance(theirs.model.layers[0].mlp.up_proj, bitsandbytes.nn.Linear4bit)
    ids = prompt(0, 20)
    expected = transformer_logits(theirs, ids)
    with open_checkpoint(tmp_path / "source") as checkpoint:
        ours = load_model(checkpoint, ReferenceKernels())
    logits = run_in_chunks(ours, ids, [12])
    assert expected.abs().max() > 3.0
    assert (logits - expected).abs().max() <= LOGIT_TOLERANCE
    unquantized = tiny_transformer(model_type, 0, **SIZES)
    assert (logits - transformer_logits(unquantized, ids)).abs().max() > 0.1


def test_8_bit_weights_are_those_of_transformers(
    tmp_path: Path, transformers_loads: Callable[[Path], Any]
) -> None:
    """Weights, not logits: the library quantizes activations to int8 as well."""
    save_quantized(tmp_path / "source", "qwen2", **INT8)
    theirs = transformers_loads(tmp_path / "source")
    with open_checkpoint(tmp_path / "source") as checkpoint:
        num_compared = 0
        for name, layer in theirs.named_modules():
            if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
                expected = dequantize_bnb_weight(layer.weight, layer.state)
                assert torch.equal(checkpoint.read(f"{name}.weight"), expected.float())
                num_compared += 1
        assert num_compared == 14
        load_model(checkpoint, ReferenceKernels())


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
def test_quantized_as_what_it_stands_for(options: dict[str, Any], tmp_path: Path) -> None:
    source, exact = tmp_path / "source", tmp_path / "exact"
    save_quantized(source, "llama", **options)
    with open_checkpoint(source) as checkpoint:
        values = {name: checkpoint.read(name) for name in checkpoint.tensors}
        write_source(exact, dict(checkpoint.config), values)
    results = []
    for folder, out in ((source, tmp_path / "a"), (exact, tmp_path / "b")):
        quantize(folder, out, Recipe.uniform(4, 32))
        with open_checkpoint(out) as checkpoint:
            assert checkpoint.config["quantization_config"]["quant_method"] == "compressed-tensors"
            results.append({name: checkpoint.read(name) for name in checkpoint.tensors})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
