"""What lies where, and that it is what the loader and the quantizer make of it."""

from typing import Any

import pytest
import torch
from quant_sources import MIXTURES, SIZES
from released_configs import R1_0528_QWEN3_8B, R1_DISTILL_QWEN_7B, RELEASED
from released_mixtures import KIMI_K2, KIMI_K2_THINKING, QWEN3_30B_A3B, R1, V2_LITE
from tiny_models import CLASSES, MemoryCheckpoint, tiny_transformer

from localr1.engine.engine import DEFAULT_CHUNK
from localr1.experts import footprint, workspace
from localr1.experts.footprint import Footprint, dense_bytes, measure
from localr1.experts.placement import (
    DEFAULT_CONTEXT,
    LEAST_MARGIN,
    Memory,
    default_budget,
    least_slots,
    place,
)
from localr1.kernels.api import PackedWeight
from localr1.kernels.native import NativeKernels, available_isas
from localr1.layers import mla, rope
from localr1.models.registry import parse_config
from localr1.models.tensor_list import tensor_kinds, tensor_shapes
from localr1.qtypes import QuantScheme
from localr1.quant.forecast import forecast_of_plan, forecast_quantized, forecast_released
from localr1.quant.plan import plan_quantization
from localr1.quant.recipe import Recipe

GIB = 1 << 30


def footprint_of(config: dict[str, Any], bits: int = 4) -> Footprint:
    forecast = forecast_quantized(config, Recipe.uniform(bits, 32))
    return measure(forecast.tensors, forecast.config)


def released_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    """DeepSeek's bias on the choice is float32, whatever the weights are."""
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].float()


@pytest.mark.parametrize("model_type", CLASSES)
def test_the_list_of_tensors_is_that_of_the_real_model(model_type: str) -> None:
    for changes in ({}, {"tie_word_embeddings": True}, {"attention_bias": True}):
        if changes == {"attention_bias": True} and model_type in ("qwen2", "deepseek_v2"):
            continue
        checkpoint = MemoryCheckpoint.of(tiny_transformer(model_type, 0, **changes))
        found = {info.name: info.shape for info in checkpoint.tensors.values()}
        assert tensor_shapes(parse_config(checkpoint.config)) == found


@pytest.mark.parametrize("config", [*RELEASED.values(), R1, V2_LITE, QWEN3_30B_A3B, KIMI_K2])
def test_kinds_stand_for_all_tensors(config: dict[str, Any]) -> None:
    model = parse_config(config)
    shapes = tensor_shapes(model)
    kinds = tensor_kinds(model)
    assert sum(count for _, count in kinds.values()) == len(shapes)
    assert all(shapes[name] == shape for name, (shape, _) in kinds.items())
    total = sum(count * torch.Size(shape).numel() for shape, count in kinds.values())
    assert total == model.parameter_count


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", *MIXTURES])
def test_the_forecast_is_the_quantizers_plan(model_type: str, bits: int) -> None:
    for tied in (False, True):
        changes = {**SIZES, **MIXTURES.get(model_type, {}), "tie_word_embeddings": tied}
        model = tiny_transformer(model_type, 0, **changes).bfloat16()
        source = MemoryCheckpoint.of(model, released_dtypes)
        recipe = Recipe.uniform(bits, 64 if bits == 8 and model_type == "llama" else 32)
        plan = plan_quantization(source, recipe)
        forecast = forecast_quantized(source.config, recipe)
        assert forecast.nbytes == plan.nbytes
        assert forecast.config.tie_embeddings == plan.tied
        listed = forecast_of_plan(plan, forecast.config)
        layers, others = dense_bytes(forecast.tensors, forecast.config)
        assert (layers, others) == dense_bytes(listed.tensors, forecast.config)
        assert sum(layers) + others == measure(listed.tensors, forecast.config).dense


def test_the_sizes_of_released_models() -> None:
    """Those of the sizes' formula: bits 4.5 and 8.5 with a 16-bit scale for 32 weights."""
    r1 = footprint_of(R1)
    assert r1.expert == 3 * 7168 * 2048 * 4.5 / 8 == 24_772_608
    assert r1.num_experts == 58 * 256
    assert r1.experts == pytest.approx(368e9, rel=0.001)
    assert r1.routed_per_token == pytest.approx(11.5e9, rel=0.001)
    assert r1.embedding == 129280 * 7168 * 2
    assert r1.cache_per_token == 61 * 576 * 2
    assert r1.weights == pytest.approx(388e9, rel=0.001)
    lite, qwen = footprint_of(V2_LITE), footprint_of(QWEN3_30B_A3B)
    assert (lite.num_experts, lite.expert) == (26 * 64, 4_866_048)
    assert (qwen.num_experts, qwen.expert) == (48 * 128, 2_654_208)
    dense = footprint_of(R1_DISTILL_QWEN_7B)
    assert (dense.num_experts, dense.expert, dense.routed_per_token) == (0, 0, 0)
    assert dense.weights == pytest.approx(5.75e9, rel=0.01)
    assert footprint_of(R1, 8).expert == 3 * 7168 * 2048 * 8.5 / 8


def test_a_packed_release_is_measured_as_it_is() -> None:
    forecast = forecast_released(KIMI_K2_THINKING)
    kimi = measure(forecast.tensors, forecast.config)
    assert (kimi.num_experts, kimi.expert) == (60 * 384, 24_772_608)
    # Its attention is left in 16 bits, which localr1 widens.
    assert not kimi.packed.attention
    assert kimi.cache_per_token == 61 * 576 * 4
    assert kimi.dense > 2 * footprint_of(KIMI_K2).dense


def test_modules_of_a_kind_that_are_packed_otherwise() -> None:
    """A target that names a layer sends every module through its own look-up."""
    quantization = KIMI_K2_THINKING["quantization_config"]
    ignore = [*quantization["ignore"], "re:.*layers\\.1\\.mlp\\.experts.*"]
    config = {**V2_LITE, "quantization_config": {**quantization, "ignore": ignore}}
    forecast = forecast_released(config)
    assert sum(count for _, count in forecast.tensors) == len(forecast.tensors)
    whole = forecast_released({**V2_LITE, "quantization_config": quantization})
    expert = 3 * 2048 * 1408
    assert forecast.nbytes - whole.nbytes == 64 * (expert * 2 - expert * 4.5 / 8 - 3 * 16)
    # A layer of floats beside packed ones: they do not go into slots of one size.
    mixed = measure(forecast.tensors, forecast.config)
    assert mixed.num_experts == 0


def test_floats_and_experts_that_cannot_be_moved() -> None:
    model = parse_config(V2_LITE)
    forecast = forecast_released(V2_LITE)
    floats = measure(forecast.tensors, forecast.config)
    table = model.vocab_size * model.hidden_size
    assert floats.weights == 4 * (model.parameter_count - table) + 2 * table
    assert floats.num_experts == floats.routed_per_token == 0
    resident = footprint_of(V2_LITE).all_resident()
    assert resident.weights == footprint_of(V2_LITE).weights
    assert resident.num_experts == 0


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(
    ("rows", "columns", "bits", "group", "zeros"),
    [(48, 64, 4, 32, False), (33, 128, 8, 64, True), (576, 256, 4, 128, True)],
)
def test_the_blocked_layout_is_that_of_the_native_code(
    isa: str,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    zeros: bool,
) -> None:
    scheme = QuantScheme(bits, group, symmetric=not zeros)
    groups, words = columns // group, scheme.packed_words(columns)
    weight = PackedWeight(
        packed=torch.zeros(rows, words, dtype=torch.int32),
        scale=torch.ones(rows, groups, dtype=torch.bfloat16),
        zero_point=torch.zeros(rows, groups, dtype=torch.int8) if zeros else None,
        scheme=scheme,
        out_features=rows,
        in_features=columns,
    )
    block_rows = (16 if isa == "avx512vnni" else 8,)
    planned = footprint.blocked_bytes(rows, words, groups, 2, zeros=zeros, block_rows=block_rows)
    assert planned == NativeKernels(1, isa).prepare(weight).nbytes


def test_the_figures_of_the_workspace_are_those_of_the_code() -> None:
    assert workspace.PREFILL_CHUNK == DEFAULT_CHUNK
    assert workspace.FIRST_ROPE_ROWS == rope.INITIAL_POSITIONS
    assert workspace.LATENT_WORKING_VALUES == mla.WORKING_VALUES
    assert workspace.LATENT_POSITIONS == mla.EXPANDED_POSITIONS


def test_all_of_a_small_model_is_in_memory() -> None:
    lite = footprint_of(V2_LITE)
    placement = place(lite, Memory(ram=16 * GIB), threads=8)
    assert placement.fits
    assert placement.vram is None
    assert placement.context == DEFAULT_CONTEXT
    assert (placement.experts_in_ram, placement.experts_on_disk) == (lite.num_experts, 0)
    ram = placement.ram
    assert ram.needed + ram.experts + ram.free == ram.budget
    assert ram.weights >= lite.dense + lite.embedding
    assert ram.cache == DEFAULT_CONTEXT * lite.cache_per_token
    assert placement.largest_context == lite.config.max_positions


def test_what_does_not_fit_is_on_disk_and_what_must_fit_is_short() -> None:
    r1 = footprint_of(R1)
    placement = place(r1, Memory(ram=62 * GIB), 4096, threads=16)
    assert placement.fits
    assert 0 < placement.experts_in_ram < r1.num_experts
    assert placement.experts_on_disk == r1.num_experts - placement.experts_in_ram
    assert 0 <= placement.ram.free < r1.expert
    short = place(r1, Memory(ram=16 * GIB), 4096, threads=16)
    assert not short.fits
    assert short.largest_context == 0
    assert short.ram.slots == least_slots(r1) == 16
    assert short.short == {"ram": short.ram.needed + 16 * r1.expert - 16 * GIB}


def test_the_device_holds_what_every_token_reads() -> None:
    r1 = footprint_of(R1)
    placement = place(r1, Memory(ram=62 * GIB, vram=23 * GIB), threads=16)
    assert placement.fits
    assert placement.vram is not None
    assert placement.vram.weights >= r1.dense
    assert placement.vram.cache == r1.cache(placement.context)
    assert 0 < placement.experts_in_vram < placement.experts_in_ram
    # Main memory has all of that too, as a device may fail; but of its experts none but these.
    alone = place(r1, Memory(ram=62 * GIB), placement.context, threads=16)
    assert placement.ram == alone.ram
    assert placement.experts_in_ram == placement.ram.slots
    held = placement.experts_in_vram + placement.experts_in_ram
    assert held + placement.experts_on_disk == r1.num_experts
    without = place(r1, Memory(ram=62 * GIB, vram=11 * GIB), threads=16)
    assert set(without.short) == {"vram"}
    # Where main memory holds every expert, the device's are copies of them.
    lite = place(footprint_of(V2_LITE), Memory(ram=32 * GIB, vram=6 * GIB))
    assert lite.experts_in_vram + lite.experts_in_ram == 26 * 64
    assert lite.ram.slots == 26 * 64


@pytest.mark.parametrize("config", [R1, QWEN3_30B_A3B, R1_0528_QWEN3_8B])
def test_the_largest_context_is_the_last_that_fits(config: dict[str, Any]) -> None:
    model = footprint_of(config)
    longest = model.config.max_positions
    least = place(model, Memory(ram=1 << 50), 512, threads=4).ram.needed
    most = place(model, Memory(ram=1 << 50), longest, threads=4).ram.needed
    for share in (0.02, 0.5, 0.9):
        budget = least + least_slots(model) * model.expert + int(share * (most - least))
        largest = place(model, Memory(ram=budget), 512, threads=4).largest_context
        assert 512 <= largest < longest
        assert place(model, Memory(ram=budget), largest, threads=4).fits
        assert not place(model, Memory(ram=budget), largest + 1, threads=4).fits
        chosen = place(model, Memory(ram=budget), None, threads=4)
        assert chosen.context == min(largest, DEFAULT_CONTEXT)


def test_the_workspace_grows_with_context_and_threads() -> None:
    for config in (R1, V2_LITE, QWEN3_30B_A3B, R1_DISTILL_QWEN_7B):
        model = footprint_of(config)
        sizes = [model.workspace(context, 8).nbytes for context in (16, 512, 5000, 30000)]
        assert sizes == sorted(sizes)
        assert model.workspace(5000, 64).nbytes > sizes[2]


def test_the_default_budget_leaves_a_margin() -> None:
    assert default_budget(8 * GIB) == 8 * GIB - LEAST_MARGIN
    assert default_budget(64 * GIB) == 62 * GIB
    assert default_budget(64 * GIB, held=GIB) == 63 * GIB
    assert default_budget(LEAST_MARGIN // 2) == 0
