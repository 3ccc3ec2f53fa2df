"""Where experts lie: the ranges hold the bytes that the safetensors library reads, ours in one
piece with the checksum that was recorded, those of others wherever they put them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_packs import pack_foreign
from quant_sources import MIXTURES, read_output, save_source
from safetensors.torch import load_file, save_file
from torch import Tensor

from localr1.checkpoint.expert_ranges import ExpertLocator, ExpertRanges
from localr1.checkpoint.hf_directory import HuggingFaceDirectory
from localr1.checkpoint.index import FileRange
from localr1.errors import ConfigError, FormatError, LocalR1Error, TensorError, UnsupportedError
from localr1.kernels.checksum import crc32c
from localr1.qtypes import QuantScheme
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe

PREFIX = "model.layers.1.mlp.experts"
SHARD = "experts-001.safetensors"
NUM_EXPERTS, INNER, HIDDEN = 8, 64, 128
ORDER = [
    f"{part}_proj.{suffix}"
    for suffix in ("weight_packed", "weight_scale")
    for part in ("gate", "up", "down")
]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    save_source(folder / "source", "deepseek_v3", **MIXTURES["deepseek_v3"])
    quantize(folder / "source", folder / "out", Recipe.uniform(4, 32))
    return folder / "out"


def locate(folder: Path, **sizes: int) -> list[ExpertRanges]:
    sizes = {"inner_size": INNER, "hidden_size": HIDDEN, **sizes}
    with HuggingFaceDirectory(folder) as checkpoint:
        return ExpertLocator(checkpoint).locate(PREFIX, range(NUM_EXPERTS), **sizes)


def content(part: FileRange) -> bytes:
    return part.path.read_bytes()[part.offset : part.end]


def stored(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def document(folder: Path) -> Any:
    return json.loads((folder / "localr1.json").read_text())


def rewritten(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """The same model as the safetensors library saves it, in one file."""
    out.mkdir()
    for path in folder.glob("*.json"):
        if path.name != "model.safetensors.index.json":
            shutil.copy(path, out)
    tensors = read_output(folder)
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_ours_are_one_range_with_its_checksum(quantized: Path) -> None:
    tensors = load_file(quantized / SHARD)
    recorded = document(quantized)["expert_checksums"]
    assert recorded.keys() == {SHARD}
    assert len(recorded[SHARD]) == NUM_EXPERTS
    end = 0
    for number, expert in enumerate(locate(quantized)):
        values = [stored(tensors[f"{PREFIX}.{number}.{name}"]) for name in ORDER]
        assert [content(part) for part in expert.parts()] == values
        assert expert.whole is not None
        assert expert.whole.file_name == SHARD
        assert expert.whole.nbytes == expert.nbytes
        assert end in (0, expert.whole.offset)
        end = expert.whole.end
        assert content(expert.whole) == b"".join(values)
        assert expert.checksum == crc32c(content(expert.whole))
        assert f"{expert.checksum:08x}" == recorded[SHARD][number]
        assert [m.layout.scheme for m in expert.matrices] == [QuantScheme(4, 32)] * 3
        assert {m.layout.scale.dtype for m in expert.matrices} == {"BF16"}
    assert len(set(recorded[SHARD])) == NUM_EXPERTS


def test_a_byte_that_changed_shows(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "bad")
    whole = locate(tmp_path / "bad")[3].whole
    assert whole is not None
    data = bytearray(whole.path.read_bytes())
    data[whole.offset + 1000] ^= 1
    whole.path.write_bytes(data)
    for number, expert in enumerate(locate(tmp_path / "bad")):
        assert expert.whole is not None
        assert (crc32c(content(expert.whole)) == expert.checksum) == (number != 3)


def test_eight_bits(tmp_path: Path) -> None:
    """Another architecture, parts of other sizes, in the same order."""
    save_source(tmp_path / "source", "qwen3_moe", **MIXTURES["qwen3_moe"])
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(8, 32))
    for expert in locate(tmp_path / "out"):
        assert expert.whole is not None
        assert expert.checksum == crc32c(content(expert.whole))
        assert expert.gate.layout.scheme == QuantScheme(8, 32)


def test_dense_models_have_no_checksums(tmp_path: Path) -> None:
    save_source(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(8, 32))
    assert document(tmp_path / "out")["expert_checksums"] == {}


def test_a_checkpoint_of_the_hub_is_found_through_its_links(
    quantized: Path, tmp_path: Path
) -> None:
    """There files are blobs named by their hash: the checksums are those of the name."""
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for place, path in enumerate(sorted(quantized.iterdir())):
        shutil.copy(path, blobs / f"{place:040x}")
        (snapshot / path.name).symlink_to(blobs / f"{place:040x}")
    for expert in locate(snapshot):
        assert expert.whole is not None
        assert expert.whole.path.parent == blobs.resolve()
        assert expert.checksum == crc32c(content(expert.whole))


def test_parts_that_lie_apart(quantized: Path, tmp_path: Path) -> None:
    """As the library saves them: by dtype, then by name."""
    out = rewritten(quantized, tmp_path / "out", lambda tensors: None)
    tensors = read_output(quantized)
    for number, expert in enumerate(locate(out)):
        assert expert.whole is None
        assert expert.checksum is None
        expected = [stored(tensors[f"{PREFIX}.{number}.{name}"]) for name in ORDER]
        assert [content(part) for part in expert.parts()] == expected
        assert expert.nbytes == sum(map(len, expected))


def test_parts_in_two_files(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    tensors = load_file(quantized / SHARD)
    apart = {f"{PREFIX}.2.up_proj.weight_scale": tensors.pop(f"{PREFIX}.2.up_proj.weight_scale")}
    save_file(tensors, tmp_path / "out" / SHARD, metadata={"format": "pt"})
    save_file(apart, tmp_path / "out" / "more.safetensors", metadata={"format": "pt"})
    index_path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"].update(dict.fromkeys(apart, "more.safetensors"))
    index_path.write_text(json.dumps(index))
    expert = locate(tmp_path / "out")[2]
    assert expert.whole is None
    assert expert.up.scale.file_name == "more.safetensors"
    assert content(expert.up.scale) == stored(*apart.values())


def test_another_order_is_not_ours(quantized: Path, tmp_path: Path) -> None:
    """One range all the same, but who reads it as ours would take gate for up."""
    shutil.copytree(quantized, tmp_path / "out")
    path = tmp_path / "out" / SHARD
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    gate, up = (f"{PREFIX}.2.{part}_proj.weight_packed" for part in ("gate", "up"))
    header[gate], header[up] = header[up], header[gate]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])
    expert = locate(tmp_path / "out")[2]
    assert expert.up.packed.end == expert.gate.packed.offset
    assert expert.whole is None
    assert expert.checksum is None


@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (None, True), (None, False)])
def test_zero_points_and_scales_of_rows(
    group: int | None, symmetric: bool, quantized: Path, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    written: dict[str, Tensor] = {}

    def repack(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith(PREFIX)]:
            del tensors[name]
        for number in range(NUM_EXPERTS):
            for part, shape in (
                ("gate", (INNER, HIDDEN)),
                ("up", (INNER, HIDDEN)),
                ("down", (HIDDEN, INNER)),
            ):
                weight = torch.randn(shape, generator=generator)
                parts, _ = pack_foreign(
                    weight, 4, group, symmetric=symmetric, scale_dtype=torch.float16
                )
                module = f"{PREFIX}.{number}.{part}_proj"
                written.update({f"{module}.{each}": value for each, value in parts.items()})
        tensors.update(written)

    out = rewritten(quantized, tmp_path / "out", repack)
    config = json.loads((out / "config.json").read_text())
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights["symmetric"], weights["group_size"] = symmetric, group
    weights["strategy"] = "group" if group else "channel"
    (out / "config.json").write_text(json.dumps(config))
    for number, expert in enumerate(locate(out)):
        assert expert.whole is None
        assert len(list(expert.parts())) == (6 if symmetric else 9)
        for name, matrix in zip(("gate", "up", "down"), expert.matrices, strict=True):
            module = f"{PREFIX}.{number}.{name}_proj"
            assert matrix.layout.by_row == (group is None)
            assert matrix.layout.scale.dtype == "F16"
            assert content(matrix.packed) == stored(written[f"{module}.weight_packed"])
            assert content(matrix.scale) == stored(written[f"{module}.weight_scale"])
            assert (matrix.zero_point is None) == symmetric
            if matrix.zero_point is not None:
                zero_points = written[f"{module}.weight_zero_point"]
                assert content(matrix.zero_point) == stored(zero_points)


UP = f"{PREFIX}.5.up_proj"
BAD_PARTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], type[LocalR1Error], str]] = {
    "no codes": (lambda t: t.pop(f"{UP}.weight_packed"), TensorError, "packed is missing"),
    "no scale": (lambda t: t.pop(f"{UP}.weight_scale"), TensorError, "scale is missing"),
    "no shape": (lambda t: t.pop(f"{UP}.weight_shape"), TensorError, "shape is missing"),
    "no expert": (
        lambda t: [t.pop(f"{UP}.weight_{part}") for part in ("packed", "scale", "shape")],
        TensorError,
        "found no such matrix",
    ),
    "floats": (
        lambda t: (
            [t.pop(f"{UP}.weight_{part}") for part in ("packed", "scale", "shape")],
            t.update({f"{UP}.weight": torch.zeros(INNER, HIDDEN)}),
        ),
        TensorError,
        "found an unpacked one. Quantize the model",
    ),
    "codes of a narrower matrix": (
        lambda t: t.update({f"{UP}.weight_packed": torch.zeros(INNER, 8, dtype=torch.int32)}),
        TensorError,
        r"I32 \[64, 16\], found I32 \[64, 8\]",
    ),
    "scales of other groups": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(INNER, 2).bfloat16()}),
        TensorError,
        r"\[64, 4\], found BF16 \[64, 2\]",
    ),
    "scales of another type": (
        lambda t: t.update({f"{UP}.weight_scale": torch.ones(INNER, 4, dtype=torch.int32)}),
        TensorError,
        "BF16 or F16 or F32",
    ),
    "another shape": (
        lambda t: t.update({f"{UP}.weight_shape": torch.tensor([HIDDEN, INNER])}),
        TensorError,
        r"I32 \[128, 8\]",
    ),
    "zero points": (
        lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(8, 4, dtype=torch.int32)}),
        TensorError,
        "the scheme is symmetric",
    ),
    "two forms": (
        lambda t: t.update({f"{UP}.weight": torch.zeros(INNER, HIDDEN)}),
        UnsupportedError,
        "second form",
    ),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit(case: str, quantized: Path, tmp_path: Path) -> None:
    change, error, match = BAD_PARTS[case]
    out = rewritten(quantized, tmp_path / "out", change)
    with pytest.raises(error, match=match) as caught:
        locate(out)
    assert UP in str(caught.value)


@pytest.mark.parametrize("sizes", [{"inner_size": 96}, {"hidden_size": 64}])
def test_sizes_that_config_does_not_say(sizes: dict[str, int], quantized: Path) -> None:
    with pytest.raises(TensorError, match=r"expected shape \[.*found \[64, 128\]"):
        locate(quantized, **sizes)


def test_experts_that_are_not_there(quantized: Path) -> None:
    with HuggingFaceDirectory(quantized) as checkpoint:
        locator = ExpertLocator(checkpoint)
        (found,) = locator.locate(PREFIX, [7], inner_size=INNER, hidden_size=HIDDEN)
        assert found == locate(quantized)[7]
        with pytest.raises(TensorError, match=r"experts\.8\.gate_proj.*no such matrix"):
            locator.locate(PREFIX, [8], inner_size=INNER, hidden_size=HIDDEN)


BAD_MANIFESTS: dict[str, tuple[Any, str]] = {
    "no object": ([], "expert_checksums"),
    "no list": ({SHARD: "9f1c0000"}, SHARD),
    "numbers": ({SHARD: [12345678] * 8}, "eight hexadecimal digits"),
    "capitals": ({SHARD: ["9F1C0000"] * 8}, "eight hexadecimal digits"),
    "too long": ({SHARD: ["9f1c00000"] * 8}, "eight hexadecimal digits"),
    "a line more": ({SHARD: ["9f1c0000\n"] * 8}, "eight hexadecimal digits"),
    "too few": ({SHARD: ["9f1c0000"] * 7}, "one of expert 7, found 7 of them"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_damaged_manifest(case: str, quantized: Path, tmp_path: Path) -> None:
    value, match = BAD_MANIFESTS[case]
    shutil.copytree(quantized, tmp_path / "out")
    changed = {**document(quantized), "expert_checksums": value}
    (tmp_path / "out" / "localr1.json").write_text(json.dumps(changed))
    with pytest.raises(FormatError, match=match):
        locate(tmp_path / "out")


@pytest.mark.parametrize("whole", [True, False])
def test_checkpoints_without_checksums(whole: bool, quantized: Path, tmp_path: Path) -> None:
    """Of a version before them, and without localr1.json."""
    shutil.copytree(quantized, tmp_path / "out")
    old = document(quantized)
    del old["expert_checksums"]
    (tmp_path / "out" / "localr1.json").unlink()
    if not whole:
        (tmp_path / "out" / "localr1.json").write_text(json.dumps(old))
    for expert in locate(tmp_path / "out"):
        assert expert.whole is not None
        assert expert.checksum is None


def test_a_scheme_that_is_not_there(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "out")
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="config_groups is empty"):
        locate(tmp_path / "out")
