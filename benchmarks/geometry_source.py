"""A checkpoint that has names, shapes and a tokenizer, but no float weights: what the quantizer
plans by when random codes take the place of quantized ones."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from byte_vocabulary import NUM_BYTES, byte_level_document
from torch import Tensor

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.errors import TensorError
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.moe_weights import DOWN, GATE, UP
from localr1.models.registry import parse_config

CONTROL: Final = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
EOS_ID: Final = NUM_BYTES + CONTROL.index("<|eos|>")
CONTROL_IDS: Final = tuple(range(NUM_BYTES, NUM_BYTES + len(CONTROL)))
TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"


def word(index: int) -> str:
    """A word of three syllables for each number below 512,000, as the library writes " word"."""
    syllables = len(_CONSONANTS) * len(_VOWELS)
    parts = []
    for _ in range(3):
        index, syllable = divmod(index, syllables)
        parts.append(_CONSONANTS[syllable // len(_VOWELS)] + _VOWELS[syllable % len(_VOWELS)])
    return "Ġ" + "".join(reversed(parts))


class GeometrySource:
    """A `Checkpoint` whose weights cannot be read."""

    format = "random"
    generation_config: Mapping[str, Any] = {}

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.path = Path(name)
        self.config: Mapping[str, Any] = {**config, "eos_token_id": EOS_ID}
        self.tensors: Mapping[str, TensorInfo] = {
            tensor: TensorInfo(tensor, dtype, shape, 0)
            for tensor, shape, dtype in _tensors(parse_config(self.config))
        }

    def read(self, name: str) -> Tensor:
        raise TensorError(f"{self.path}: tensor {name}", expected="weights", found="a size only")

    def tokenizer_files(self) -> TokenizerFiles:
        words = map(word, range(self.config["vocab_size"] - NUM_BYTES - len(CONTROL)))
        text = json.dumps(byte_level_document(CONTROL, words=words), ensure_ascii=False)
        return TokenizerFiles(text, TEMPLATE, "<|bos|>", "<|eos|>", None, (EOS_ID,), False)

    def close(self) -> None:
        return

    def __enter__(self) -> "GeometrySource":
        return self

    def __exit__(self, *exc: object) -> None:
        return


Entry = tuple[str, tuple[int, ...], str]


def _tensors(config: ModelConfig) -> Iterator[Entry]:
    """(name, shape, dtype) of every tensor, under Hugging Face's names."""
    table = (config.vocab_size, config.hidden_size)
    yield "model.embed_tokens.weight", table, "BF16"
    for layer in range(config.num_layers):
        prefix = f"{LAYER_PREFIX}{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}.{norm}.weight", (config.hidden_size,), "BF16"
        yield from _attention(f"{prefix}.self_attn", config)
        if config.moe is not None and layer in config.moe.layers:
            yield from _mixture(f"{prefix}.mlp", config)
        else:
            yield from _mlp(f"{prefix}.mlp", config.hidden_size, config.intermediate_size)
    yield "model.norm.weight", (config.hidden_size,), "BF16"
    yield "lm_head.weight", table, "BF16"


def _attention(prefix: str, config: ModelConfig) -> Iterator[Entry]:
    hidden, queries = config.hidden_size, config.num_heads * config.head_dim
    values = queries
    if config.latent is None:
        keys = config.num_kv_heads * config.head_dim
        shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        if config.qk_norm:
            shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    else:
        latent, rank = config.latent, config.latent.query_rank
        values = config.num_heads * latent.value_size
        up = config.num_heads * (latent.key_size + latent.value_size)
        shapes = {"q_proj": (queries, hidden)}
        if rank is not None:
            shapes = {
                "q_a_proj": (rank, hidden),
                "q_a_layernorm": (rank,),
                "q_b_proj": (queries, rank),
            }
        shapes |= {
            "kv_a_proj_with_mqa": (latent.latent_size + latent.rope_size, hidden),
            "kv_a_layernorm": (latent.latent_size,),
            "kv_b_proj": (up, latent.latent_size),
        }
    shapes["o_proj"] = (hidden, values)
    for name, shape in shapes.items():
        yield f"{prefix}.{name}.weight", shape, "BF16"


def _mixture(prefix: str, config: ModelConfig) -> Iterator[Entry]:
    moe, hidden = config.moe, config.hidden_size
    assert moe is not None
    yield f"{prefix}.gate.weight", (moe.router.num_experts, hidden), "BF16"
    if moe.choice_bias:
        yield f"{prefix}.gate.e_score_correction_bias", (moe.router.num_experts,), "F32"
    if moe.shared_size:
        yield from _mlp(f"{prefix}.shared_experts", hidden, moe.shared_size)
    for expert in range(moe.router.num_experts):
        yield from _mlp(f"{prefix}.experts.{expert}", hidden, moe.intermediate_size)


def _mlp(prefix: str, hidden: int, inner: int) -> Iterator[Entry]:
    for part, shape in ((GATE, (inner, hidden)), (UP, (inner, hidden)), (DOWN, (hidden, inner))):
        yield f"{prefix}.{part}.weight", shape, "BF16"
