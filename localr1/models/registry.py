"""Which architectures there are. Adding one: its file, one line here, one tiny-config test."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from localr1.checkpoint.api import Checkpoint
from localr1.errors import UnsupportedError
from localr1.kernels.api import Kernels
from localr1.models import deepseek_v2, deepseek_v3, llama, qwen2, qwen3, qwen3_moe
from localr1.models.api import Model
from localr1.models.config import ModelConfig
from localr1.models.decoder import load_decoder
from localr1.models.fields import Fields, describe


class Load(Protocol):
    """As `load_decoder`."""

    def __call__(
        self,
        checkpoint: Checkpoint,
        config: ModelConfig,
        kernels: Kernels,
        *,
        leave_experts: bool = False,
    ) -> Model: ...


@dataclass(frozen=True)
class Architecture:
    """parse_config: config.json -> what the model is. load: reads the weights of it."""

    parse_config: Callable[[Mapping[str, object]], ModelConfig]
    load: Load


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(llama.parse_config, load_decoder),
    "qwen2": Architecture(qwen2.parse_config, load_decoder),
    "qwen3": Architecture(qwen3.parse_config, load_decoder),
    "qwen3_moe": Architecture(qwen3_moe.parse_config, load_decoder),
    "deepseek_v2": Architecture(deepseek_v2.parse_config, load_decoder),
    "deepseek_v3": Architecture(deepseek_v3.parse_config, load_decoder),
    "kimi_k2": Architecture(deepseek_v3.parse_config, load_decoder),
}
"""By `model_type` of config.json."""


def architecture_of(config: Mapping[str, object]) -> Architecture:
    """Raises UnsupportedError, listing what is supported, or ConfigError when there is none."""
    name = Fields(config, "config.json").text("model_type")
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            "config.json: model_type",
            expected="one of " + ", ".join(ARCHITECTURES),
            found=describe(name),
            fix="localr1 does not have this architecture.",
        )
    return ARCHITECTURES[name]


def parse_config(config: Mapping[str, object]) -> ModelConfig:
    """config.json, parsed, to what the model is. Raises ConfigError and UnsupportedError."""
    return architecture_of(config).parse_config(config)


def load_model(checkpoint: Checkpoint, kernels: Kernels, *, leave_experts: bool = False) -> Model:
    """Read a model's config and all its weights into memory; where `leave_experts`, all but routed
    experts that are packed alike.

    Raises ConfigError, UnsupportedError, CheckpointError (TensorError, TruncatedError) and
    KernelError.
    """
    architecture = architecture_of(checkpoint.config)
    config = architecture.parse_config(checkpoint.config)
    return architecture.load(checkpoint, config, kernels, leave_experts=leave_experts)
