"""GGUF files of mixtures: the logits of the model they were made from, each expert read by itself,
and every key of their metadata missing or absurd."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType
from gguf_mixtures import (
    Array,
    convert,
    converted_keys,
    converted_tensors,
    split_up,
    write_gguf,
)
from tiny_models import (
    CLASSES,
    OF_TYPE,
    TINY,
    MemoryCheckpoint,
    prompt,
    run_in_chunks,
    tiny_transformer,
    transformer_logits,
)
from transformers import AutoConfig

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import ConfigError, FormatError, LocalR1Error, TensorError, UnsupportedError
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model

TOLERANCE = 1e-4
"""As of the models' own parity tests: float32 against float32, logits of about 10. The errors below
that a file could hide cost more than SEEN."""
SEEN = 1e-2

YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
LITE = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 8.0, "beta_slow": 0.5}
QWEN = {"norm_topk_prob": True, "head_dim": 16}
UNGROUPED = {"n_group": 1, "topk_group": 1}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}),
    "v3-yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "v3-ungrouped": ("deepseek_v3", {**UNGROUPED, "rope_parameters": YARN}),
    "v3-no-dense-layer": ("deepseek_v3", {"first_k_dense_replace": 0, "n_shared_experts": 2}),
    "v2-lite": ("deepseek_v2", {**UNGROUPED, "q_lora_rank": None, "rope_parameters": LITE}),
    "v2": ("deepseek_v2", {"topk_method": "group_limited_greedy", "rope_parameters": LITE}),
    "v2-tied": ("deepseek_v2", {**UNGROUPED, "tie_word_embeddings": True}),
    "qwen3": ("qwen3_moe", QWEN),
    "qwen3-tied": ("qwen3_moe", {**QWEN, "tie_word_embeddings": True}),
}
OLD_CASES = ["v3-ungrouped", "v2-lite", "v2-tied"]
"""What files of before April 2025 can say."""


def tiny(case: str) -> Any:
    model_type, changes = CASES[case]
    return tiny_transformer(model_type, 0, **changes)


def tiny_config(case: str) -> Any:
    model_type, changes = CASES[case]
    return CLASSES[model_type][0](**{**TINY, **OF_TYPE[model_type], **changes})


def logits_of(path: Path) -> torch.Tensor:
    with open_checkpoint(path) as checkpoint:
        model = load_model(checkpoint, ReferenceKernels())
    return run_in_chunks(model, prompt(0, 30), [17])


@pytest.mark.parametrize(
    ("case", "legacy"), [(case, False) for case in CASES] + [(case, True) for case in OLD_CASES]
)
def test_logits_are_those_of_the_source(case: str, legacy: bool, tmp_path: Path) -> None:
    model = tiny(case)
    if legacy and case == "v2-lite":  # Files of that time held no beta.
        model = tiny_transformer(
            "deepseek_v2",
            0,
            **{**CASES[case][1], "rope_parameters": {**LITE, "beta_fast": 32.0, "beta_slow": 1.0}},
        )
    found = logits_of(convert(tmp_path / "a.gguf", model, legacy=legacy))
    expected = transformer_logits(model, prompt(0, 30))
    assert expected.abs().max() > 3.0
    assert (found - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_weights_and_config_are_those_of_the_source(case: str, tmp_path: Path) -> None:
    model = tiny(case)
    original = MemoryCheckpoint.of(model)
    with open_checkpoint(convert(tmp_path / "a.gguf", model)) as checkpoint:
        assert checkpoint.tensors.keys() == original.tensors.keys()
        for name, info in checkpoint.tensors.items():
            found = checkpoint.read(name)
            assert found.is_contiguous()
            assert tuple(found.shape) == info.shape
            assert info.nbytes == found.nbytes
            assert torch.equal(found, original.read(name)), name
        theirs = AutoConfig.for_model(**checkpoint.config)
        assert theirs.architectures == [type(model).__name__]
        for field in ("num_experts_per_tok", "moe_intermediate_size", "num_attention_heads"):
            assert getattr(theirs, field) == getattr(model.config, field)
        if "yarn" in case or "rope_parameters" in CASES[case][1]:
            assert {**model.config.rope_parameters, **theirs.rope_parameters} == (
                model.config.rope_parameters
            )


def lost(name: str, change: Callable[[dict[str, Any], dict[str, Array], Any], Any]) -> Any:
    return pytest.param(change, id=name)


def swap_halves(keys: dict[str, Any], tensors: dict[str, Array], config: Any) -> None:
    """Values first in each head, as if the two halves had changed places."""
    for layer in range(config.num_hidden_layers):
        k_b, v_b = f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight"
        both = np.concatenate((tensors[v_b], tensors[k_b].transpose(0, 2, 1)), axis=1)
        tensors.update(split_up(both.reshape(-1, config.kv_lora_rank), f"blk.{layer}.", config))


def swap_experts(keys: dict[str, Any], tensors: dict[str, Array], config: Any) -> None:
    tensors["blk.1.ffn_up_exps.weight"] = tensors["blk.1.ffn_up_exps.weight"][::-1].copy()


PLANTED = [
    lost("halves of kv_b", swap_halves),
    lost("order of experts", swap_experts),
    lost("log multiplier", lambda k, t, c: k.pop("rope.scaling.yarn_log_multiplier")),
    lost("log multiplier times 10", lambda k, t, c: k.update(
        {"rope.scaling.yarn_log_multiplier": 1.0})),
    lost("beta", lambda k, t, c: k.update({"rope.scaling.yarn_beta_slow": 0.1})),
    lost("groups", lambda k, t, c: (k.pop("expert_group_count"),
                                    k.pop("expert_group_used_count"))),
    lost("scale", lambda k, t, c: k.pop("expert_weights_scale")),
    lost("norm", lambda k, t, c: k.pop("expert_weights_norm")),
]  # fmt: skip


@pytest.mark.parametrize("change", PLANTED)
def test_what_a_file_could_get_wrong_would_be_seen(
    change: Callable[[dict[str, Any], dict[str, Array], Any], Any], tmp_path: Path
) -> None:
    model = tiny("v3-yarn")
    keys, tensors = converted_keys(model.config), converted_tensors(model)
    change(keys, tensors, model.config)
    write_gguf(tmp_path / "a.gguf", "deepseek2", keys, tensors)
    difference = logits_of(tmp_path / "a.gguf") - transformer_logits(model, prompt(0, 30))
    assert difference.abs().max() > SEEN


# Stacks of experts.


def test_an_expert_is_read_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes and no others, of blocks as well as of floats, and the numbers that the library
    finds in its place of the whole stack."""
    model = tiny_transformer("qwen3_moe", 0, **QWEN, hidden_size=64, moe_intermediate_size=32)
    tensors = converted_tensors(model)
    kind, name = GGMLQuantizationType.Q4_0, "blk.1.ffn_gate_exps.weight"
    stack = gguf.quants.quantize(tensors[name], kind)
    expected = gguf.quants.dequantize(stack, kind)
    write_gguf(
        tmp_path / "a.gguf",
        "qwen3moe",
        converted_keys(model.config),
        {**tensors, name: stack},
        kind,
    )
    reads: list[int] = []
    read_into = RandomAccessFile.read_into

    def watched(self: RandomAccessFile, offset: int, buffer: memoryview) -> None:
        reads.append(len(buffer))
        read_into(self, offset, buffer)

    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        monkeypatch.setattr(RandomAccessFile, "read_into", watched)
        for expert in (0, 3, 7):
            own = f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"
            info = checkpoint.tensors[own]
            assert (info.dtype, info.shape, info.nbytes) == ("Q4_0", (32, 64), 32 * 64 // 32 * 18)
            assert np.array_equal(checkpoint.read(own).numpy(), expected[expert])
        assert reads == [32 * 64 // 32 * 18] * 3
        down = checkpoint.read("model.layers.1.mlp.experts.7.down_proj.weight")
        assert np.array_equal(down.numpy(), tensors["blk.1.ffn_down_exps.weight"][7])
        assert reads[3:] == [4 * 64 * 32]


def test_halves_of_two_types_are_joined_in_float32(tmp_path: Path) -> None:
    model = tiny("v3")
    tensors = converted_tensors(model)
    for layer in range(2):
        name = f"blk.{layer}.attn_v_b.weight"
        tensors[name] = tensors[name].astype(np.float16)
    write_gguf(tmp_path / "a.gguf", "deepseek2", converted_keys(model.config), tensors)
    own = "model.layers.0.self_attn.kv_b_proj.weight"
    with open_checkpoint(tmp_path / "a.gguf") as checkpoint:
        assert checkpoint.tensors[own].dtype == "F32+F16"
        found = checkpoint.read(own)
    expected = model.get_parameter(own)
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    assert torch.allclose(found, expected, rtol=2**-10)


def zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


TENSOR_FAULTS: dict[str, tuple[dict[str, Array | None], type[LocalR1Error], str]] = {
    "an expert too few": ({"ffn_up_exps.weight": zeros(7, 24, 48)}, TensorError, "8 experts"),
    "an expert too many": ({"ffn_up_exps.weight": zeros(9, 24, 48)}, TensorError, "8 experts"),
    "not stacked": ({"ffn_up_exps.weight": zeros(24, 48)}, TensorError, "three dimensions"),
    "four dimensions": ({"ffn_up_exps.weight": zeros(8, 24, 48, 2)}, TensorError, "three dimen"),
    "other experts": ({"ffn_up_exps.weight": zeros(8, 24, 47)}, TensorError, "experts.0.up_proj"),
    "no stack": ({"ffn_up_exps.weight": None}, TensorError, "experts.0.up_proj"),
    "a bias of experts": ({"ffn_up_exps.bias": zeros(8, 24, 48)}, UnsupportedError, "exps.bias"),
    "one expert by name": ({"ffn_up.0.weight": zeros(24, 48)}, UnsupportedError, "ffn_up.0"),
    "gate and up in one": ({"ffn_gate_up_exps.weight": zeros(8, 48, 48)}, UnsupportedError,
                           "gate_up_exps"),
    "no k_b": ({"attn_k_b.weight": None}, TensorError, "attn_k_b.weight is missing"),
    "no v_b": ({"attn_v_b.weight": None}, TensorError, "attn_v_b.weight is missing"),
    "k_b and v_b swapped": ({"attn_k_b.weight": zeros(4, 10, 20), "attn_v_b.weight":
                             zeros(4, 20, 12)}, TensorError, "[heads, latent, key]"),
    "k_b flat": ({"attn_k_b.weight": zeros(80, 12)}, TensorError, "[heads, latent, key]"),
    "heads of v_b": ({"attn_v_b.weight": zeros(3, 10, 20)}, TensorError, "[heads, latent, key]"),
    "kv_b too": ({"attn_kv_b.weight": zeros(88, 20)}, TensorError, "stored twice"),
    "no router": ({"ffn_gate_inp.weight": None}, TensorError, "mlp.gate"),
    "no bias of the choice": ({"exp_probs_b.bias": None}, TensorError, "e_score_correction_bias"),
    "a weight for a bias": ({"exp_probs_b.weight": zeros(8)}, UnsupportedError, "exp_probs_b"),
    "attn_k": ({"attn_k.weight": zeros(4, 4)}, UnsupportedError, "attn_k.weight"),
    "another layer": ({"../blk.2.attn_norm.weight": zeros(48)}, TensorError, "layers 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSOR_FAULTS)
def test_tensors_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    changes, error, said = TENSOR_FAULTS[name]
    model = tiny("v3")
    tensors = converted_tensors(model)
    for inner, value in changes.items():
        own = inner.removeprefix("../") if inner.startswith("../") else f"blk.1.{inner}"
        tensors.pop(own, None)
        if value is not None:
            tensors[own] = value
    write_gguf(tmp_path / "a.gguf", "deepseek2", converted_keys(model.config), tensors)
    with pytest.raises(error) as caught:
        logits_of(tmp_path / "a.gguf")
    assert said in str(caught.value)


# Metadata.

OPTIONAL = {
    "vocab_size": "the rows of the embedding say it",
    "rope.freq_base": "10,000, as in llama.cpp",
    "expert_group_count": "no groups; with expert_group_used_count beside it an error",
    "expert_group_used_count": "one group, of too few experts here",
    "expert_weights_scale": "1",
    "expert_weights_norm": "off",
    "attention.head_count_kv": "as the other lengths say",
    "attention.key_length": "as the other lengths say",
    "attention.value_length": "as the other lengths say",
    "rope.scaling.yarn_log_multiplier": "a config without mscale_all_dim",
    "rope.scaling.yarn_beta_fast": "32",
    "rope.scaling.yarn_beta_slow": "1",
}
REQUIRED_OF_V3 = sorted(converted_keys(tiny_config("v3-yarn")).keys() - OPTIONAL.keys())
REQUIRED_OF_QWEN = sorted(
    converted_keys(tiny_config("qwen3")).keys()
    - {"rope.freq_base", "attention.key_length", "attention.value_length"}
)


def without(key: str) -> dict[str, Any]:
    return {key.replace(".", "__"): None}


@pytest.mark.parametrize(
    ("case", "key"),
    [("v3-yarn", key) for key in REQUIRED_OF_V3] + [("qwen3", key) for key in REQUIRED_OF_QWEN],
)
def test_a_missing_key_is_an_error(case: str, key: str, tmp_path: Path) -> None:
    """Named where it is read; where its absence means something else, what then does not fit."""
    path = convert(tmp_path / "a.gguf", tiny(case), **without(key))
    with pytest.raises(LocalR1Error):
        logits_of(path)


@pytest.mark.parametrize("key", OPTIONAL)
def test_a_key_that_may_be_missing(key: str, tmp_path: Path) -> None:
    path = convert(tmp_path / "a.gguf", tiny("v3-yarn"), **without(key))
    if key.startswith("expert_group"):
        with pytest.raises(ConfigError):
            logits_of(path)
    else:
        assert logits_of(path).isfinite().all()


ABSURD: dict[type, list[Any]] = {
    int: [0, -1, (1 << 31) - 1, "1", True, 1.0],
    float: [0.0, -1.0, math.nan, math.inf, "1", True],
    str: ["", "longrope", 1],
    bool: ["true", 1, 1.0],
}
ALLOWED = {
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("attention.layer_norm_rms_epsilon", 0.0),
}
ABSURDITIES = [
    (case, key, value)
    for case in ("v3-yarn", "qwen3")
    for key, good in converted_keys(tiny_config(case)).items()
    for value in ABSURD[type(good)]
    if (key, value) not in ALLOWED or type(value) is not type(good)
]


@pytest.mark.parametrize(("case", "key", "value"), ABSURDITIES)
def test_an_absurd_key_is_an_error(case: str, key: str, value: Any, tmp_path: Path) -> None:
    path = convert(tmp_path / "a.gguf", tiny(case), **{key.replace(".", "__"): value})
    with pytest.raises(LocalR1Error):
        logits_of(path)


NAMED: dict[str, tuple[str, dict[str, Any], type[LocalR1Error], str]] = {
    "gating": ("v3", {"expert_gating_func": 3}, UnsupportedError, "1, softmax, or 2, sigmoid"),
    "more chosen than there are": ("v3", {"expert_used_count": 9}, ConfigError, "1 to 8"),
    "more groups kept": ("v3", {"expert_group_used_count": 5}, ConfigError, "1 to 4"),
    "groups that do not divide": ("v3", {"expert_group_count": 3}, ConfigError, "n_group"),
    "all dense and more": ("v3", {"leading_dense_block_count": 3}, ConfigError, "0 to 2"),
    "key no longer than rope": ("v3", {"attention__key_length_mla": 8}, ConfigError, "more than"),
    "another key length": ("v3", {"attention__key_length": 27}, ConfigError, "expected 28"),
    "another value length": ("v3", {"attention__value_length": 21}, ConfigError, "expected 20"),
    "heads of keys": ("v3", {"attention__head_count_kv": 2}, ConfigError, "expected 1"),
    "half of the lengths": ("v3", {"attention__value_length_mla": None}, FormatError,
                            "value_length_mla is missing"),
    "a magnitude without yarn": ("v3", {"rope__scaling__yarn_log_multiplier": 0.1},
                                 UnsupportedError, "type yarn beside it"),
    "attention factor": ("v3-yarn", {"rope__scaling__attn_factor": 0.5}, UnsupportedError,
                         "attn_factor"),
    "extrapolation": ("v3-yarn", {"rope__scaling__yarn_ext_factor": 0.5}, UnsupportedError,
                      "yarn_ext_factor"),
    "prediction layers": ("v3", {"nextn_predict_layers": 1}, UnsupportedError, "nextn_predict"),
    "unknown": ("v3", {"attention__indexer__top_k": 64}, UnsupportedError, "indexer.top_k"),
    "weights not made to sum to one": ("qwen3", {"expert_weights_norm": False}, UnsupportedError,
                                       "expert_weights_norm"),
    "shared experts": ("qwen3", {"expert_shared_count": 1}, UnsupportedError, "shared_count"),
    "a latent of qwen": ("qwen3", {"attention__kv_lora_rank": 8}, UnsupportedError, "kv_lora"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMED)
def test_what_does_not_fit_is_named(name: str, tmp_path: Path) -> None:
    case, changes, error, said = NAMED[name]
    path = convert(tmp_path / "a.gguf", tiny(case), **changes)
    with pytest.raises(error) as caught:
        logits_of(path)
    assert said in str(caught.value)


def test_more_weights_than_a_model_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localr1.checkpoint.gguf_names.MAX_TENSORS", 50)
    path = convert(tmp_path / "a.gguf", tiny("v3"))
    with pytest.raises(FormatError, match="too many weights"):
        open_checkpoint(path)
