"""Mixtures from config and checkpoint: released ones are read, broken ones are errors that name
what is wrong, and multi-token-prediction layers are left out."""

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from packed_models import packed_checkpoint
from released_mixtures import KIMI_K2, QWEN3_30B_A3B, R1, V2, V2_LITE
from tiny_models import (
    Change,
    MemoryCheckpoint,
    drop,
    prompt,
    put,
    run_in_chunks,
    tiny_transformer,
)
from torch import Tensor

from localr1.errors import ConfigError, LocalR1Error, TensorError, UnsupportedError
from localr1.kernels.api import GroupScore, RouterRule, Scoring
from localr1.kernels.reference import ReferenceKernels
from localr1.layers.moe import FloatExperts, PackedExperts, SeparateExperts
from localr1.layers.rope import YarnRope
from localr1.layers.router import Router
from localr1.models.api import Model
from localr1.models.config import LatentConfig
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step

# Parameters (all, active) as published or counted from the published tensors; context in tokens.
FACTS: list[tuple[dict[str, Any], int, int, int]] = [
    (R1, 671_026_419_200, 37_552_297_472, 163_840),
    (KIMI_K2, 1_026_408_232_448, 32_861_500_928, 131_072),
    (V2, 235_741_434_880, 21_375_800_320, 163_840),
    (V2_LITE, 15_706_484_224, 2_661_150_208, 163_840),
    (QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704, 40_960),
]


@pytest.mark.parametrize(("config", "parameters", "active", "context"), FACTS)
def test_released_configs_are_read(
    config: dict[str, Any], parameters: int, active: int, context: int
) -> None:
    read = parse_config(config)
    assert read.parameter_count == parameters
    assert read.active_parameter_count == active
    assert read.max_positions == context


def test_what_is_read_is_what_is_written() -> None:
    r1 = parse_config(R1)
    assert r1.latent == LatentConfig(1536, 512, 128, 64, 128, interleaved=True, bias=False)
    assert (r1.head_dim, r1.rope_size, r1.mtp_layers) == (192, 64, 1)
    assert r1.moe is not None
    assert r1.moe.layers == tuple(range(3, 61))
    assert (r1.moe.intermediate_size, r1.moe.shared_size, r1.moe.choice_bias) == (2048, 2048, True)
    assert r1.moe.router == RouterRule(
        256, 8, Scoring.SIGMOID, True, 8, 4, GroupScore.BEST_TWO, 1e-20, 2.5
    )
    assert isinstance(r1.rope, YarnRope)
    assert r1.rope.attention_factor == 1.0
    assert r1.rope.score_factor == pytest.approx(1.3688879454**2)  # 0.1 ln(40) + 1, squared.

    v2, lite = parse_config(V2), parse_config(V2_LITE)
    assert v2.moe is not None
    assert lite.moe is not None
    assert v2.moe.router == RouterRule(
        160, 6, Scoring.SOFTMAX, False, 8, 3, GroupScore.BEST, 1e-20, 16.0
    )
    assert lite.moe.router == RouterRule(64, 6, Scoring.SOFTMAX, False, epsilon=1e-20)
    assert lite.moe.shared_size == 2 * 1408
    assert lite.latent is not None
    assert lite.latent.query_rank is None

    qwen = parse_config(QWEN3_30B_A3B)
    assert qwen.moe is not None
    assert qwen.moe.router == RouterRule(128, 8, Scoring.SOFTMAX, True)
    assert qwen.moe.layers == tuple(range(48))
    sparse = parse_config({**QWEN3_30B_A3B, "decoder_sparse_step": 2, "mlp_only_layers": [3, 5]})
    assert sparse.moe is not None
    assert sparse.moe.layers == (1, *range(7, 48, 2))


def test_v2_weights_made_to_sum_to_one_are_not_scaled() -> None:
    """DeepSeek's own V2 code; transformers reads neither, and no released file has it on."""
    normalized = parse_config({**V2, "norm_topk_prob": True}).moe
    assert normalized is not None
    assert (normalized.router.normalized, normalized.router.scale) == (True, 1.0)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({**R1, "scoring_func": "softmax"}, "scoring_func is not honoured: .*'sigmoid'.*'softmax'"),
    ({**R1, "topk_method": "greedy"}, "topk_method is not honoured: .*'noaux_tc'.*'greedy'"),
    ({**V2, "scoring_func": "sigmoid"}, "scoring_func is not honoured: .*'softmax'"),
    ({**V2, "topk_method": "noaux_tc"}, "topk_method is not honoured: .*'noaux_tc'"),
    ({**V2, "rope_interleave": False}, "rope_interleave is not honoured"),
    ({**R1, "rope_scaling": {"type": "longrope", "factor": 4.0}}, "type is not honoured: .*longro"),
    ({**R1, "rope_scaling": {**R1["rope_scaling"], "twist": 2}}, "unknown field twist"),
    ({**R1, "hidden_act": "gelu"}, "hidden_act is not honoured"),
    ({**R1, "qk_head_dim": 128}, "qk_head_dim is not honoured: expected 192, found 128"),
    ({**R1, "head_dim": 128}, "head_dim is not honoured: expected 64 or 192, found 128"),
    ({**R1, "index_topk": 2048}, "unknown field index_topk"),
    ({**R1, "model_type": "deepseek_v32"}, "model_type: .*found 'deepseek_v32'"),
    ({**QWEN3_30B_A3B, "n_shared_experts": 1}, "unknown field n_shared_experts"),
    ({**QWEN3_30B_A3B, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
     "use_sliding_window is not honoured"),
]  # fmt: skip

BROKEN: list[tuple[dict[str, Any], str]] = [
    ({**R1, "num_experts_per_tok": 257}, "num_experts_per_tok: .*from 1 to 256, found 257"),
    ({**QWEN3_30B_A3B, "num_experts": 4}, "num_experts_per_tok: .*from 1 to 4, found 8"),
    ({**QWEN3_30B_A3B, "num_local_experts": 4}, r"num_local_experts: .*num_experts \(128\)"),
    ({**R1, "n_group": 7}, r"n_group: expected a divisor of n_routed_experts \(256\), found 7"),
    ({**V2, "n_group": 7}, r"n_group: expected a divisor of n_routed_experts \(160\), found 7"),
    ({**R1, "n_group": 0}, "n_group: .*found 0"),
    ({**R1, "n_group": None}, "n_group: expected a value"),
    ({**R1, "topk_group": 9}, "topk_group: .*from 1 to 8, found 9"),
    ({**R1, "n_group": 128, "topk_group": 3}, r"topk_group: .*\(8\) experts, 2 in each, found 3"),
    ({**R1, "n_group": 256, "topk_group": 8}, "n_group: .*at least 2 experts, found 256"),
    ({**R1, "n_routed_experts": 0}, "n_routed_experts: .*found 0"),
    ({**R1, "n_routed_experts": True}, "n_routed_experts: .*found true"),
    ({**R1, "n_shared_experts": -1}, "n_shared_experts: .*found -1"),
    ({**R1, "moe_intermediate_size": 0}, "moe_intermediate_size: .*found 0"),
    ({**R1, "moe_layer_freq": 0}, "moe_layer_freq: .*found 0"),
    ({**R1, "first_k_dense_replace": -1}, "first_k_dense_replace: .*found -1"),
    ({**R1, "routed_scaling_factor": float("nan")}, "routed_scaling_factor: .*found nan"),
    ({**R1, "norm_topk_prob": 1}, "norm_topk_prob: expected true or false, found 1"),
    ({**R1, "kv_lora_rank": None}, "kv_lora_rank: expected a value"),
    ({**R1, "q_lora_rank": 0}, "q_lora_rank: .*found 0"),
    ({**R1, "qk_rope_head_dim": 63}, "qk_rope_head_dim: expected an even number"),
    ({**R1, "v_head_dim": -4}, "v_head_dim: .*found -4"),
    ({**R1, "num_key_value_heads": 8}, r"num_key_value_heads: .*num_attention_heads \(128\)"),
    ({**R1, "num_nextn_predict_layers": -1}, "num_nextn_predict_layers: .*found -1"),
    ({**QWEN3_30B_A3B, "decoder_sparse_step": 0}, "decoder_sparse_step: .*found 0"),
    ({**QWEN3_30B_A3B, "mlp_only_layers": [-1]}, "mlp_only_layers: .*found -1"),
    ({**QWEN3_30B_A3B, "mlp_only_layers": "1"}, "mlp_only_layers: .*found '1'"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "message"), UNSUPPORTED, ids=[each[1] for each in UNSUPPORTED])
def test_mathematics_that_is_not_honoured_is_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_config(config)


@pytest.mark.parametrize(("config", "message"), BROKEN, ids=[each[1] for each in BROKEN])
def test_values_that_make_no_model_are_named(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(config)


@pytest.mark.parametrize("config", [R1, V2, QWEN3_30B_A3B])
def test_no_value_of_a_field_escapes_as_another_error(config: dict[str, Any]) -> None:
    values: list[Any] = [None, -1, 0, 10**30, 0.5, float("inf"), "x", [], [None], {}, True]
    for name in config:
        for value in values:
            with contextlib.suppress(LocalR1Error):
                parse_config({**config, name: value})


EXPERTS = "model.layers.1.mlp.experts."


def load(change: Change | None = None, model_type: str = "deepseek_v3", **sizes: Any) -> Model:
    theirs = tiny_transformer(model_type, 0, **sizes)
    return load_model(MemoryCheckpoint.of(theirs, change), ReferenceKernels())


WRONG: list[tuple[Change, str]] = [
    (drop(EXPERTS + "5.up_proj.weight"), r"experts\.5\.up_proj\.weight: .*\[24, 48\], found no su"),
    (drop(EXPERTS + "7.down_proj.weight"), r"experts\.7\.down_proj\.weight: .*\[48, 24\]"),
    (put(EXPERTS + "8.up_proj.weight", torch.ones(24, 48)), r"experts\.8\.up_proj\.weight: .*only"),
    (put(EXPERTS + "05.up_proj.weight", torch.ones(24, 48)), r"experts\.05\.up_proj.*: .*only"),
    (put(EXPERTS + "gate_up_proj", torch.ones(8, 48, 48)), r"experts\.gate_up_proj: .*only"),
    (put(EXPERTS + "3.gate_proj.weight", torch.ones(48, 24)), r"\[24, 48\], found \[48, 24\]"),
    (drop("model.layers.1.mlp.gate.weight"), r"mlp\.gate\.weight: expected shape \[8, 48\]"),
    (
        drop("model.layers.1.mlp.gate.e_score_correction_bias"),
        r"e_score_correction_bias: expected shape \[8\], found no such",
    ),
    (drop("model.layers.1.mlp.shared_experts.up_proj.weight"), r"shared_experts\.up_proj\.weight"),
    (put("model.layers.0.mlp.gate.weight", torch.ones(8, 48)), r"0\.mlp\.gate\.weight: .*only"),
    (drop("model.layers.1.self_attn.kv_a_layernorm.weight"), r"kv_a_layernorm.*\[20\]"),
    (
        put("model.layers.1.self_attn.kv_b_proj.weight", torch.ones(80, 20)),
        r"kv_b_proj\.weight: expected shape \[88, 20\], found \[80, 20\]",
    ),
    (
        put("model.layers.1.self_attn.q_proj.weight", torch.ones(80, 48)),
        r"q_proj\.weight: expected only",
    ),
    # One layer of prediction is announced (transformers writes that too): the third is left over.
    (put("model.layers.3.enorm.weight", torch.ones(48)), r"layers\.3\.enorm\.weight: .*only"),
    (put("model.layers.02.enorm.weight", torch.ones(48)), r"layers\.02\.enorm\.weight: .*only"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[case[1] for case in WRONG])
def test_weights_that_do_not_fit_the_config_are_named(change: Change, message: str) -> None:
    with pytest.raises(TensorError, match=message):
        load(change)


def test_an_expert_stored_both_packed_and_not_is_refused() -> None:
    theirs = tiny_transformer("qwen3_moe", 0, **PACKABLE)
    checkpoint = packed_checkpoint(theirs, keep=lambda prefix: ".experts." not in prefix)
    checkpoint.put(EXPERTS + "2.up_proj.weight", torch.ones(32, 64))
    with pytest.raises(UnsupportedError, match=r"experts\.2\.up_proj\.weight beside"):
        load_model(checkpoint, ReferenceKernels())


def test_multi_token_prediction_layers_are_left_out() -> None:
    def add_layer(tensors: dict[str, Tensor]) -> None:
        layer = {
            name.replace("layers.1.", "layers.2."): value
            for name, value in tensors.items()
            if "layers.1." in name
        }
        tensors.update(layer)
        tensors["model.layers.2.eh_proj.weight"] = torch.ones(48, 96)
        tensors["model.layers.2.shared_head.head.weight"] = torch.ones(97, 48)

    plain, extended = load(), load(add_layer)
    assert extended.config.mtp_layers == 1
    assert extended.weight_bytes == plain.weight_bytes
    ids = prompt(0, 12)
    assert torch.equal(run_in_chunks(plain, ids, [12]), run_in_chunks(extended, ids, [12]))
    with pytest.raises(TensorError, match=r"model\.layers\.2\.\S+ and 39 more: expected only"):
        load(add_layer, num_nextn_predict_layers=0)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_the_parameters_counted_are_those_loaded(model_type: str) -> None:
    model = load(model_type=model_type, attention_bias=True)
    assert model.weight_bytes == 4 * model.config.parameter_count


ROUNDING = 0.05
"""What 8-bit activations may move the logits by, as a share of their norm: about 0.02 to 0.03 here.
Matrices that are not where they belong move them by more than half; test_models_quantized asks for
more than this of the arithmetic itself."""
PACKABLE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "head_dim": 32,
}


@pytest.mark.parametrize(
    ("kept", "packed_kind"),
    [
        ("down_proj", SeparateExperts),
        (".experts.5.", SeparateExperts),
        ("nothing", PackedExperts),
    ],
)
def test_packed_experts_compute_what_their_values_say(
    kept: str, packed_kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts packed at 8 bits, in whole or in part, against floats of the same values."""
    theirs = tiny_transformer("qwen3_moe", 0, **PACKABLE)
    checkpoint = packed_checkpoint(
        theirs, 8, keep=lambda prefix: ".experts." not in prefix or kept in prefix
    )
    packed = load_model(checkpoint, ReferenceKernels())
    floats = load_model(MemoryCheckpoint.of(theirs), ReferenceKernels())
    ids, used = prompt(0, 24), set()
    for kind in (SeparateExperts, FloatExperts, PackedExperts):

        def spied(self: Any, *arguments: Any, right: Any = kind.__call__) -> None:
            used.add(type(self))
            right(self, *arguments)

        monkeypatch.setattr(kind, "__call__", spied)
    expected = run_in_chunks(floats, ids, [24])
    assert used == {FloatExperts}
    difference = run_in_chunks(packed, ids, [24]) - expected
    assert used == {FloatExperts, packed_kind}
    assert difference.norm() <= ROUNDING * expected.norm()


def test_packed_rows_are_reordered_with_their_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention whose query rows are interleaved, packed: against floats of equal values."""
    sizes = {**PACKABLE, "q_lora_rank": 32, "kv_lora_rank": 32, "v_head_dim": 16}
    del sizes["head_dim"]
    theirs = tiny_transformer("deepseek_v3", 0, **sizes)
    checkpoint = packed_checkpoint(theirs, 8, keep=lambda prefix: "self_attn" not in prefix)
    packed = load_model(checkpoint, ReferenceKernels())
    floats = load_model(MemoryCheckpoint.of(theirs), ReferenceKernels())
    ids = prompt(0, 24)
    expected = run_in_chunks(floats, ids, [20])
    difference = run_in_chunks(packed, ids, [20]) - expected
    assert difference.norm() <= ROUNDING * expected.norm()
    assert packed.new_cache(4).position_bytes == 2 * 2 * 40  # float16: half the bytes.
    monkeypatch.setattr("localr1.models.weights.replace", lambda weight, **parts: weight)
    unordered = run_in_chunks(load_model(checkpoint, ReferenceKernels()), ids, [20]) - expected
    assert unordered.norm() > 10 * ROUNDING * expected.norm()


def test_equal_scores_choose_the_lower_expert() -> None:
    rule = RouterRule(6, 3, Scoring.SIGMOID, normalized=True, epsilon=1e-20, scale=2.0)
    router = Router(
        ReferenceKernels(), rule, torch.zeros(6, 4), torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    )
    routing = router(torch.ones(2, 4))
    assert routing.experts.tolist() == [[1, 3, 0]] * 2
    assert torch.allclose(routing.weights, torch.full((2, 3), 2 / 3))
    grouped = dataclasses.replace(rule, num_groups=3, experts_per_token=2)
    assert Router(ReferenceKernels(), grouped, torch.zeros(6, 4), None)(
        torch.ones(1, 4)
    ).experts.tolist() == [[0, 1]]


def test_scores_of_almost_zero_are_not_normalized_to_nan() -> None:
    rule = RouterRule(2, 1, Scoring.SIGMOID, normalized=True, epsilon=1e-20)
    weights = Router(ReferenceKernels(), rule, torch.full((2, 1), -200.0), None)(
        torch.ones(1, 1)
    ).weights
    assert weights.abs().max() < 1e-15


def test_a_token_alone_gets_what_it_gets_in_a_batch() -> None:
    model = load()
    ids = prompt(0, 20)
    together = model.forward(Step(ids, 0, all_logits=True), model.new_cache(20))
    alone = run_in_chunks(model, ids, [1])
    assert (together - alone).abs().max() <= 1e-4
