"""pack-quantized checkpoints of other programs: their values against compressed-tensors' own
decompression, whole models to logits on each kernel backend, and what is refused, by name."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from foreign_packs import PARTS, foreign_checkpoint, pack_foreign
from released_mixtures import KIMI_K2_THINKING
from tiny_models import (
    MemoryCheckpoint,
    prompt,
    run_in_chunks,
    tiny_transformer,
    transformer_logits,
)
from torch import Tensor

from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.quantization_config import parse_quantization_config
from localr1.errors import ConfigError, LocalR1Error, TensorError, UnsupportedError
from localr1.kernels.api import Kernels, PackedWeight
from localr1.kernels.native import NativeKernels
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model, parse_config

PREFIX = "model.layers.0.mlp.up_proj"
INT8_ACTIVATIONS = 0.06
"""Relative to exact arithmetic: int8 activations cost these tiny models up to 0.03; a zero point of
the wrong sign or place costs more than 0.3 (asserted)."""


def llm_compressor(bits: int, group: int | None, *, symmetric: bool, **weights: Any) -> Any:
    """As llm-compressor wrote it in 2024 and 2025, field by field."""
    return {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": group,
                    "num_bits": bits,
                    "observer": "minmax",
                    "observer_kwargs": {},
                    "strategy": "channel" if group is None else "group",
                    "symmetric": symmetric,
                    "type": "int",
                    **weights,
                },
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": 1.8917791164021256,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.10.2",
    }


SCHEMES = [
    (4, 32, True), (4, 64, True), (4, 128, True), (4, None, True), (8, 128, True), (8, None, True),
    (4, 32, False), (4, 64, False), (4, 128, False), (4, None, False), (8, 64, False),
    (5, 32, True), (5, 64, False), (6, 64, True), (6, 32, False),
]  # fmt: skip
every_scheme = pytest.mark.parametrize(("bits", "group", "symmetric"), SCHEMES)


def matrix(rows: int, columns: int) -> Tensor:
    """Off centre, so that zero points differ from zero and from one another."""
    generator = torch.Generator().manual_seed(rows)
    shift = torch.linspace(-2, 2, rows)[:, None] + torch.linspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=generator) + shift


def read(quantization: Any, parts: dict[str, Tensor]) -> PackedWeight:
    tensors = {f"{PREFIX}.{part}": value for part, value in parts.items()}
    config = {"quantization_config": quantization}
    weight = PackedReader(MemoryCheckpoint(config, tensors)).read(PREFIX)
    assert weight is not None
    return weight


def values(weight: PackedWeight) -> Tensor:
    kernels = ReferenceKernels()
    return kernels.embedding(torch.arange(weight.out_features), kernels.prepare(weight))


@every_scheme
@pytest.mark.parametrize("rows", [20, 33])
def test_values_are_those_of_compressed_tensors(
    rows: int, bits: int, group: int | None, symmetric: bool
) -> None:
    """33 rows fill no whole word of zero points. float32 scales, as the library multiplies in their
    type."""
    parts, exact = pack_foreign(
        matrix(rows, 256), bits, group, symmetric=symmetric, scale_dtype=torch.float32
    )
    quantization = llm_compressor(bits, group, symmetric=symmetric)
    scheme = QuantizationScheme.model_validate(quantization["config_groups"]["group_0"])
    theirs = PackedQuantizationCompressor.decompress(
        {part: value.clone() for part, value in parts.items()}, scheme
    )["weight"]
    weight = read(quantization, parts)
    assert weight.scheme.group_size == (group or 128)
    found = values(weight)
    assert torch.equal(found, theirs)
    assert (found - exact).abs().max() <= 1e-6 * exact.abs().max()
    if not symmetric:
        assert weight.zero_point is not None
        assert len(set(weight.zero_point.flatten().tolist())) > 3


BACKENDS = [
    pytest.param(ReferenceKernels, id="reference"),
    pytest.param(partial(NativeKernels, 1), id="native"),
]
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
LENGTH = 24


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def logits(checkpoint: MemoryCheckpoint, kernels: Kernels) -> Tensor:
    return run_in_chunks(load_model(checkpoint, kernels), prompt(0, LENGTH), [15])


@pytest.mark.parametrize("make_kernels", BACKENDS)
@every_scheme
def test_models_of_others_compute(
    bits: int, group: int | None, symmetric: bool, make_kernels: Callable[[], Kernels]
) -> None:
    model_type = "llama" if symmetric else "qwen2"
    model = tiny_transformer(model_type, 0, **SIZES)
    checkpoint = foreign_checkpoint(model, llm_compressor(bits, group, symmetric=symmetric))
    exact = transformer_logits(model, prompt(0, LENGTH))
    assert relative(logits(checkpoint, make_kernels()), exact) < INT8_ACTIVATIONS


def test_a_wrong_zero_point_would_be_seen() -> None:
    model = tiny_transformer("qwen2", 0, **SIZES)
    checkpoint = foreign_checkpoint(model, llm_compressor(4, 32, symmetric=False))
    exact = transformer_logits(model, prompt(0, LENGTH))
    for name in checkpoint.tensors:
        if name.endswith("weight_zero_point"):  # Each nibble 15 - n: the other sign, less one.
            checkpoint.put(name, ~checkpoint.read(name))
    assert relative(logits(checkpoint, ReferenceKernels()), exact) > 0.3


@pytest.mark.parametrize("make_kernels", BACKENDS)
def test_kimi_k2_thinking(make_kernels: Callable[[], Kernels]) -> None:
    """Its config as published, patterns and all, on a tiny model of its architecture."""
    assert parse_config(KIMI_K2_THINKING).moe is not None
    changes = {"hidden_size": 64, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
    model = tiny_transformer("deepseek_v3", 0, **changes)
    checkpoint = foreign_checkpoint(model, KIMI_K2_THINKING["quantization_config"])
    checkpoint.config = {**checkpoint.config, "model_type": "kimi_k2"}
    packed = {name for name in checkpoint.tensors if name.endswith("weight_packed")}
    assert len(packed) == 8 * 3
    assert all(".mlp.experts." in name for name in packed)
    exact = transformer_logits(model, prompt(0, LENGTH))
    assert relative(logits(checkpoint, make_kernels()), exact) < INT8_ACTIVATIONS


def changed(change: Callable[[dict[str, Any]], Any], **weights: Any) -> dict[str, Any]:
    quantization: dict[str, Any] = llm_compressor(4, 32, symmetric=True, **weights)
    change(quantization)
    return quantization


def group_0(quantization: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = quantization["config_groups"]["group_0"]
    return group


def drop_fields(quantization: dict[str, Any]) -> None:
    """What the first versions did not write yet."""
    for key in ("version", "transform_config", "sparsity_config", "global_compression_ratio"):
        del quantization[key]
    for key in ("actorder", "block_structure", "observer", "observer_kwargs", "dynamic", "type"):
        del group_0(quantization)["weights"][key]


SPELLINGS: dict[str, dict[str, Any]] = {
    "as it is": changed(lambda c: None),
    "actorder weight": changed(lambda c: None, actorder="weight"),
    "actorder static": changed(lambda c: None, actorder="static"),
    "actorder false": changed(lambda c: None, actorder=False),
    "observer": changed(lambda c: None, observer="mse", observer_kwargs={"maxshrink": 0.2}),
    "dtypes": changed(lambda c: None, scale_dtype=None, zp_dtype="torch.int8"),
    "few fields": changed(drop_fields),
    "frozen": changed(lambda c: c.update(quantization_status="frozen")),
    "dense": changed(
        lambda c: c.update(
            sparsity_config={
                "format": "dense",
                "global_sparsity": 19.098,
                "ignore": [],
                "registry_requires_subclass": False,
                "sparsity_structure": "unstructured",
                "targets": [],
            }
        )
    ),
    "mixed precision": changed(
        lambda c: (c.update(format="mixed-precision"), group_0(c).update(format="pack-quantized"))
    ),
    "no ignore": changed(lambda c: c.update(ignore=None)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_configs_of_every_version_are_read(name: str) -> None:
    parts, exact = pack_foreign(matrix(8, 64), 4, 32, symmetric=True, scale_dtype=torch.bfloat16)
    assert torch.equal(values(read(SPELLINGS[name], parts)), exact)


NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
W8A8 = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}

REFUSED: dict[str, tuple[dict[str, Any], type[LocalR1Error], str]] = {
    "int-quantized": (
        changed(lambda c: (c.update(format="int-quantized"),
                           group_0(c).update(input_activations=W8A8))),
        UnsupportedError, "expected pack-quantized, found 'int-quantized'",
    ),
    "float-quantized": (
        changed(lambda c: c.update(format="float-quantized"), type="float", num_bits=8),
        UnsupportedError, "found 'float-quantized'",
    ),
    "nvfp4": (
        changed(lambda c: (c.update(format="nvfp4-pack-quantized"),
                           group_0(c).update(weights=NVFP4))),
        UnsupportedError, "found 'nvfp4-pack-quantized'",
    ),
    "a group of another format": (
        changed(lambda c: group_0(c).update(format="float-quantized")),
        UnsupportedError, "found 'float-quantized'",
    ),
    "activations": (
        changed(lambda c: group_0(c).update(input_activations=W8A8)),
        UnsupportedError, "input_activations is not honoured",
    ),
    "outputs": (
        changed(lambda c: group_0(c).update(output_activations=W8A8)),
        UnsupportedError, "output_activations is not honoured",
    ),
    "float weights": (
        changed(lambda c: None, type="float"), UnsupportedError, "type: expected int",
    ),
    "tensor": (
        changed(lambda c: None, strategy="tensor", group_size=None),
        UnsupportedError, "strategy: expected group or channel, found 'tensor'",
    ),
    "block": (
        changed(lambda c: None, strategy="block", block_structure=[128, 128], group_size=None),
        UnsupportedError, "found 'block'",
    ),
    "no strategy": (changed(lambda c: None, strategy=None), UnsupportedError, "strategy"),
    "activation order": (
        changed(lambda c: None, actorder="group"), UnsupportedError, "found 'group'",
    ),
    "group of 16": (changed(lambda c: None, group_size=16), UnsupportedError, "32 or 64 or 128"),
    "group of a channel": (
        changed(lambda c: None, strategy="channel"), ConfigError, "null or -1 with strategy",
    ),
    "3 bits": (changed(lambda c: None, num_bits=3), UnsupportedError, "expected 4 or 5 or 6 or 8"),
    "3 bits a channel": (
        changed(lambda c: None, num_bits=3, strategy="channel", group_size=None),
        UnsupportedError, "expected 4 or 8",
    ),
    "6 bits a channel": (
        changed(lambda c: None, num_bits=6, strategy="channel", group_size=None),
        UnsupportedError, "expected 4 or 8",
    ),
    "sparse": (
        changed(lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"})),
        UnsupportedError, "sparsity_config is not honoured",
    ),
    "cache": (
        changed(lambda c: c.update(kv_cache_scheme={"num_bits": 8, "type": "float"})),
        UnsupportedError, "kv_cache_scheme is not honoured",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name: str) -> None:
    quantization, error, said = REFUSED[name]
    with pytest.raises(error, match=r"config\.json: quantization_config") as caught:
        parse_quantization_config(copy.deepcopy(quantization))
    assert said in str(caught.value)


BAD_PARTS: dict[str, tuple[str, Tensor | None, type[LocalR1Error], str]] = {
    "column order": ("weight_g_idx", torch.zeros(64).int(), UnsupportedError, "reordered columns"),
    "no zeros": ("weight_zero_point", None, TensorError, "expected I32 [3, 2]"),
    "zeros along in": ("weight_zero_point", torch.zeros(20, 1).int(), TensorError, "I32 [3, 2]"),
    "zeros not packed": ("weight_zero_point", torch.zeros(20, 2).int(), TensorError, "I32 [3, 2]"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_do_not_fit_are_refused(name: str) -> None:
    part, value, error, said = BAD_PARTS[name]
    parts, _ = pack_foreign(matrix(20, 64), 4, 32, symmetric=False, scale_dtype=torch.bfloat16)
    assert set(parts) == set(PARTS)
    del parts["weight_zero_point" if value is None else "weight_shape"]
    if value is not None:
        parts |= {"weight_shape": torch.tensor([20, 64]), part: value}
    with pytest.raises(error) as caught:
        read(llm_compressor(4, 32, symmetric=False), parts)
    assert said in str(caught.value)


def test_a_channel_of_odd_columns_is_refused() -> None:
    parts, _ = pack_foreign(matrix(8, 40), 4, None, symmetric=True, scale_dtype=torch.bfloat16)
    with pytest.raises(TensorError, match="divide by the group of 32, found 40"):
        read(llm_compressor(4, None, symmetric=True), parts)
