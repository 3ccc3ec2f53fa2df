"""A GGUF model in several files: one checkpoint whichever part is named, and every set that is not
whole or not of one model refused."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from checkpoint_files import U32, gguf_bytes, refused, value, with_keys
from gguf_mixtures import converted_keys, converted_tensors, write_gguf
from tiny_models import (
    VOCABULARY,
    tiny_transformer,
)

from localr1.checkpoint.gguf_file import GgufFile
from localr1.checkpoint.gguf_split import MAX_PARTS, part_paths
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import (
    FormatError,
    LocalR1Error,
    NotFoundError,
    TensorError,
    TruncatedError,
    UsageError,
)
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

A_FILE = 12
"""Tensors."""


def write_parts(
    folder: Path, name: str = "tiny", seed: int = 0, a_file: int = A_FILE
) -> list[Path]:
    folder.mkdir(exist_ok=True)
    model = tiny_transformer("deepseek_v3", seed)
    write_gguf(
        folder / f"{name}.gguf",
        "deepseek2",
        converted_keys(model.config),
        converted_tensors(model),
        tensors_a_file=a_file,
    )
    return sorted(folder.glob(f"{name}-*.gguf"))


def test_any_part_opens_the_whole(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    assert [part.name for part in parts] == [f"tiny-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    model = tiny_transformer("deepseek_v3", 0)
    write_gguf(
        tmp_path / "one", "deepseek2", converted_keys(model.config), converted_tensors(model)
    )
    with open_checkpoint(tmp_path / "one") as whole:
        for path in (*parts, tmp_path):
            (tmp_path / "one").rename(tmp_path / "one.bin")
            with open_checkpoint(path) as checkpoint:
                assert checkpoint.config == whole.config
                assert checkpoint.tensors == whole.tensors
                for name in whole.tensors:
                    assert torch.equal(checkpoint.read(name), whole.read(name)), name
            (tmp_path / "one.bin").rename(tmp_path / "one")
    assert part_paths(parts[1]) == parts


def test_parts_in_the_hub_cache(tmp_path: Path) -> None:
    """Links into the model's own blobs are followed, others not."""
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    parts = write_parts(tmp_path / "models--a--b" / "blobs")
    for number, part in enumerate(parts):
        part.rename(blobs / str(number))
        (snapshot / part.name).symlink_to(blobs / str(number))
    with open_checkpoint(snapshot / parts[0].name) as checkpoint:
        assert len(checkpoint.tensors) > 2 * A_FILE
    outside = tmp_path / "outside"
    shutil.move(blobs / "1", outside)
    (snapshot / parts[1].name).unlink()
    (snapshot / parts[1].name).symlink_to(outside)
    with refused(snapshot, FormatError, "inside the model's directory"):
        open_checkpoint(snapshot / parts[0].name)


def test_quantize_reads_and_records_every_part(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    changes = {"head_dim": 16, "norm_topk_prob": True}
    model = tiny_transformer("qwen3_moe", 0, **sizes, **changes)
    keys, tensors = converted_keys(model.config), converted_tensors(model)
    for name, a_file in (("one.gguf", 0), ("a.gguf", A_FILE)):
        write_gguf(
            tmp_path / name,
            "qwen3moe",
            keys,
            tensors,
            tensors_a_file=a_file,
            vocabulary=VOCABULARY,
        )
    parts = sorted(tmp_path.glob("a-*.gguf"))
    assert len(parts) > 1
    results = []
    for source in (tmp_path / "one.gguf", parts[0]):
        out = tmp_path / source.stem
        quantize(source, out, Recipe.uniform(8, 32))
        results.append({file.name: file.read_bytes() for file in out.glob("*.safetensors")})
    assert results[0] == results[1]
    recorded = (tmp_path / parts[0].stem / "localr1.json").read_text()
    for part in parts:
        assert hashlib.sha256(part.read_bytes()).hexdigest() in recorded


Spoil = Callable[[list[Path]], object]


def cut(path: Path, nbytes: int = 8) -> None:
    os.truncate(path, path.stat().st_size - nbytes)


def swap(parts: list[Path]) -> None:
    parts[1].rename(parts[1].with_name("x"))
    parts[2].rename(parts[1])
    parts[1].with_name("x").rename(parts[2])


def another_model(parts: list[Path]) -> None:
    """As many tensors in as many parts."""
    other = write_parts(parts[0].parent / "other", "tiny", seed=1)
    shutil.copy(other[0], parts[1])


def another_count(parts: list[Path]) -> None:
    other = write_parts(parts[0].parent / "other", "tiny", a_file=20)
    shutil.copy(other[1], parts[1])


def twice(parts: list[Path]) -> None:
    """The second part's tensors in the third too."""
    fields = {"split.no": 2, "split.count": 3}
    reader = gguf.GGUFReader(parts[1])
    total = int(reader.get_field("split.tensors.count").contents())
    writer = gguf.GGUFWriter(parts[2], "deepseek2")
    for key, number in fields.items():
        writer.add_uint16(key, number)
    writer.add_int32("split.tensors.count", total)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


FAULTS: dict[str, tuple[Spoil, type[LocalR1Error], str]] = {
    "no first": (lambda parts: parts[0].unlink(), NotFoundError, "tiny-00001-of-00003.gguf"),
    "no second": (lambda parts: parts[1].unlink(), NotFoundError, "tiny-00002-of-00003.gguf"),
    "no last": (lambda parts: parts[2].unlink(), NotFoundError, "tiny-00003-of-00003.gguf"),
    "two changed places": (swap, FormatError, "split.no: expected 1, found 2"),
    "a part twice": (lambda p: shutil.copy(p[1], p[2]), FormatError, "split.no: expected 2"),
    "of another model": (another_model, FormatError, "split.no: expected 1, found 0"),
    "of another split": (another_count, FormatError, "split.count: expected 3, found 2"),
    "tensors twice": (twice, TensorError, "in another part too"),
    "last cut": (lambda parts: cut(parts[2], 40), TruncatedError, "tiny-00003"),
    "last empty": (lambda parts: parts[2].write_bytes(b""), TruncatedError, "tiny-00003"),
    "not GGUF": (lambda parts: parts[1].write_bytes(b"<html>"), FormatError, "not a GGUF file"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("given", [0, 2])
def test_a_set_that_is_not_whole_is_refused(name: str, given: int, tmp_path: Path) -> None:
    spoil, error, said = FAULTS[name]
    parts = write_parts(tmp_path / "model")
    spoil(parts)
    path = parts[given] if parts[given].exists() else parts[1]
    # Any of the others may be the first to be looked at, where another is given.
    expected = (error, said) if path == parts[0] else (LocalR1Error, "")
    with refused(tmp_path / "model", *expected):
        open_checkpoint(path)


def test_too_few_tensors(tmp_path: Path) -> None:
    """A last part that has lost some, and says all the right things."""
    parts = write_parts(tmp_path)
    total = sum(len(gguf.GGUFReader(part).tensors) for part in parts)
    writer = gguf.GGUFWriter(parts[2], "deepseek2")
    writer.add_uint16("split.no", 2)
    writer.add_uint16("split.count", 3)
    writer.add_int32("split.tensors.count", total)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with refused(tmp_path, TensorError, f"expected {total} (split.tensors.count)"):
        open_checkpoint(parts[0])


@pytest.mark.parametrize("count", [0, 2, MAX_PARTS + 1, (1 << 32) - 1])
def test_a_name_that_says_something_else(count: int, tmp_path: Path) -> None:
    for name in ("a.gguf", "a-00001-of-00003.gguf", "a-00004-of-00003.gguf"):
        path = tmp_path / name
        path.write_bytes(gguf_bytes(with_keys(split__count=value(U32, count))))
        with refused(tmp_path, FormatError, "name"):
            open_checkpoint(path)


def test_a_cut_part_opens_for_its_header(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    cut(parts[2], 40)
    with GgufFile.open(parts[0], allow_truncated=True) as file:
        assert file.is_truncated
        assert file.config["model_type"] == "deepseek_v3"


def test_two_models_in_a_directory(tmp_path: Path) -> None:
    write_parts(tmp_path)
    write_parts(tmp_path, "other", seed=1)
    with refused(tmp_path, UsageError, "holds 6 GGUF files"):
        open_checkpoint(tmp_path)


def test_a_single_file_may_have_such_a_name(tmp_path: Path) -> None:
    path = tmp_path / "a-00001-of-00003.gguf"
    path.write_bytes(gguf_bytes())
    open_checkpoint(path).close()
    assert part_paths(path) == [path]
