"""Float models against transformers, in float32, over prompts with and without a cache.

TOLERANCE bounds the largest difference of any logit. Float32 sums in another order differ by some
1e-5 here, as logits reach about 10 (see tiny_models); each planted error below moves them by more
than SEEN, a hundred times the tolerance.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import (
    MemoryCheckpoint,
    prompt,
    run_in_chunks,
    tiny_transformer,
    transformer_logits,
)
from torch import Tensor

from localr1.checkpoint.reader import open_checkpoint
from localr1.kernels.api import Kernels, RopeTable
from localr1.kernels.reference import ReferenceKernels
from localr1.layers import attention, rope
from localr1.layers.linear import FloatLinear
from localr1.models.api import Model
from localr1.models.config import ModelConfig
from localr1.models.decoder import load_decoder
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step

TOLERANCE = 1e-4
SEEN = 1e-2
LENGTH = 40

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-heads-equal": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa-3": (
        "llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "llama-gqa-4": (
        "llama",
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2},
    ),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-head-dim": ("llama", {"head_dim": 20}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama-llama3": ("llama", {"rope_scaling": LLAMA3}),
    "llama-yarn": ("llama", {"rope_scaling": YARN}),
    "qwen2": ("qwen2", {}),
    "qwen2-heads-equal": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-gqa-3": (
        "qwen2",
        {"hidden_size": 72, "num_attention_heads": 6, "num_key_value_heads": 2},
    ),
    "qwen2-mqa-tied": ("qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-gqa-4": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen3-heads-equal-tied": (
        "qwen3",
        {"head_dim": 12, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3-biases": ("qwen3", {"head_dim": 24, "attention_bias": True}),
    "qwen3-yarn": (
        "qwen3",
        {"head_dim": 16, "rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5}},
    ),
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
) -> Model:
    checkpoint = MemoryCheckpoint.of(theirs)
    return load_decoder(checkpoint, change(parse_config(checkpoint.config)), ReferenceKernels())


def difference_with(case: str, sizes: list[int], **kwargs: Any) -> float:
    model_type, changes = CASES[case]
    theirs = tiny_transformer(model_type, 0, **changes)
    ids = prompt(0, LENGTH)
    ours = run_in_chunks(load(theirs, **kwargs), ids, sizes)
    return (ours - transformer_logits(theirs, ids)).abs().max().item()


def test_an_error_in_the_epsilon_is_seen() -> None:
    assert (
        difference_with(
            "llama", [LENGTH], change=lambda config: dataclasses.replace(config, rms_norm_eps=1e-6)
        )
        > SEEN
    )


@pytest.mark.parametrize("case", ["llama-linear", "llama-llama3", "llama-yarn", "qwen3-yarn"])
def test_a_forgotten_rope_scaling_is_seen(case: str) -> None:
    def plain(config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, rope=rope.DefaultRope(config.rope.theta))

    assert difference_with(case, [LENGTH], change=plain) > SEEN


def test_a_forgotten_yarn_attention_factor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rope.YarnRope, "attention_factor", 1.0)
    assert difference_with("qwen2-yarn", [LENGTH]) > SEEN


def test_a_swapped_rope_half_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(x: Tensor, table: RopeTable, start: int) -> Tensor:
        return rope.apply_rope(x, RopeTable(table.cos, -table.sin), start)

    def interleaved(x: Tensor, table: RopeTable, start: int) -> Tensor:
        order = torch.arange(x.shape[2]).view(-1, 2).T.reshape(-1)
        return rope.apply_rope(x[..., order], table, start)[..., order.argsort()]

    only_keys = iter([swapped, rope.apply_rope] * 100)
    monkeypatch.setattr(attention, "apply_rope", lambda *args: next(only_keys)(*args))
    assert difference_with("llama", [LENGTH]) > SEEN
    monkeypatch.setattr(attention, "apply_rope", interleaved)
    assert difference_with("llama", [LENGTH]) > SEEN


def test_a_chunk_placed_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def one_short(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
        return right(q, k, v, max(start - 1, 0), scale)

    monkeypatch.setattr(attention, "attend", one_short)
    assert difference_with("llama", [LENGTH]) <= TOLERANCE
    assert difference_with("llama", [17, 23]) > SEEN


def test_a_wrong_key_head_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def strided(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
        tokens, heads, head_dim = q.shape
        order = torch.arange(heads).view(-1, k.shape[0]).T.reshape(-1)
        out = right(q[:, order], k, v, start, scale).view(tokens, heads, head_dim)
        return out[:, order.argsort()].reshape(tokens, -1)

    monkeypatch.setattr(attention, "attend", strided)
    assert difference_with("llama-gqa-3", [LENGTH]) > SEEN


@pytest.mark.parametrize(
    ("case", "matrix"),
    [("llama-biases", matrix) for matrix in "qkvo"] + [("qwen2", matrix) for matrix in "qkv"],
)
def test_a_forgotten_bias_is_seen(case: str, matrix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.build_attention

    def forgetful(parts: attention.AttentionParts, kernels: Kernels) -> attention.AttentionBlock:
        linear = getattr(parts, matrix)
        assert linear.bias is not None
        change: dict[str, Any] = {matrix: FloatLinear(linear.weight)}
        return right(dataclasses.replace(parts, **change), kernels)

    monkeypatch.setattr("localr1.models.decoder.build_attention", forgetful)
    # A key bias before the rope is the least visible: without positions softmax cancels it.
    assert difference_with(case, [LENGTH]) > SEEN


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_a_forgotten_head_norm_is_seen(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.build_attention
    monkeypatch.setattr(
        "localr1.models.decoder.build_attention",
        lambda parts, kernels: right(dataclasses.replace(parts, **{norm: None}), kernels),
    )
    assert difference_with("qwen3", [LENGTH]) > SEEN


def test_the_last_token_alone_gives_the_same_logits() -> None:
    model = load(tiny_transformer("qwen3", 0, head_dim=16))
    ids = prompt(0, LENGTH)
    every = model.forward(Step(ids, 0, all_logits=True), model.new_cache(LENGTH))
    last = model.forward(Step(ids, 0), model.new_cache(LENGTH))
    assert every.shape == (LENGTH, 97)
    assert last.shape == (1, 97)
    torch.testing.assert_close(last, every[-1:], rtol=0, atol=TOLERANCE)
