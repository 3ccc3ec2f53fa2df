"""A source in pieces of rows: the same bytes whatever their size, with reading and writing beside
the work."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bnb_parts import save_quantized
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize as quantize_blocks
from gguf_mixtures import convert, converted_keys, converted_tensors, write_gguf
from quant_sources import MIXTURES, SIZES, save_source
from test_checkpoint_fp8 import in_fp8
from tiny_models import tiny_transformer
from torch import Tensor

from localr1.checkpoint.fp8 import dequantize
from localr1.checkpoint.reader import open_checkpoint
from localr1.checkpoint.rows import Rows, row_ranges
from localr1.errors import NumericsError, TensorError, TruncatedError
from localr1.kernels.block_scaled import BlockScaledRows
from localr1.quant import item_maker, observe, stored_rows
from localr1.quant.calibration_options import CalibrationOptions
from localr1.quant.methods import registry
from localr1.quant.methods.base import QuantizedTensor
from localr1.quant.methods.rtn import RoundToNearest
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import HADAMARD, Recipe, Rotation, split_method
from localr1.quant.rotation import RotatedCheckpoint
from localr1.quant.writer import ShardWriter

RECIPE = Recipe.uniform(4, 32)
SMALL = 3000
"""Bytes: pieces of a few rows, of which no number divides the blocks of FP8."""
BLOCK = 5000
"""Values: blocks of some more rows than such a piece has."""


def save_llama(folder: Path) -> None:
    save_source(folder, num_hidden_layers=1)


def save_float32(folder: Path) -> None:
    save_source(folder, num_hidden_layers=1, dtype="float32")


def save_fp8(folder: Path) -> None:
    """kv_b_proj is kept: dequantized, in pieces too."""
    save_source(folder, "deepseek_v3", **MIXTURES["deepseek_v3"])
    in_fp8(folder)


def save_bnb(folder: Path) -> None:
    save_quantized(folder, "llama", load_in_4bit=True, bnb_4bit_quant_type="nf4")


def save_gguf(path: Path) -> None:
    """Matrices in blocks of Q8_0, experts stacked."""
    model = tiny_transformer("qwen3_moe", 0, **SIZES, **MIXTURES["qwen3_moe"])
    kind = GGMLQuantizationType.Q8_0
    tensors = {
        name: quantize_blocks(value, kind) if value.ndim > 1 else value
        for name, value in converted_tensors(model).items()
    }
    write_gguf(path, "qwen3moe", converted_keys(model.config), tensors, kind)


SOURCES: dict[str, Callable[[Path], Any]] = {
    "llama": save_llama,
    "float32": save_float32,
    "fp8": save_fp8,
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("kind", SOURCES)
def test_the_size_of_pieces_changes_no_byte(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smoothed columns and rows, kept tensors, errors in localr1.json and checksums included."""
    SOURCES[kind](tmp_path / "source")
    monkeypatch.setattr(observe, "BLOCK_VALUES", BLOCK)
    quantize(tmp_path / "source", tmp_path / "whole", RECIPE)
    monkeypatch.setattr(item_maker, "PIECE_BYTES", SMALL)
    monkeypatch.setattr(stored_rows, "PIECE_BYTES", SMALL)
    quantize(tmp_path / "source", tmp_path / "pieces", RECIPE)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def joined(pieces: Iterator[Rows]) -> tuple[Tensor, int]:
    values = [dequantize(p) if isinstance(p, BlockScaledRows) else p for p in pieces]
    return (torch.cat(values) if values[0].shape else values[0]), len(values)


def test_pieces_of_every_format_are_the_tensor(tmp_path: Path) -> None:
    for kind, save in SOURCES.items():
        save(tmp_path / kind)
    save_bnb(tmp_path / "bnb")
    save_gguf(tmp_path / "blocks.gguf")
    convert(tmp_path / "split.gguf", tiny_transformer("deepseek_v2", 0))
    cut = 0
    for place in (*SOURCES, "bnb", "blocks.gguf", "split.gguf"):
        with open_checkpoint(tmp_path / place) as checkpoint:
            for name in checkpoint.tensors:
                value, number = joined(checkpoint.pieces(name, SMALL))
                assert torch.equal(value, checkpoint.read(name)), f"{place}: {name}"
                cut += number > 1
            with pytest.raises(TensorError):
                next(iter(checkpoint.pieces("nothing", SMALL)))
    assert cut > 30


def test_pieces_of_a_rotated_model_are_the_tensor(tmp_path: Path) -> None:
    """What reads the residual stream goes row by row, of a tied head and FP8 too."""
    save_source(tmp_path / "tied", "qwen3", tie_word_embeddings=True)
    save_fp8(tmp_path / "fp8")
    for place in ("tied", "fp8"):
        cut = []
        source = open_checkpoint(tmp_path / place)
        with RotatedCheckpoint(source, Rotation(HADAMARD)) as checkpoint:
            for name in checkpoint.tensors:
                value, number = joined(checkpoint.pieces(name, SMALL))
                assert torch.equal(value, checkpoint.read(name)), f"{place}: {name}"
                cut += [name] * (number > 1)
        assert "lm_head.weight" in cut
        assert not [name for name in cut if name.endswith("o_proj.weight")]


@pytest.mark.parametrize("method", ["imatrix", "awq+imatrix", "gptq"])
def test_pieces_of_what_is_calibrated_change_no_byte(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "source")
    awq, rounding = split_method(method)
    recipe = replace(Recipe.uniform(4, 32, method=rounding), awq=awq)
    options = CalibrationOptions(tokens=160)  # Three windows.
    monkeypatch.setattr(observe, "BLOCK_VALUES", BLOCK)
    quantize(tmp_path / "source", tmp_path / "whole", recipe, calibration=options)
    monkeypatch.setattr(item_maker, "PIECE_BYTES", SMALL)
    monkeypatch.setattr(stored_rows, "PIECE_BYTES", SMALL)
    monkeypatch.setattr(observe, "PIECE_BYTES", SMALL)
    monkeypatch.setattr(observe, "HELD_BYTES", 0)
    quantize(tmp_path / "source", tmp_path / "pieces", recipe, calibration=options)
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")


def test_rows_of_pieces() -> None:
    """In any order, some of them twice, and not a piece more is read than they need."""
    matrix = torch.arange(44.0, dtype=torch.float64).view(11, 4)
    pieces = iter(torch.split(matrix, 3))
    places = torch.tensor([7, 0, 3, 7, 2])
    found = stored_rows.rows_at(pieces, places)
    assert found.dtype == torch.float32
    assert torch.equal(found.double(), matrix[places])
    assert len(list(pieces)) == 1


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 11])
def test_blocks_do_not_depend_on_pieces(
    rows: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in float64 depend on their order, which what follows from them may hide."""
    monkeypatch.setattr(observe, "BLOCK_VALUES", 13)  # Three rows.
    matrix = torch.arange(44.0).view(11, 4)
    blocks = observe.RowBlocks(threads)
    found = list(
        blocks.map(
            torch.split(matrix, rows), lambda block, place: torch.cat([block, matrix[place]])
        )
    )
    assert len(found) == 4
    for block, expected in zip(found, torch.split(matrix, 3), strict=True):
        assert block is not None
        assert torch.equal(block, torch.cat([expected, expected]).double())


def test_ranges_of_rows() -> None:
    assert list(row_ranges((7, 2), 10, 30)) == [(0, 3), (3, 6), (6, 7)]
    assert list(row_ranges((2, 2), 10, 5)) == [(0, 1), (1, 2)], "one row at least"
    assert list(row_ranges((), 4, 100)) == [(0, 1)]
    assert list(row_ranges((0, 5), 0, 100)) == [(0, 0)]


class WholeMatrices:
    """A `Method` that needs all rows at once."""

    name = "whole"

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def quantize(self, weight: Tensor, *arguments: Any) -> QuantizedTensor:
        self.shapes.append(tuple(weight.shape))
        return RoundToNearest().quantize(weight, *arguments)


def test_a_method_that_needs_whole_matrices_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_fp8(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "rows", RECIPE)
    method = WholeMatrices()
    monkeypatch.setitem(registry.METHODS, "rtn", method)
    monkeypatch.setattr(item_maker, "PIECE_BYTES", SMALL)
    quantize(tmp_path / "source", tmp_path / "whole", RECIPE)
    assert len(method.shapes) > 10
    assert {shape[0] for shape in method.shapes} >= {64, 128}
    assert contents(tmp_path / "whole") == contents(tmp_path / "rows")


def test_reading_and_writing_go_on_beside_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than one piece ahead: what is written waits for the piece behind it to be read, and
    would for ever if they took turns."""
    save_llama(tmp_path / "source")
    threads: set[str] = set()
    read, written, most_ahead = threading.Semaphore(0), [0], [0]
    made = [0]
    really_read, really_put = item_maker.read_pieces, ShardWriter.put

    def read_pieces(*arguments: Any) -> Iterator[item_maker.Piece]:
        for piece in really_read(*arguments):
            made[0] += 1
            most_ahead[0] = max(most_ahead[0], made[0] - written[0])
            read.release()
            threads.add(threading.current_thread().name)
            yield piece
        read.release(10)  # Behind the last nothing is waited for.

    def put(self: ShardWriter, name: str, rows: Tensor) -> None:
        threads.add(threading.current_thread().name)
        if not name.endswith(("_scale", "_shape")):
            written[0] += 1
            assert read.acquire(timeout=60)
        really_put(self, name, rows)

    monkeypatch.setattr("localr1.quant.work.read_pieces", read_pieces)
    monkeypatch.setattr(ShardWriter, "put", put)
    assert not read.acquire(blocking=False)
    quantize(tmp_path / "source", tmp_path / "out", RECIPE)
    assert len(threads) >= 2
    assert threading.main_thread().name not in threads
    assert 1 < most_ahead[0] <= 4


def test_errors_of_the_other_threads_end_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path / "source")
    whole = (tmp_path / "source" / "model.safetensors").read_bytes()
    really_put = ShardWriter.put

    def cut(self: ShardWriter, name: str, rows: Tensor) -> None:
        (tmp_path / "source" / "model.safetensors").write_bytes(whole[: len(whole) // 3])
        really_put(self, name, rows)

    monkeypatch.setattr(item_maker, "PIECE_BYTES", SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", cut)
        with pytest.raises(TruncatedError):
            quantize(tmp_path / "source", tmp_path / "out", RECIPE)
    (tmp_path / "source" / "model.safetensors").write_bytes(whole)

    def refuse(self: ShardWriter, name: str, rows: Tensor) -> None:
        raise NumericsError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", refuse)
        with pytest.raises(NumericsError, match="planted"):
            quantize(tmp_path / "source", tmp_path / "out", RECIPE)
    assert threading.active_count() < 10
