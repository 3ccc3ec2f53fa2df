"""DeepSeek-V2, V3 and Qwen3's mixtures against transformers, in float32, over prompts with and
without a cache, and what each planted error does to them.

TOLERANCE and SEEN as in test_models_parity: sums in another order against errors a hundred times as
large. No router is near enough to a tie in these prompts for rounding to change a choice: that
would show as a failure, not pass in silence.
"""

from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    prompt,
    run_in_chunks,
    tiny_transformer,
    transformer_logits,
)

from localr1.checkpoint.reader import open_checkpoint
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model

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
