"""Qwen3 (dense) and DeepSeek-R1-0528-Qwen3-8B."""

from collections.abc import Mapping

from localr1.models.config import ModelConfig, read_decoder

HEAD_DIM = 128
"""Where config.json gives none: Qwen3's does not follow from hidden_size / heads."""


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """RMS norm on every query and key head before the rope; sliding windows must be off."""
    return read_decoder(
        config,
        default_head_dim=HEAD_DIM,
        attention_bias="attention_bias",
        qk_norm=True,
        sliding_window=True,
    )
