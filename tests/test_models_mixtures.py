"""DeepSeek-V2, V3 and Qwen3's mixtures against transformers, in float32, over prompts with and
without a cache, and what each planted error does to them.

TOLERANCE and SEEN as in test_models_parity: sums in another order against errors a hundred times as
large. No router is near enough to a tie in these prompts for rounding to change a choice: that
would show as a failure, not pass in silence.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    MemoryCheckpoint,
    prompt,
    run_in_chunks,
    tiny_transformer,
    transformer_logits,
)
from torch import Tensor

from localr1.checkpoint.reader import open_checkpoint
from localr1.kernels import mixture
from localr1.kernels.api import GroupScore, RopeTable, Routing, Scoring
from localr1.kernels.reference import ReferenceKernels
from localr1.layers import mla, moe, rope, router
from localr1.models import latent_weights
from localr1.models.config import ModelConfig
from localr1.models.decoder import Decoder, load_decoder
from localr1.models.registry import load_model, parse_config

TOLERANCE = 1e-4
SEEN = 1e-2
LENGTH = 40

YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
UNLIKE = {**YARN, "mscale": 0.707, "mscale_all_dim": 1.3, "beta_fast": 8.0, "beta_slow": 0.5}
EDGE = {**YARN, "beta_fast": 1.0, "beta_slow": 1.0}
GREEDY = {"topk_method": "greedy"}
GROUPED = {"topk_method": "group_limited_greedy"}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}),
    "v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "v3-all-groups": ("deepseek_v3", {"n_group": 4, "topk_group": 4}),
    "v3-one-of-two-groups": ("deepseek_v3", {"n_group": 2, "topk_group": 1}),
    "v3-not-normalized": ("deepseek_v3", {"norm_topk_prob": False}),
    "v3-one-expert": ("deepseek_v3", {"num_experts_per_tok": 1}),
    "v3-all-experts": ("deepseek_v3", {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1}),
    "v3-two-shared": ("deepseek_v3", {"n_shared_experts": 2}),
    "v3-no-dense-layer": ("deepseek_v3", {"first_k_dense_replace": 0}),
    "v3-only-dense-layers": ("deepseek_v3", {"first_k_dense_replace": 2}),
    "v3-no-query-latent": ("deepseek_v3", {"q_lora_rank": None}),
    "v3-half-rope": ("deepseek_v3", {"rope_interleave": False}),
    "v3-half-rope-yarn": ("deepseek_v3", {"rope_interleave": False, "rope_scaling": YARN}),
    "v3-yarn": ("deepseek_v3", {"rope_scaling": YARN}),
    "v3-yarn-unlike": ("deepseek_v3", {"rope_scaling": UNLIKE, "q_lora_rank": None}),
    "v3-yarn-edge": ("deepseek_v3", {"rope_scaling": EDGE}),
    "v3-biases": ("deepseek_v3", {"attention_bias": True}),
    "v3-tied": ("deepseek_v3", {"tie_word_embeddings": True}),
    "v3-small-latent": ("deepseek_v3", {"kv_lora_rank": 4}),
    "v2": ("deepseek_v2", GREEDY),
    "v2-grouped": ("deepseek_v2", GROUPED),
    "v2-one-of-two-groups": ("deepseek_v2", {**GROUPED, "n_group": 2, "topk_group": 1}),
    "v2-groups-of-one": ("deepseek_v2", {**GROUPED, "n_group": 8, "topk_group": 4}),
    "v2-no-query-latent": ("deepseek_v2", {**GREEDY, "q_lora_rank": None, "n_shared_experts": 2}),
    "v2-biases": ("deepseek_v2", {**GREEDY, "attention_bias": True, "mlp_bias": True}),
    "v2-yarn": ("deepseek_v2", {**GROUPED, "rope_scaling": UNLIKE}),
    "qwen3": ("qwen3_moe", {"head_dim": 16}),
    "qwen3-normalized": ("qwen3_moe", {"norm_topk_prob": True, "num_key_value_heads": 1}),
    "qwen3-one-expert": ("qwen3_moe", {"num_experts_per_tok": 1, "attention_bias": True}),
    "qwen3-dense-layer": ("qwen3_moe", {"mlp_only_layers": [1]}),
    "qwen3-every-second": ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3-yarn-tied": ("qwen3_moe", {"rope_scaling": YARN, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, seed: int, tmp_path: Path) -> None:
    model_type, changes = CASES[case]
    theirs = tiny_transformer(model_type, seed, **changes)
    theirs.save_pretrained(tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        ours = load_model(checkpoint, ReferenceKernels())
    ids = prompt(seed, LENGTH)
    expected = transformer_logits(theirs, ids)
    assert expected.abs().max() > 3.0, "logits too small for the tolerance to mean anything"
    for sizes in ([LENGTH], [17, 11], [1]):
        difference = (run_in_chunks(ours, ids, sizes) - expected).abs().max().item()
        assert difference <= TOLERANCE, f"chunks {sizes}"


def load(
    theirs: Any, change: Callable[[ModelConfig], ModelConfig] = lambda config: config
) -> Decoder:
    checkpoint = MemoryCheckpoint.of(theirs)
    return load_decoder(checkpoint, change(parse_config(checkpoint.config)), ReferenceKernels())


def difference_with(case: str, **kwargs: Any) -> float:
    """Of prefill and decode together: half the prompt at once, the rest one by one."""
    model_type, changes = CASES[case]
    theirs = tiny_transformer(model_type, 0, **changes)
    ids = prompt(0, LENGTH)
    ours = run_in_chunks(load(theirs, **kwargs), ids, [LENGTH // 2])
    return (ours - transformer_logits(theirs, ids)).abs().max().item()


def with_router(**changes: Any) -> Callable[[ModelConfig], ModelConfig]:
    def change(config: ModelConfig) -> ModelConfig:
        assert config.moe is not None
        rule = dataclasses.replace(config.moe.router, **changes)
        return dataclasses.replace(config, moe=dataclasses.replace(config.moe, router=rule))

    return change


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("v3", {"scale": 1.0}),
        ("v2", {"scale": 1.0}),
        ("v3", {"normalized": False}),
        ("v3-not-normalized", {"normalized": True}),
        ("qwen3-normalized", {"normalized": False}),
        ("v3", {"num_groups": 1, "groups_per_token": 1}),
        ("v2-grouped", {"num_groups": 1, "groups_per_token": 1}),
        ("v3", {"group_score": GroupScore.BEST}),
        ("v2-grouped", {"group_score": GroupScore.BEST_TWO}),
        ("v3", {"scoring": Scoring.SOFTMAX}),
        ("v2", {"scoring": Scoring.SIGMOID}),
        ("v3", {"experts_per_token": 2}),
    ],
    ids=str,
)
def test_a_wrong_router_is_seen(case: str, changes: dict[str, Any]) -> None:
    assert difference_with(case, change=with_router(**changes)) > SEEN


def test_a_bias_in_the_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = router.Router.__call__

    def biased(self: router.Router, x: Tensor) -> Routing:
        experts = right(self, x).experts
        assert self.choice_bias is not None
        scores = (x @ self.weight.T).sigmoid() + self.choice_bias
        weights = scores.gather(1, experts)
        weights = weights / weights.sum(1, keepdim=True) * self.rule.scale
        return Routing(experts, weights)

    monkeypatch.setattr(router.Router, "__call__", biased)
    assert difference_with("v3") > SEEN


def test_a_forgotten_bias_on_the_choice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = router.Router.__call__
    monkeypatch.setattr(
        router.Router,
        "__call__",
        lambda self, x: right(dataclasses.replace(self, choice_bias=None), x),
    )
    assert difference_with("v3") > SEEN


@pytest.mark.parametrize("case", ["v3", "v2"])
def test_a_forgotten_shared_expert_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = moe.MoeBlock.__call__
    monkeypatch.setattr(
        moe.MoeBlock,
        "__call__",
        lambda self, x: right(dataclasses.replace(self, shared=None), x),
    )
    assert difference_with(case) > SEEN


@pytest.mark.parametrize("case", ["v3", "v2", "qwen3"])
def test_experts_combined_wrongly_are_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "localr1.layers.moe.combine",
        lambda outputs, weights: mixture.combine(outputs, weights.flip(1)),
    )
    assert difference_with(case) > SEEN


def test_gate_and_up_exchanged_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localr1.models.moe_weights.GATE", "up_proj")
    monkeypatch.setattr("localr1.models.moe_weights.UP", "gate_proj")
    assert difference_with("qwen3") > SEEN


@pytest.mark.parametrize("case", ["v3", "v2", "v3-half-rope"])
def test_a_swapped_rope_half_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped_keys(x: Tensor, table: RopeTable, start: int) -> Tensor:
        if x.shape[1] == 1:  # The keys have one head.
            table = RopeTable(table.cos, -table.sin)
        return rope.apply_rope(x, table, start)

    monkeypatch.setattr(mla, "apply_rope", swapped_keys)
    assert difference_with(case) > SEEN


@pytest.mark.parametrize("case", ["v3", "v2", "v3-half-rope"])
def test_the_other_rope_layout_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = latent_weights.load_latent_attention

    def exchanged(loader: Any, prefix: str, config: Any, latent: Any) -> mla.LatentAttention:
        other = dataclasses.replace(latent, interleaved=not latent.interleaved)
        return right(loader, prefix, config, other)

    monkeypatch.setattr("localr1.models.decoder.load_latent_attention", exchanged)
    assert difference_with(case) > SEEN


@pytest.mark.parametrize("case", ["v3-yarn", "v3-half-rope-yarn", "v2-yarn"])
def test_a_wrong_mscale_is_seen(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = vars(rope.YarnRope)["score_factor"]
    monkeypatch.setattr(rope.YarnRope, "score_factor", 1.0)
    assert difference_with(case) > SEEN, "forgotten"
    unsquared = property(lambda self: right.fget(self) ** 0.5)
    monkeypatch.setattr(rope.YarnRope, "score_factor", unsquared)
    assert difference_with(case) > SEEN, "not squared"


def test_a_wrong_ratio_of_mscales_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope.YarnRope, "attention_factor", 1.0)
    assert difference_with("v3-yarn") <= TOLERANCE, "equal mscales cancel"
    assert difference_with("v3-yarn-unlike") > SEEN


def test_the_epsilon_of_the_latents_norms_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "LATENT_NORM_EPS", 1e-2)
    assert difference_with("v3") > SEEN


def test_a_look_into_the_future_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = mla._hide_future
    monkeypatch.setattr(
        mla, "_hide_future", lambda scores, begin, start: right(scores, begin, start + 1)
    )
    assert difference_with("v3") > SEEN


@pytest.mark.parametrize("every", [1, 2])
def test_mixtures_in_every_second_layer(every: int) -> None:
    """DeepSeek's own field, which transformers does not read: there the MLPs are put in by hand."""
    sizes = {"first_k_dense_replace": 0, "num_hidden_layers": 3}
    theirs = tiny_transformer("deepseek_v3", 0, **sizes)
    dense = tiny_transformer("deepseek_v3", 1, **{**sizes, "first_k_dense_replace": 3})
    if every == 2:
        theirs.model.layers[1].mlp = dense.model.layers[1].mlp
    checkpoint = MemoryCheckpoint.of(theirs)
    checkpoint.config = {**checkpoint.config, "moe_layer_freq": every}
    ours = load_model(checkpoint, ReferenceKernels())
    ids = prompt(0, LENGTH)
    difference = run_in_chunks(ours, ids, [LENGTH]) - transformer_logits(theirs, ids)
    assert difference.abs().max() <= TOLERANCE
