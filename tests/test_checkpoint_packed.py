"""Packed matrices: the bytes, which module gets which scheme, and all that must be refused."""

import contextlib
import re
import time
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from localr1.checkpoint import name_patterns
from localr1.checkpoint.api import Checkpoint, TensorInfo
from localr1.checkpoint.name_patterns import MAX_PATTERN_LENGTH, matches
from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.quantization_config import QuantizationConfig, parse_quantization_config
from localr1.errors import LocalR1Error, NumericsError, TensorError, UnsupportedError
from localr1.kernels.api import PackedWeight
from localr1.kernels.codes import unpack_codes
from localr1.qtypes import CARD_BITS, SUPPORTED_BITS, QuantScheme

PREFIX = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUP = 6, 64, 32
DTYPE_NAMES = {torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16", torch.float32: "F32"}


class FakeCheckpoint:
    """Tensors in memory under a config."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.values = tensors
        self.tensors = {
            name: TensorInfo(name, DTYPE_NAMES[value.dtype], tuple(value.shape), value.nbytes)
            for name, value in tensors.items()
        }

    def read(self, name: str) -> Tensor:
        return self.values[name]


def quantization_config(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": GROUP,
                    "dynamic": False,
                    **weights,
                },
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        },
    }


def packed_tensors(bits: int = 4, *, asymmetric: bool = False) -> dict[str, Tensor]:
    """As the compressed-tensors library packs random codes."""
    generator = torch.Generator().manual_seed(bits)
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    zeros = torch.randint(low, high, (ROWS, COLUMNS // GROUP), generator=generator)
    tensors = {
        "codes": codes,
        "zeros": zeros.to(torch.int8),
        f"{PREFIX}.weight_packed": pack_to_int32(codes, bits),
        f"{PREFIX}.weight_scale": torch.randn(ROWS, COLUMNS // GROUP).bfloat16(),
        f"{PREFIX}.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    if asymmetric:
        tensors[f"{PREFIX}.weight_zero_point"] = pack_to_int32(
            zeros.to(torch.int8), bits, packed_dim=0
        ).contiguous()
    return tensors


def read(
    config: Any,
    tensors: dict[str, Tensor],
    prefix: str = PREFIX,
    numbers_of_bits: tuple[int, ...] = SUPPORTED_BITS,
) -> PackedWeight | None:
    stored = {name: value for name, value in tensors.items() if "." in name}
    document = {} if config is None else {"quantization_config": config}
    checkpoint = cast(Checkpoint, FakeCheckpoint(document, stored))
    return PackedReader(checkpoint, numbers_of_bits).read(prefix)


def test_the_bytes_are_those_of_the_format() -> None:
    four = torch.tensor([0x10, 0x32, 0x54, 0x76], dtype=torch.uint8).view(torch.int32)
    assert unpack_codes(four.view(1, 1), 4, 8).tolist() == [[-8, -7, -6, -5, -4, -3, -2, -1]]
    eight = torch.tensor([0x00, 0x01, 0x80, 0xFF], dtype=torch.uint8).view(torch.int32)
    assert unpack_codes(eight.view(1, 1), 8, 4).tolist() == [[-128, -127, 0, 127]]
    # 63, 0, 1, 32, then 2 and 1, which lies in two words.
    six = torch.tensor([0x3F, 0x10, 0x80, 0x42, 0, 0, 0, 0], dtype=torch.uint8).view(torch.int32)
    assert unpack_codes(six.view(1, 2), 6, 6).tolist() == [[31, -32, -31, 0, -30, -31]]


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 96])
def test_unpacking_equals_the_library(bits: int, columns: int) -> None:
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    codes = torch.randint(low, high, (5, columns), dtype=torch.int8)
    packed = pack_to_int32(codes, bits)
    expected = unpack_from_int32(packed, bits, torch.Size(codes.shape))
    unpacked = unpack_codes(packed, bits, columns)
    assert torch.equal(unpacked, codes)
    assert torch.equal(unpacked, expected)
    assert unpacked.dtype == torch.int8
    assert unpacked.is_contiguous()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("known", [SUPPORTED_BITS, CARD_BITS])
def test_a_packed_matrix_is_read(bits: int, asymmetric: bool, known: tuple[int, ...]) -> None:
    """What whoever computes does not know comes as the same values in 8 bits."""
    tensors = packed_tensors(bits, asymmetric=asymmetric)
    config = quantization_config(num_bits=bits, symmetric=not asymmetric)
    weight = read(config, tensors, numbers_of_bits=known)
    assert weight is not None
    assert (weight.out_features, weight.in_features) == (ROWS, COLUMNS)
    held = bits if bits in known else 8
    assert (weight.scheme.bits, weight.scheme.group_size) == (held, GROUP)
    assert torch.equal(unpack_codes(weight.packed, held, COLUMNS), tensors["codes"])
    assert torch.equal(weight.scale, tensors[f"{PREFIX}.weight_scale"])
    if asymmetric:
        assert weight.zero_point is not None
        assert torch.equal(weight.zero_point, tensors["zeros"])
        assert weight.zero_point.is_contiguous()
    else:
        assert weight.zero_point is None


def test_the_config_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[object] = []

    def count(document: object) -> QuantizationConfig:
        parsed.append(document)
        return parse_quantization_config(document)

    monkeypatch.setattr("localr1.checkpoint.packed.parse_quantization_config", count)
    stored = {name: value for name, value in packed_tensors().items() if "." in name}
    document = {"quantization_config": quantization_config()}
    reader = PackedReader(cast(Checkpoint, FakeCheckpoint(document, stored)))
    for _ in range(3):
        assert reader.read(PREFIX) is not None
    assert len(parsed) == 1


def test_an_unpacked_module_is_none() -> None:
    assert read(quantization_config(), {f"{PREFIX}.weight": torch.zeros(2, 2)}) is None
    assert read(None, {}) is None


def _without(part: str) -> Callable[[dict[str, Tensor]], None]:
    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{PREFIX}.{part}"]

    return remove


def _put(part: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({f"{PREFIX}.{part}": value})


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], None], type[LocalR1Error], str]] = {
    "no scale": (_without("weight_scale"), TensorError, "weight_scale"),
    "no shape": (_without("weight_shape"), TensorError, "weight_shape"),
    "only scales": (_without("weight_packed"), TensorError, "weight_packed"),
    "scale count": (_put("weight_scale", torch.ones(ROWS, 3).bfloat16()), TensorError, "[6, 2]"),
    "scale rows": (_put("weight_scale", torch.ones(5, 2).bfloat16()), TensorError, "[6, 2]"),
    "scale dtype": (_put("weight_scale", torch.ones(ROWS, 2).int()), TensorError, "I32"),
    "packed dtype": (_put("weight_packed", torch.ones(ROWS, 8).long()), TensorError, "I64"),
    "packed width": (_put("weight_packed", torch.ones(ROWS, 16).int()), TensorError, "[6, 8]"),
    "negative shape": (_put("weight_shape", torch.tensor([-6, 64])), TensorError, "above 0"),
    "huge shape": (_put("weight_shape", torch.tensor([6, 1 << 40])), TensorError, "above 0"),
    "three sizes": (_put("weight_shape", torch.tensor([6, 64, 1])), TensorError, "[2]"),
    "ragged group": (_put("weight_shape", torch.tensor([6, 65])), TensorError, "65"),
    "NaN scale": (
        _put("weight_scale", torch.full((ROWS, 2), float("nan")).bfloat16()),
        NumericsError,
        "NaN",
    ),
    "Inf scale": (
        _put("weight_scale", torch.full((ROWS, 2), float("-inf")).bfloat16()),
        NumericsError,
        "Inf",
    ),
    "zero point of a symmetric scheme": (
        _put("weight_zero_point", torch.zeros(1, 2).int()),
        TensorError,
        "symmetric",
    ),
    "weight too": (_put("weight", torch.zeros(ROWS, COLUMNS)), UnsupportedError, "weight"),
    "group index": (_put("weight_g_idx", torch.zeros(64).int()), UnsupportedError, "g_idx"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_parts_are_refused(name: str) -> None:
    spoil, error, said = BAD_TENSORS[name]
    tensors = packed_tensors()
    spoil(tensors)
    with pytest.raises(error, match=re.escape(said)):
        read(quantization_config(), tensors)


def test_negative_scales_are_good() -> None:
    tensors = packed_tensors()
    tensors[f"{PREFIX}.weight_scale"] = -torch.ones(ROWS, 2).bfloat16()
    weight = read(quantization_config(), tensors)
    assert weight is not None
    assert bool((weight.scale == -1).all())


def _config(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    config = quantization_config()
    change(config)
    return config


def _group(config: dict[str, Any]) -> dict[str, Any]:
    group: dict[str, Any] = config["config_groups"]["group_0"]
    return group


BAD_CONFIGS = {
    "method": _config(lambda c: c.update(quant_method="gptq")),
    "fp8": _config(lambda c: c.update(quant_method="fp8")),
    "format": _config(lambda c: _group(c).update(format="marlin-24")),
    "kv cache": _config(lambda c: c.update(kv_cache_scheme={"num_bits": 8})),
    "rotation": _config(lambda c: c.update(transform_config={"config_groups": {"R1": {}}})),
    "sparsity": _config(lambda c: c.update(sparsity_config={"format": "sparse-24-bitmask"})),
    "status": _config(lambda c: c.update(quantization_status="initialized")),
    "activations": _config(lambda c: _group(c).update(input_activations={"num_bits": 8})),
    "unknown in group": _config(lambda c: _group(c).update(surprise=1)),
    "channel": quantization_config(strategy="channel"),
    "tensor": quantization_config(strategy="tensor"),
    "float": quantization_config(type="float"),
    "dynamic": quantization_config(dynamic=True),
    "bits": quantization_config(num_bits=3),
    "group": quantization_config(group_size=16),
    "activation order": quantization_config(actorder="group"),
    "unknown in weights": quantization_config(surprise=1),
    "bits of a bool": quantization_config(num_bits=True),
    "no group size": quantization_config(group_size=None),
    "not an object": [],
    "no groups": _config(lambda c: c.update(config_groups={})),
    "targets": _config(lambda c: _group(c).update(targets="Linear")),
    "back reference": _config(lambda c: _group(c).update(targets=[r"re:(a)\1"])),
    "many patterns": _config(lambda c: c.update(ignore=["re:a"] * 201)),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_configs_are_refused(name: str) -> None:
    with pytest.raises(LocalR1Error):
        read(BAD_CONFIGS[name], packed_tensors())


def test_which_module_gets_which_scheme() -> None:
    def group(bits: int, *targets: str) -> dict[str, Any]:
        one = _group(quantization_config(num_bits=bits))
        return {**one, "targets": list(targets)}

    config = quantization_config()
    config["config_groups"] = {
        "a": group(4, r"re:.*mlp\.(gate|up|down)_proj$"),
        "b": group(8, "Linear", r"re:.*up_proj$", "model.layers.3.mlp.up_proj"),
        "c": group(8, "Embedding"),
    }
    config["ignore"] = ["lm_head", r"re:.*layers\.9\..*"]
    parsed = parse_quantization_config(config)

    def bits(name: str) -> int | None:
        scheme = parsed.scheme_for(name)
        assert scheme is None or isinstance(scheme, QuantScheme)
        return scheme.bits if scheme else None

    assert bits("model.layers.0.mlp.up_proj") == 4  # The first pattern, in the first group.
    assert bits("model.layers.3.mlp.up_proj") == 8  # The whole name, before a pattern.
    assert bits("model.layers.0.self_attn.q_proj") == 8  # The class.
    assert bits("model.embed_tokens") == 8
    assert bits("lm_head") is None
    assert bits("model.layers.9.mlp.up_proj") is None


def test_a_packed_module_without_a_scheme_is_refused() -> None:
    for config in (None, _config(lambda c: c.update(ignore=[PREFIX]))):
        with pytest.raises(TensorError, match="targets it"):
            read(config, packed_tensors())


RELEASED_PATTERNS = [
    r".*mlp\.(gate|up|gate_up|down)_proj.*",
    r".*self_attn.*",
    r".*shared_experts.*",
    r".*mlp\.shared_[a-z]+\.(gate|up|down)_proj$",
    r"model\.layers\.[0-9]+\.mlp\.experts\.\d+\.(?:gate|up)_proj",
    r"^(?!.*visual).*proj$",
    r".*layers\.(?:[0-5]|1\d)\..*",
]
NAMES = [
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.mlp.up_proj",
    "model.layers.12.mlp.experts.7.gate_proj",
    "model.layers.3.mlp.shared_experts.down_proj",
    "model.layers.61.self_attn.kv_a_proj_with_mqa",
    "visual.blocks.0.mlp.up_proj",
]


@pytest.mark.parametrize("pattern", RELEASED_PATTERNS)
def test_released_patterns_match_as_re_does(pattern: str) -> None:
    assert [matches(pattern, name) for name in NAMES] == [
        re.match(pattern, name) is not None for name in NAMES
    ]


_atoms = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\.", r"\d", r"\w", "^", "$", "0"])
_patterns = st.recursive(
    _atoms,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: "(" + "|".join(parts) + ")"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{1,}", "*?"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
        inner.map(lambda part: f"(?!{part})"),
        inner.map(lambda part: f"(?={part})"),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@given(_patterns, st.text(alphabet="ab.0\n", max_size=7))
def test_patterns_match_as_re_does(pattern: str, name: str) -> None:
    assert matches(pattern, name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|a)*$", "(.*)*" * 6 + "x", "((a*)*)*b", "(a?){99}" * 9 + "b", "((a{99})*)*b"],
)
def test_hostile_patterns_take_no_time(pattern: str) -> None:
    begin = time.perf_counter()
    with contextlib.suppress(
        UnsupportedError
    ):  # Giving up after MAX_STEPS is as good as an answer.
        assert not matches(pattern, "a" * 200 + "!")
    assert time.perf_counter() - begin < 1.0


def test_released_patterns_are_far_from_the_limit_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(name_patterns, "MAX_STEPS", 1_500)
    for pattern in RELEASED_PATTERNS:
        for name in NAMES:
            matches(pattern, name)


@pytest.mark.parametrize(
    "pattern",
    [r"(a)\1", "(?i)a", "(?P<x>a)", r"\bword", "a**", "*a", "(a", "a)", "[a", "a{2", "a\\",
     "[b-a]", "^*", "(?<=a)b", "a" * (MAX_PATTERN_LENGTH + 1), "(" * 40 + "a" + ")" * 40],
)  # fmt: skip
def test_patterns_outside_the_language_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedError, match="name pattern"):
        matches(pattern, "a")


def test_names_alike_but_for_their_digits_are_matched_once() -> None:
    """And no pattern notices: those that can tell digits apart are asked every time."""
    patterns = (
        r".*mlp\.experts\.\d+\.(gate|up|down)_proj$",
        r".*layers\.\d\.mlp.*",
        r".*\.experts\.\d\d\..*",
        r"model\.layers\..\..*",
        r".*experts\.1?7\..*",
        r".*experts\.[0-4]+\..*",
    )
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
        for layer in (0, 7, 10, 17, 101)
        for expert in (0, 4, 7, 17, 23, 170)
        for part in ("up", "q")
    ]
    for pattern in patterns:
        weights = {"num_bits": 4, "group_size": 32, "strategy": "group"}
        document = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": [f"re:{pattern}"], "weights": weights}},
        }
        config = parse_quantization_config(document)
        for name in names:
            found = config.scheme_for(name) is not None
            assert found == (re.match(pattern, name) is not None), (pattern, name)
