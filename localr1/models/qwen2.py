"""Qwen1.5, Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen."""

from collections.abc import Mapping

from localr1.models.config import ModelConfig, read_decoder


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """Always a bias on q, k and v, never on o; sliding windows must be off."""
    return read_decoder(config, qkv_bias=True, sliding_window=True)
