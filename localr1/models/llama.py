"""Llama 1-3.x and what shares its graph: SmolLM2, DeepSeek-R1-Distill-Llama."""

from collections.abc import Mapping

from localr1.models.config import ModelConfig, read_decoder


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """Biases only where the file asks for them: `attention_bias` puts one on q, k, v and o."""
    return read_decoder(config, attention_bias="attention_bias", mlp_bias="mlp_bias")
