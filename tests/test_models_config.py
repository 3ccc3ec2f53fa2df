"""config.json: released ones load, broken ones are errors that name the field."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from released_configs import (
    LLAMA_3_1_8B,
    LLAMA_3_2_1B,
    QWEN2_5_7B,
    QWEN3_0_6B,
    QWEN3_0_6B_TRANSFORMERS_5,
    R1_0528_QWEN3_8B,
    RELEASED,
    SMOLLM2_135M,
)

from localr1.errors import ConfigError, LocalR1Error, UnsupportedError
from localr1.layers.rope import DefaultRope, LinearRope, Llama3Rope, YarnRope
from localr1.models.config import ModelConfig
from localr1.models.registry import ARCHITECTURES, parse_config

# Parameters as published (or counted from the published tensors), and the context in tokens.
FACTS = {
    "llama-2-7b": (6_738_415_616, 4096),
    "vicuna-13b-16k": (13_015_864_320, 4096),
    "yarn-llama-2-7b-64k": (6_738_415_616, 65536),
    "deepseek-coder-33b": (33_342_991_360, 16384),
    "llama-3.1-8b": (8_030_261_248, 131072),
    "llama-3.2-1b": (1_235_814_400, 131072),
    "r1-distill-llama-8b": (8_030_261_248, 131072),
    "smollm2-135m": (134_515_008, 8192),
    "qwen2.5-7b": (7_615_616_512, 32768),
    "qwen2.5-7b-yarn": (7_615_616_512, 131072),
    "r1-distill-qwen-1.5b": (1_777_088_000, 131072),
    "r1-distill-qwen-7b": (7_615_616_512, 131072),
    "qwen3-0.6b": (596_049_920, 40960),
    "qwen3-0.6b-transformers-5": (596_049_920, 40960),
    "r1-0528-qwen3-8b": (8_190_735_360, 131072),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs_are_read(name: str) -> None:
    config = parse_config(RELEASED[name])
    assert (config.parameter_count, config.max_positions) == FACTS[name]


def test_what_is_read_is_what_is_written() -> None:
    config = parse_config(SMOLLM2_135M)
    assert (config.architecture, config.num_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.intermediate_size, config.vocab_size) == (1536, 49152)
    assert (config.rms_norm_eps, config.tie_embeddings) == (1e-5, True)
    assert config.rope == DefaultRope(100_000.0)
    flags = (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm)
    assert flags == (False, False, False, False)

    qwen2 = parse_config(QWEN2_5_7B)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = parse_config(QWEN3_0_6B)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 128)
    assert parse_config({**QWEN3_0_6B, "head_dim": None}).head_dim == 128
    biased = parse_config({**LLAMA_3_1_8B, "attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, True)


def test_both_spellings_of_rope_say_the_same() -> None:
    assert parse_config(QWEN3_0_6B) == parse_config(QWEN3_0_6B_TRANSFORMERS_5)
    old = {**LLAMA_3_1_8B}
    scaling = {**old.pop("rope_scaling")}
    kind = scaling.pop("rope_type")
    theta = old.pop("rope_theta")
    expected = parse_config(LLAMA_3_1_8B)
    assert expected.rope == Llama3Rope(500_000.0, 8.0, 1.0, 4.0, 8192)
    for spelling in (
        {"rope_parameters": {**scaling, "rope_type": kind, "rope_theta": theta}},
        {"rope_theta": theta, "rope_scaling": {**scaling, "type": kind}},
        {"rope_theta": theta, "rope_scaling": {**scaling, "type": kind, "rope_type": kind}},
        {"rope_theta": theta, "rope_parameters": {**scaling, "rope_type": kind}},
    ):
        assert parse_config({**old, **spelling}) == expected


def test_rope_defaults() -> None:
    plain = {name: value for name, value in SMOLLM2_135M.items() if name != "rope_theta"}
    assert parse_config(plain).rope == DefaultRope(10_000.0)
    linear = parse_config({**plain, "rope_scaling": {"type": "linear", "factor": 2}})
    assert linear.rope == LinearRope(10_000.0, 2.0)
    assert linear.max_positions == 8192
    yarn = {"rope_type": "yarn", "factor": 4.0}
    beside = {**yarn, "original_max_position_embeddings": 2048}
    assert parse_config({**plain, "rope_scaling": yarn}).max_positions == 4 * 8192
    outside = {**plain, "rope_scaling": yarn, "original_max_position_embeddings": 2048}
    for config in ({**plain, "rope_scaling": beside}, outside):
        rope = parse_config(config).rope
        assert isinstance(rope, YarnRope)
        assert rope.original_positions == 2048
    deduced = parse_config({**plain, "rope_scaling": {**beside, "factor": None}}).rope
    assert isinstance(deduced, YarnRope)
    assert deduced.factor == 4.0


def llama_scaled(**changes: Any) -> dict[str, Any]:
    return {**LLAMA_3_1_8B, "rope_scaling": {**LLAMA_3_1_8B["rope_scaling"], **changes}}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({**LLAMA_3_1_8B, "num_hidden_layers": -1}, "num_hidden_layers: .* found -1"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": 0}, "num_hidden_layers: .* found 0"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": 10**9}, "num_hidden_layers: .* found 1000000000"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": True}, "num_hidden_layers: .* found true"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": 32.0}, "num_hidden_layers: .* found 32.0"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": "32"}, "num_hidden_layers: .* found '32'"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": 10**5000}, "num_hidden_layers: .* of 16610 bits"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": [[10**5000]]}, "num_hidden_layers: .* of 1 entries"),
    ({**LLAMA_3_1_8B, "num_hidden_layers": None}, "num_hidden_layers: expected a value"),
    ({**LLAMA_3_2_1B, "head_dim": 0}, "head_dim: .* found 0"),
    ({**LLAMA_3_2_1B, "head_dim": 63}, "head_dim: expected an even number"),
    ({**LLAMA_3_1_8B, "hidden_size": 4097}, "hidden_size: expected a multiple of .*32"),
    ({**LLAMA_3_1_8B, "num_key_value_heads": 5}, "num_key_value_heads: expected a divisor .*32"),
    ({**LLAMA_3_1_8B, "num_key_value_heads": 0}, "num_key_value_heads: .* found 0"),
    ({**LLAMA_3_1_8B, "rms_norm_eps": float("nan")}, "rms_norm_eps: .* found nan"),
    ({**LLAMA_3_1_8B, "rms_norm_eps": -1e-5}, "rms_norm_eps: .* found -1e-05"),
    ({**LLAMA_3_1_8B, "rms_norm_eps": "1e-5"}, "rms_norm_eps: expected a number"),
    ({**LLAMA_3_1_8B, "rope_theta": float("inf")}, "rope_theta: .* found inf"),
    ({**LLAMA_3_1_8B, "rope_theta": 0}, "rope_theta: .* found 0"),
    ({**LLAMA_3_1_8B, "tie_word_embeddings": 1}, "tie_word_embeddings: expected true or false"),
    ({**LLAMA_3_1_8B, "vocab_size": 2**40}, "vocab_size"),
    ({**LLAMA_3_1_8B, "max_position_embeddings": 0}, "max_position_embeddings"),
    ({**LLAMA_3_1_8B, "model_type": 7}, "model_type: expected a string, found 7"),
    ({**LLAMA_3_1_8B, "rope_scaling": [1]}, "rope_scaling: expected an object"),
    (llama_scaled(factor=float("nan")), "rope_scaling: factor: .* found nan"),
    (llama_scaled(factor=0.0), "rope_scaling: factor: .* found 0.0"),
    (llama_scaled(factor=None), "rope_scaling: factor: expected a value"),
    (llama_scaled(high_freq_factor=1.0), "high_freq_factor: expected more than .*1"),
    (llama_scaled(rope_type=None), "rope_scaling: type: expected a value"),
    (llama_scaled(type="yarn"), "rope_scaling: type: expected 'llama3'"),
    (llama_scaled(rope_theta=10_000.0), "rope_theta: expected 10000, .* found 500000.0"),
    ({**LLAMA_3_1_8B, "rope_parameters": {"rope_type": "default"}}, "rope_scaling: expected what"),
    ({**QWEN2_5_7B, "layer_types": ["full_attention"]}, "layer_types: .* 28 layers, found 1"),
    ({**QWEN2_5_7B, "layer_types": [1] * 28}, "layer_types: expected a list of strings"),
    ({**QWEN2_5_7B, "use_sliding_window": "no"}, "use_sliding_window: expected true or false"),
]
BROKEN += [
    (
        {key: value for key, value in LLAMA_3_1_8B.items() if key != name},
        f"{name}: .* found nothing",
    )
    for name in (
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "rms_norm_eps",
        "vocab_size",
    )
]


@pytest.mark.parametrize(("config", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_value_that_makes_no_model_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: .*" + message):
        parse_config(config)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({**LLAMA_3_1_8B, "model_type": "mamba"}, "one of llama, qwen2, .*, found 'mamba'"),
    ({**LLAMA_3_1_8B, "hidden_act": "gelu"}, "hidden_act .* 'silu' or 'swish', found 'gelu'"),
    ({**LLAMA_3_1_8B, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({**LLAMA_3_1_8B, "residual_multiplier": 0.22}, "residual_multiplier"),
    ({**LLAMA_3_1_8B, "embedding_multiplier": 12}, "embedding_multiplier"),
    ({**LLAMA_3_1_8B, "logits_scaling": 8}, "logits_scaling"),
    ({**LLAMA_3_1_8B, "attention_multiplier": 0.01}, "attention_multiplier"),
    ({**LLAMA_3_1_8B, "final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({**LLAMA_3_1_8B, "sliding_window": 4096}, "sliding_window"),
    ({**LLAMA_3_1_8B, "num_local_experts": 8}, "num_local_experts"),
    ({**LLAMA_3_1_8B, "rope_interleaved": True}, "rope_interleaved"),
    ({**LLAMA_3_1_8B, "quantization_config": {"quant_method": "gptq"}}, "quant_method.*'gptq'"),
    (llama_scaled(rope_type="dynamic"), "rope_type .* default, linear, llama3, yarn, found 'dyn"),
    (llama_scaled(rope_type="longrope"), "rope_type .* found 'longrope'"),
    (llama_scaled(beta_fast=16), "rope_scaling: unknown field beta_fast"),
    (llama_scaled(partial_rotary_factor=0.25), "rope_scaling: partial_rotary_factor"),
    ({**QWEN2_5_7B, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "found 'mrope'"),
    ({**QWEN2_5_7B, "use_sliding_window": True, "max_window_layers": 21}, "use_sliding_window"),
    (
        {**QWEN2_5_7B, "layer_types": ["full_attention"] * 27 + ["sliding_attention"]},
        "layer_types .* found a list of 28 entries",
    ),
    ({**QWEN2_5_7B, "attention_bias": True}, "unknown field attention_bias"),
    ({**QWEN2_5_7B, "dual_chunk_attention_config": {"chunk_size": 1}}, "dual_chunk_attention"),
    ({**QWEN3_0_6B, "mlp_bias": True}, "mlp_bias"),
]


@pytest.mark.parametrize(
    ("config", "message"), UNSUPPORTED, ids=[message for _, message in UNSUPPORTED]
)
def test_mathematics_that_is_not_honoured_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^config\.json: .*" + message):
        parse_config(config)


def test_fields_that_change_nothing_are_let_through() -> None:
    harmless = {
        "auto_map": {"AutoModel": "evil.Evil"},
        "quantization_config": {"quant_method": "compressed-tensors"},
        "hidden_act": "swish",
        "partial_rotary_factor": 1.0,
        "pretraining_tp": 4,
        "final_logit_softcapping": None,
        "some_new_feature": False,
        "layer_overrides": [],
    }
    assert parse_config({**LLAMA_3_1_8B, **harmless}) == parse_config(LLAMA_3_1_8B)
    # A window that starts after the last layer windows nothing.
    windowed = {**QWEN2_5_7B, "use_sliding_window": True, "max_window_layers": 28}
    assert parse_config(windowed) == parse_config(QWEN2_5_7B)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 10**5000]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=8), st.floats(), max_size=3),
)
# fmt: off
ROPE_FIELDS = [
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "attn_factor", "beta_fast", "beta_slow", "low_freq_factor",
    "high_freq_factor", "mscale", "mscale_all_dim", "truncate",
]
# fmt: on
MAX_MESSAGE = 500
"""Characters: one error is a few lines of a terminal, whatever the file holds."""


def check_usable(config: ModelConfig) -> None:
    assert config.architecture in ARCHITECTURES
    assert config.num_heads % config.num_kv_heads == 0
    assert 0 < config.rope.attention_factor < math.inf
    assert config.rope.inverse_frequencies(min(config.head_dim, 256)).isfinite().all()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_junk_is_read_or_refused_and_what_is_read_is_usable(data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([LLAMA_3_1_8B, QWEN2_5_7B, R1_0528_QWEN3_8B]))
    config = {**base}
    for name in data.draw(st.lists(st.sampled_from(sorted(base)), max_size=3)):
        config[name] = data.draw(JUNK)
    if data.draw(st.booleans()):
        scaling = dict(base.get("rope_scaling", {}))
        scaling.update(data.draw(st.dictionaries(st.sampled_from(ROPE_FIELDS), JUNK, max_size=3)))
        config["rope_scaling"] = scaling
    try:
        parsed = parse_config(config)
    except LocalR1Error as error:
        message = str(error)
    else:
        message = ""
        check_usable(parsed)
    assert len(message) < MAX_MESSAGE
