"""Expert shards: where every byte of an expert lies, and what a mixture must be to be quantized."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_sources import MIXTURES, dequantized, read_output, relative_error, save_source
from released_mixtures import R1
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import Change, drop, put
from torch import Tensor

from localr1.checkpoint.api import TensorInfo
from localr1.checkpoint.dequantized import FP8_TYPE
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import ConfigError, LocalR1Error, TensorError, UnsupportedError
from localr1.qtypes import QuantScheme
from localr1.quant.layout import index_json
from localr1.quant.pipeline import dry_run, plan_files, quantize
from localr1.quant.plan import LeftOut, plan_quantization
from localr1.quant.recipe import MLP, ROUTED_EXPERTS, Recipe, Rule

PAGE = 4096
EXPERTS = "model.layers.1.mlp.experts."
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
PARTS = ("gate_proj", "up_proj", "down_proj")
WEIGHT_ERROR = {4: 0.012, 8: 6e-5}
"""Relative squared error of a matrix (test_quant_portable); another matrix has an error of 2."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "source"
    save_source(folder, "deepseek_v3", **MIXTURES["deepseek_v3"])
    return folder


def changed(source: Path, folder: Path, change: Change, **config: Any) -> Path:
    """A copy of a source with other tensors or fields."""
    shutil.copytree(source, folder)
    document = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**document, **config}))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def weights_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def raw_header(path: Path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where the data begins, and the range of each tensor in the file, read without any library."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    del header["__metadata__"]
    begin = 8 + length
    ranges = {name: entry["data_offsets"] for name, entry in header.items()}
    return begin, {name: (begin + start, begin + end) for name, (start, end) in ranges.items()}


@pytest.mark.parametrize(
    ("inner", "bits", "on_pages"), [(64, 4, False), (96, 8, False), (512, 4, True)]
)
def test_an_expert_is_one_range_of_bytes(
    inner: int, bits: int, on_pages: bool, tmp_path: Path
) -> None:
    sizes = {**MIXTURES["deepseek_v3"], "moe_intermediate_size": inner}
    save_source(tmp_path / "source", "deepseek_v3", **sizes)
    quantize(tmp_path / "source", tmp_path / "out", Recipe.uniform(bits, 32))
    path = tmp_path / "out" / "experts-001.safetensors"
    begin, ranges = raw_header(path)
    size = 3 * 128 * inner * (2 * bits + 1) // 16  # Half a bit a weight for its group's scale.
    assert begin % PAGE == 0
    assert (size % PAGE == 0) == on_pages
    for expert in range(8):
        start = begin + expert * size
        assert start % PAGE == 0 or not on_pages
        for suffix in ("weight_packed", "weight_scale"):
            for part in PARTS:
                first, start_of_next = ranges.pop(f"{EXPERTS}{expert}.{part}.{suffix}")
                assert first == start, f"{expert} {part} {suffix}"
                start = start_of_next
        assert start == begin + (expert + 1) * size
    behind = begin + 8 * size
    shapes = [f"{EXPERTS}{expert}.{part}.weight_shape" for expert in range(8) for part in PARTS]
    assert ranges == {
        name: (behind + 16 * place, behind + 16 * place + 16) for place, name in enumerate(shapes)
    }
    assert behind % 8 == 0
    assert path.stat().st_size == behind + 16 * len(shapes)


def test_the_library_finds_in_a_shard_what_the_source_holds(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", Recipe.uniform(4, 32))
    with safe_open(tmp_path / "out" / "experts-001.safetensors", framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a dict
    assert len(stored) == 8 * 3 * 3
    assert {name.startswith(EXPERTS) for name in stored} == {True}
    original = load_file(source / "model.safetensors")
    weights = dequantized(read_output(tmp_path / "out"))
    assert weights.keys() == original.keys()
    for name, value in weights.items():
        packed = not name.endswith(("norm.weight", "bias", ".kv_b_proj.weight", ".gate.weight"))
        packed = packed and name != "model.embed_tokens.weight"
        bits = 4 if name.startswith(EXPERTS) else 8
        error = relative_error(original[name].float(), value)
        assert (0 < error < WEIGHT_ERROR[bits]) if packed else error == 0, name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    homes = {file for name, file in index["weight_map"].items() if name.startswith(EXPERTS)}
    assert homes == {"experts-001.safetensors"}
    assert set(index["weight_map"].values()) == homes | {"dense-00001-of-00001.safetensors"}


def test_the_order_of_the_source_does_not_matter(source: Path, tmp_path: Path) -> None:
    """Tensors backwards, over three files."""
    quantize(source, tmp_path / "a", Recipe.uniform(4, 32))
    spread = tmp_path / "spread"
    shutil.copytree(source, spread)
    tensors = load_file(spread / "model.safetensors")
    (spread / "model.safetensors").unlink()
    names = sorted(tensors, reverse=True)
    homes = {name: f"model-{place % 3}.safetensors" for place, name in enumerate(names)}
    for file_name in set(homes.values()):
        part = {name: tensors[name] for name in names if homes[name] == file_name}
        save_file(part, spread / file_name, metadata={"format": "pt"})
    (spread / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    quantize(spread, tmp_path / "b", Recipe.uniform(4, 32))
    assert weights_of(tmp_path / "a") == weights_of(tmp_path / "b")


def test_the_router_keeps_what_decides_the_choice(source: Path, tmp_path: Path) -> None:
    """In float32 where it is stored so; DeepSeek releases its bias in float32 beside FP8."""
    gate = torch.randn(8, 128)
    gate_name = "model.layers.1.mlp.gate.weight"
    wide = changed(source, tmp_path / "wide", put(gate_name, gate))
    for folder, expected in ((source, torch.bfloat16), (wide, torch.float32)):
        out = tmp_path / f"{expected}"
        quantize(folder, out, Recipe.uniform(4, 32))
        stored, original = read_output(out), load_file(folder / "model.safetensors")
        assert stored[gate_name].dtype == expected
        assert torch.equal(stored[gate_name], original[gate_name])
        assert stored[BIAS].dtype == torch.float32
        assert torch.equal(stored[BIAS], original[BIAS])
        assert not torch.equal(original[BIAS], original[BIAS].bfloat16().float())


def with_prediction_layer(tensors: dict[str, Tensor]) -> None:
    """As R1 stores it: one layer more, whose experts bear the names of experts."""
    extra = {
        name.replace("layers.1.", "layers.2."): value.clone()
        for name, value in tensors.items()
        if "layers.1." in name
    }
    tensors.update(extra)
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(128, 256).bfloat16()
    tensors["model.layers.2.shared_head.head.weight"] = torch.ones(300, 128).bfloat16()


def test_prediction_layers_are_left_out(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "plain", Recipe.uniform(4, 32))
    extended = changed(source, tmp_path / "source", with_prediction_layer)
    report = quantize(extended, tmp_path / "out", Recipe.uniform(4, 32))
    assert report.left_out is not None
    assert (report.left_out.mtp_layers, report.left_out.tensors) == (1, 40)
    assert weights_of(tmp_path / "out") == weights_of(tmp_path / "plain")
    assert json.loads((extended / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    )
    manifest = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert LeftOut(**manifest["left_out"]) == report.left_out
    assert quantize(source, tmp_path / "again", Recipe.uniform(4, 32)).left_out is None


def test_the_errors_of_experts_are_told_in_sum(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", Recipe.uniform(4, 32))
    manifest = json.loads((tmp_path / "out" / "localr1.json").read_text())
    assert not any(".experts." in name for name in manifest["tensors"])
    assert [row["matrix"] for row in manifest["experts"]] == list(PARTS)
    for row in manifest["experts"]:
        errors = [
            tensor.relative_error
            for tensor in report.tensors
            if EXPERTS in tensor.name and tensor.name.endswith(row["matrix"])
        ]
        assert row["layer"] == "model.layers.1"
        assert row["scheme"] == "int4-g32"
        assert row["largest_error"] == max(error for error in errors if error is not None)
        assert 0 < row["relative_error"] <= row["largest_error"] < WEIGHT_ERROR[4]


FUSED = torch.zeros(8, 128, 128, dtype=torch.bfloat16)
ONE = torch.zeros(64, 128, dtype=torch.bfloat16)
WRONG: dict[str, tuple[Change, dict[str, Any], type[LocalR1Error], str]] = {
    "missing": (
        drop(EXPERTS + "5.up_proj.weight"), {}, TensorError, r"5\.up_proj.*found no such tensor"
    ),
    "fused and separate": (
        put(EXPERTS + "gate_up_proj", FUSED), {}, TensorError, "gate_up_proj.*would be ignored"
    ),
    "two names": (put(EXPERTS + "05.up_proj.weight", ONE), {}, TensorError, r"05\.up_proj"),
    "one too many": (put(EXPERTS + "8.up_proj.weight", ONE), {}, TensorError, r"8\.up_proj"),
    "in a dense layer": (
        put("model.layers.0.mlp.experts.0.up_proj.weight", ONE), {}, TensorError, "layers.0.mlp"
    ),
    "shape": (
        put(EXPERTS + "3.down_proj.weight", ONE), {}, TensorError,
        r"3\.down_proj.weight: expected shape \[128, 64\], found \[64, 128\]",
    ),
    "fewer than top-k": (
        lambda tensors: None, {"num_experts_per_tok": 9}, ConfigError, "num_experts_per_tok"
    ),
    "fewer than announced": (
        lambda tensors: None, {"n_routed_experts": 16}, TensorError, r"experts\.8\.gate_proj"
    ),
    "bias of another size": (put(BIAS, torch.ones(9)), {}, TensorError, "parameters in all"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_experts_that_do_not_fit_the_config(case: str, source: Path, tmp_path: Path) -> None:
    change, config, error, message = WRONG[case]
    bad = changed(source, tmp_path / "bad", change, **config)
    with pytest.raises(error, match=message):
        quantize(bad, tmp_path / "out", Recipe.uniform(4, 32))
    assert os.listdir(tmp_path) == ["bad"]


def rules(*wanted: tuple[str, int]) -> Recipe:
    """(pattern, bits) each."""
    return Recipe(tuple(Rule(pattern, pattern, QuantScheme(bits, 32)) for pattern, bits in wanted))


NOT_PORTABLE: dict[str, tuple[Recipe, str]] = {
    "bits by layer": (
        rules((r".*layers\.0\.mlp\.experts\..*", 8), (ROUTED_EXPERTS, 4)), "int4-g32 and int8-g32"
    ),
    "bits by matrix": (
        rules((r".*\.experts\.\d+\.down_proj$", 8), (r".*\.experts\.\d+\.(gate|up)_proj$", 4)),
        "one scheme for all routed experts",
    ),
    "kv_b_proj": (rules((ROUTED_EXPERTS, 4), (r".*kv_b_proj$", 8)), "packed kv_b_proj"),
    "q_a and kv_a": (
        rules((ROUTED_EXPERTS, 4), (r".*\.q_a_proj$", 8), (r".*kv_a_proj_with_mqa$", 4)),
        "one scheme for q_a_proj and kv_a_proj_with_mqa",
    ),
    "shared by name": (
        rules((ROUTED_EXPERTS, 4), (r".*shared_experts\.\w+_proj$", 8)),
        "layers.0.mlp.shared_experts.down_proj as int4-g32",
    ),
    "experts without the word": (
        rules((r".*\.\d+\.(gate|up|down)_proj$", 4), (r".*shared_experts\.\w+_proj$", 8)),
        "routed experts as int8-g32",
    ),
    "embedding": (Recipe.uniform(4, 32, embedding_bits=8), "packed embeddings"),
}  # fmt: skip


@pytest.fixture(scope="module")
def two_mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtures") / "source"
    sizes = {**MIXTURES["deepseek_v3"], "n_routed_experts": 4, "first_k_dense_replace": 0}
    save_source(folder, "deepseek_v3", **{**sizes, "num_experts_per_tok": 2, "n_group": 1,
                                          "topk_group": 1})  # fmt: skip
    return folder


@pytest.mark.parametrize("case", NOT_PORTABLE)
def test_what_other_runtimes_do_not_load_is_marked(case: str, two_mixtures: Path) -> None:
    recipe, reason = NOT_PORTABLE[case]
    (found,) = dry_run(two_mixtures, recipe).reasons_not_portable
    assert reason in found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "others",
    [{}, {"attention_bits": 4, "shared_bits": 16, "head_bits": 16}, {"shared_bits": 4}],
)
def test_what_they_load_is_not(bits: int, others: dict[str, Any], two_mixtures: Path) -> None:
    assert not dry_run(two_mixtures, Recipe.uniform(bits, 32, **others)).reasons_not_portable


def test_the_groups_of_a_mixture(source: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        config = plan_quantization(
            checkpoint, Recipe.uniform(8, 32, shared_bits=4)
        ).quantization_config
        default = plan_quantization(checkpoint, Recipe.uniform(4, 32)).quantization_config
    first, second = default["config_groups"].values()
    assert first["targets"] == [r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"]
    assert (first["weights"]["num_bits"], second["weights"]["num_bits"]) == (4, 8)
    assert not any("experts" in target for target in second["targets"])
    assert r"re:.*mlp\.shared_[a-z]+\.(gate|up|down)_proj$" in second["targets"]
    assert sorted(default["ignore"]) == [
        "model.layers.0.self_attn.kv_b_proj",
        "model.layers.1.mlp.gate",
        "model.layers.1.self_attn.kv_b_proj",
    ]
    # A group of their own also where others share their scheme: dequantize=True takes the first
    # group without experts for all that are none, and must not find the 4-bit one.
    groups = list(config["config_groups"].values())
    assert [group["weights"]["num_bits"] for group in groups] == [8, 8, 4]
    assert ["experts" in "".join(group["targets"]) for group in groups] == [True, False, False]


def test_recipes_that_no_loader_would_apply(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"experts\.0\.gate_proj: expected routed experts"):
        dry_run(source, rules((MLP, 4)))
    save_source(tmp_path / "dense")
    overlapping = rules((r".*mlp\.(gate|up)_proj$", 4), (MLP, 8))
    with pytest.raises(UnsupportedError, match=r"gate_proj: .*int4-g32.*found one of int8-g32"):
        dry_run(tmp_path / "dense", overlapping)


class Announced:
    """The headers of a checkpoint, without one weight."""

    format = "safetensors"
    path = Path("announced")

    def __init__(self, config: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> None:
        self.config = config
        self.tensors = {
            name: TensorInfo(name, FP8_TYPE if len(shape) == 2 else "F32", shape, 1)
            for name, shape in tensors.items()
        }


def tensors_of_r1() -> dict[str, tuple[int, ...]]:
    """Name -> shape, as released: 61 layers and the one for prediction."""
    hidden, heads = 7168, 128
    found: dict[str, tuple[int, ...]] = {}

    def add_mlp(name: str, inner: int) -> None:
        found[f"{name}.gate_proj.weight"] = (inner, hidden)
        found[f"{name}.up_proj.weight"] = (inner, hidden)
        found[f"{name}.down_proj.weight"] = (hidden, inner)

    for layer in range(62):
        prefix = f"model.layers.{layer}"
        found |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_a_proj.weight": (1536, hidden),
            f"{prefix}.self_attn.q_a_layernorm.weight": (1536,),
            f"{prefix}.self_attn.q_b_proj.weight": (heads * 192, 1536),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (576, hidden),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (512,),
            f"{prefix}.self_attn.kv_b_proj.weight": (heads * 256, 512),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * 128),
        }
        if layer < 3:
            add_mlp(f"{prefix}.mlp", 18432)
            continue
        found[f"{prefix}.mlp.gate.weight"] = (256, hidden)
        found[f"{prefix}.mlp.gate.e_score_correction_bias"] = (256,)
        add_mlp(f"{prefix}.mlp.shared_experts", 2048)
        for expert in range(256):
            add_mlp(f"{prefix}.mlp.experts.{expert}", 2048)
    found["model.layers.61.eh_proj.weight"] = (hidden, 2 * hidden)
    return found | {
        "model.embed_tokens.weight": (129280, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (129280, hidden),
    }


SECONDS_FOR_R1 = 15.0
"""Of processor time; measured: 4. Anything quadratic in its 44,544 matrices takes minutes."""


def test_r1_is_planned_at_once() -> None:
    config = {key: value for key, value in R1.items() if key != "quantization_config"}
    checkpoint: Any = Announced(config, tensors_of_r1())
    begin = time.process_time()
    plan = plan_quantization(checkpoint, Recipe.uniform(4, 32))
    files = plan_files(plan)
    index = index_json(files)
    done = sum(plan.source_nbytes for _ in plan.items)  # As the progress line asks for it.
    assert time.process_time() - begin < SECONDS_FOR_R1
    assert done > 0
    assert plan.left_out is not None
    assert plan.left_out.mtp_layers == 1
    assert not plan.reasons_not_portable
    shards = [file for file in files if file.file_name.startswith("experts-")]
    assert [file.file_name for file in shards] == [
        f"experts-{layer:03d}.safetensors" for layer in range(3, 61)
    ]
    expert = 3 * 2048 * 7168 * 9 // 16  # 4.5 bits a weight.
    assert expert % PAGE == 0
    for number in (0, 1, 255):
        name = f"model.layers.60.mlp.experts.{number}.gate_proj.weight_packed"
        assert shards[-1].offsets[name] == len(shards[-1].header) + number * expert
    assert len(shards[-1].header) % PAGE == 0
    assert shards[-1].nbytes == len(shards[-1].header) + 256 * (expert + 3 * 16)
    weight_map: Any = index["weight_map"]
    assert len(weight_map) == 3 * len(plan.items) - 2 * sum(
        item.rule is None for item in plan.items
    )
    assert 4.6 < 8 * plan.nbytes / plan.parameters < 4.65
