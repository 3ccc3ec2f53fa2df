"""Frequencies and tables against transformers' own, on released configs."""

from typing import Any

import pytest
import torch
from released_configs import RELEASED
from tiny_models import CLASSES
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from localr1.errors import MemoryLimitError
from localr1.layers.rope import (
    INITIAL_POSITIONS,
    DefaultRope,
    LinearRope,
    Llama3Rope,
    Rope,
    YarnRope,
)
from localr1.models.registry import parse_config

ODD_SCALINGS: dict[str, dict[str, Any]] = {
    "yarn-mscale": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn-equal-mscale": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn-mscale-alone": {"factor": 40.0, "mscale": 2.0},
    "yarn-attention-factor": {"factor": 4.0, "attention_factor": 1.25},
    "yarn-betas": {"factor": 4.0, "beta_fast": 64, "beta_slow": 2.5},
    "yarn-exact-range": {"factor": 32.0, "truncate": False},
    "yarn-small-context": {"factor": 4.0, "original_max_position_embeddings": 16},
    "yarn-no-stretch": {"factor": 1.0},
}
CONFIGS = {
    **RELEASED,
    **{
        name: {
            **RELEASED["qwen3-0.6b"],
            "rope_scaling": {
                "rope_type": "yarn",
                "original_max_position_embeddings": 4096,
                **scaling,
            },
        }
        for name, scaling in ODD_SCALINGS.items()
    },
}


def theirs(config: dict[str, Any]) -> LlamaRotaryEmbedding:
    config_class, _ = CLASSES[config["model_type"]]
    fields = {name: value for name, value in config.items() if name != "model_type"}
    # All three models have the same module; only what the config class makes of the fields differs.
    return LlamaRotaryEmbedding(config_class(**fields))


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_equal_those_of_transformers(name: str) -> None:
    config = parse_config(CONFIGS[name])
    module = theirs(CONFIGS[name])
    assert torch.equal(config.rope.inverse_frequencies(config.head_dim), module.inv_freq)
    if name != "r1-0528-qwen3-8b":
        assert config.rope.attention_factor == pytest.approx(module.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b-yarn", "smollm2-135m"])
def test_tables_equal_those_of_transformers(name: str) -> None:
    config = parse_config(CONFIGS[name])
    positions = torch.tensor([0, 1, 2, 511, 512, 4095, 32767])
    cos, sin = theirs(CONFIGS[name])(torch.zeros(1), positions[None])
    table = Rope(config.rope, config.head_dim).table(32768)
    half = config.head_dim // 2
    # One float32 product and one cosine: the same operations give the same bits.
    assert torch.equal(table.cos[positions], cos[0, :, :half])
    assert torch.equal(table.sin[positions], sin[0, :, :half])


def test_r1_0528_was_released_with_an_attention_factor_of_one() -> None:
    """Its `attn_factor` cancels YaRN's own factor; transformers ignores the field and so scales
    queries and keys by 1.139 each, vLLM and SGLang multiply by it."""
    config = parse_config(RELEASED["r1-0528-qwen3-8b"])
    assert isinstance(config.rope, YarnRope)
    assert config.rope.attention_factor == pytest.approx(1.0, abs=1e-12)


def test_the_table_grows_by_doubling_and_keeps_its_rows() -> None:
    rope = Rope(DefaultRope(10_000.0), 64)
    first = rope.table(3)
    assert first.cos.shape == (INITIAL_POSITIONS, 32)
    assert first.cos.dtype == torch.float32
    assert rope.table(INITIAL_POSITIONS) is first
    second = rope.table(INITIAL_POSITIONS + 1)
    assert second.cos.shape == (2 * INITIAL_POSITIONS, 32)
    assert torch.equal(second.sin[:INITIAL_POSITIONS], first.sin)


def test_variants_are_what_they_say() -> None:
    plain = DefaultRope(10_000.0).inverse_frequencies(8)
    assert plain.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    linear = LinearRope(10_000.0, factor=4.0).inverse_frequencies(8)
    assert torch.equal(linear, plain / 4)
    # 4096 positions hold 652, 65, 6.5 and 0.65 turns: the last is under one, so it is stretched.
    llama3 = Llama3Rope(10_000.0, 8.0, 1.0, 4.0, 4096).inverse_frequencies(8)
    assert llama3.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001 / 8])
    yarn = YarnRope(10_000.0, 4.0, 4096).inverse_frequencies(8)
    assert yarn[0] == plain[0]
    assert yarn[3] == pytest.approx(plain[3].item() / 4)


def test_no_memory_for_the_table_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rope = Rope(DefaultRope(10_000.0), 64)
    with monkeypatch.context() as patch:

        def scarce(*args: Any) -> torch.Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        patch.setattr(torch, "outer", scarce)
        with pytest.raises(MemoryLimitError, match="memory for 600 positions, found Default"):
            rope.table(600)
    assert rope.table(600).cos.shape == (600, 32)
