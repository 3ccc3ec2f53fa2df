"""Tiny random models of transformers, and a checkpoint that lives in memory."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.errors import TensorError
from localr1.models.api import Model
from localr1.models.step import Step

VOCABULARY = 97

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
}

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Large, so that an epsilon which is not the config's shows in the logits.
    "rms_norm_eps": 1e-2,
    "rope_theta": 100.0,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}

DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "routed_scaling_factor": 1.7,
}
"""No two sizes that could be taken for one another are equal."""

OF_TYPE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}


def tiny_transformer(model_type: str, seed: int, **changes: Any) -> Any:
    """A transformers model in float32 whose every parameter matters.

    transformers starts from weights of deviation 0.02 and biases of zero: the logits of a tiny
    model are then about 0.01 and its attention is uniform, so a tolerance of 1e-4 would let most
    errors pass. Here matrices keep the size of what flows through them, so that logits reach about
    10, attention is peaked, and biases and norms are as large as what they act on.
    """
    config_class, model_class = CLASSES[model_type]
    sizes = {**TINY, **OF_TYPE.get(model_type, {}), **changes}
    model = model_class(config_class(**sizes)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                is_table = "embed_tokens" in name or "lm_head" in name
                gain = 3.0 if is_table else 1.5
                parameter.copy_(noise * gain / parameter.shape[-1] ** 0.5)
            elif "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_(0.5 * noise)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # As large as the scores' differences.
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def prompt(seed: int, length: int, vocabulary: int = VOCABULARY) -> Tensor:
    """int64 [length]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, vocabulary, (length,), generator=generator)


def transformer_logits(model: Any, ids: Tensor) -> Tensor:
    """float32 [T, vocabulary], without a cache."""
    with torch.no_grad():
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits


def run_in_chunks(model: Model, ids: Tensor, sizes: list[int], limit: int | None = None) -> Tensor:
    """Logits [T, vocabulary] of all tokens, fed in chunks of the given sizes and, after those, one
    at a time."""
    cache = model.new_cache(len(ids) if limit is None else limit)
    rows: list[Tensor] = []
    start = 0
    while start < len(ids):
        size = sizes[len(rows)] if len(rows) < len(sizes) else 1
        rows.append(model.forward(Step(ids[start : start + size], start, all_logits=True), cache))
        start += size
    return torch.cat(rows)


def unfused(name: str, value: Tensor) -> dict[str, Tensor]:
    """Experts, which transformers holds stacked, under the names each has in a file."""
    stem, _, part = name.rpartition(".")
    if not stem.endswith(".experts"):
        return {name: value}
    parts = ["gate_proj", "up_proj"] if part == "gate_up_proj" else [part]
    return {
        f"{stem}.{expert}.{each}.weight": matrix.clone()
        for expert, matrices in enumerate(value)
        for each, matrix in zip(parts, matrices.chunk(len(parts)), strict=True)
    }


def stored_matrix(model: Any, name: str) -> Tensor:
    """The parameter that is called so in a file, or the part of a fused one, to write into."""
    stem, experts, rest = name.partition(".experts.")
    if not experts:
        parameter: Tensor = model.get_parameter(name)
        return parameter
    expert, part, _ = rest.split(".")
    fused = "down_proj" if part == "down_proj" else "gate_up_proj"
    matrix: Tensor = model.get_parameter(f"{stem}.experts.{fused}")[int(expert)]
    return matrix if part == "down_proj" else matrix.chunk(2)[part == "up_proj"]


class MemoryCheckpoint:
    """A `Checkpoint` over tensors in memory, for what a file is not needed for."""

    format = "safetensors"
    path = Path("memory")
    generation_config: Mapping[str, Any] = {}

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self._tensors = dict(tensors)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        names = {
            torch.float32: "F32",
            torch.float16: "F16",
            torch.bfloat16: "BF16",
            torch.int32: "I32",
            torch.int64: "I64",
        }
        return {
            name: TensorInfo(name, names[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise TensorError(f"tensor {name}", expected="a tensor", found="none")
        return self._tensors[name].clone()

    def put(self, name: str, value: Tensor) -> None:
        self._tensors[name] = value

    def tokenizer_files(self) -> TokenizerFiles:
        raise NotImplementedError

    def close(self) -> None:
        return

    def __enter__(self) -> "MemoryCheckpoint":
        return self

    def __exit__(self, *exc: object) -> None:
        return

    @classmethod
    def of(
        cls, model: Any, change: Callable[[dict[str, Tensor]], None] | None = None
    ) -> "MemoryCheckpoint":
        """What `save_pretrained` would write of a transformers model, changed as asked."""
        tensors: dict[str, Tensor] = {}
        for name, value in model.state_dict().items():
            tensors |= unfused(name, value.detach().clone())
        if model.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        if change is not None:
            change(tensors)
        return cls(model.config.to_dict(), tensors)


Change = Callable[[dict[str, Tensor]], None]
"""What a test does to a checkpoint's tensors before the model is loaded."""


def put(name: str, value: Tensor) -> Change:
    return lambda tensors: tensors.update({name: value})


def drop(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change
