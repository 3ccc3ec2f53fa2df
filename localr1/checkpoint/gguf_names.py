"""GGUF tensor names and what they are called in Hugging Face checkpoints, one table per
architecture.

The names are llama.cpp's (gguf-py/gguf/constants.py, MODEL_TENSORS). A name outside the table of
its architecture is an error: an unread tensor would be silently wrong mathematics.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from localr1.checkpoint.paths import quoted
from localr1.errors import TensorError, UnsupportedError

ROPE_FREQS = "rope_freqs.weight"
"""Not a weight: the factors of llama3 rope scaling (gguf_config.py)."""

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_DENSE_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """What a GGUF `general.architecture` is in Hugging Face's terms.

    block: name inside "blk.N." -> name inside "model.layers.N.". rotary_rows: how the rows of q and
    k lie: "interleaved" when the converter paired (2i, 2i+1) where Hugging Face pairs (i, i + d/2).
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    rotary_rows: Literal["half", "interleaved"] = "half"


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _DENSE_BLOCK, "interleaved"),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _DENSE_BLOCK),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_DENSE_BLOCK, **_HEAD_NORMS}),
}


def architecture(name: str, shown: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{shown}: general.architecture",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            found=quoted(name),
        )
    return ARCHITECTURES[name]


def hugging_face_names(
    names: Iterable[str], kind: Architecture, num_layers: int, shown: str
) -> dict[str, str]:
    """Hugging Face name -> GGUF name for every weight. Raises UnsupportedError for a name that the
    architecture does not have, TensorError for a layer beyond `num_layers`."""
    result: dict[str, str] = {}
    for name in names:
        if name == ROPE_FREQS:
            continue
        result[_translate(name, kind, num_layers, shown)] = name
    return result


def _translate(name: str, kind: Architecture, num_layers: int, shown: str) -> str:
    if name in _OUTER:
        return _OUTER[name]
    match = _BLOCK_NAME.fullmatch(name)
    inner = kind.block.get(match[2]) if match else None
    if match is None or inner is None:
        raise UnsupportedError(
            f"{shown}: tensor {quoted(name)} is not known for {kind.model_type}",
            fix="The model may be a variant of the architecture that localr1 does not compute yet.",
        )
    if int(match[1]) >= num_layers:
        raise TensorError(
            f"{shown}: tensor {quoted(name)}",
            expected=f"layers 0 to {num_layers - 1} (block_count)",
            found=f"layer {match[1]}",
        )
    return f"model.layers.{match[1]}.{inner}.{match[3]}"
