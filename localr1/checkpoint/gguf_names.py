"""GGUF tensor names and what they are called in Hugging Face checkpoints, one table per
architecture.

The names are llama.cpp's (gguf-py/gguf/constants.py, MODEL_TENSORS). A name outside the table of
its architecture is an error: an unread tensor would be silently wrong mathematics.

The experts of a layer are stacked in one tensor, [experts, out, in]; here each is a weight of its
own, a range of the file. The matrix from DeepSeek's latent to keys and values is one tensor in
files before April 2025 and two after: attn_k_b [heads, latent, key], transposed per head for the
absorbed form, and attn_v_b [heads, value, latent].
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from localr1.checkpoint.gguf_header import MAX_TENSORS, GgufTensor
from localr1.checkpoint.paths import quoted
from localr1.errors import FormatError, TensorError, UnsupportedError

ROPE_FREQS = "rope_freqs.weight"
"""Not a weight: the factors of llama3 rope scaling (gguf_config.py)."""

OUTER = {
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
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_EXPERTS = {
    "ffn_gate_exps": "gate_proj",
    "ffn_up_exps": "up_proj",
    "ffn_down_exps": "down_proj",
}
_LATENT_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
_KEY_UP, _VALUE_UP, _BOTH_UP = "attn_k_b.weight", "attn_v_b.weight", "self_attn.kv_b_proj.weight"
_CHOICE_BIAS = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
"""Names that keep no suffix."""
_BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,4})\.([a-z_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """What a GGUF `general.architecture` is in Hugging Face's terms.

    block: name inside "blk.N." -> name inside "model.layers.N.", both without ".weight" or ".bias".
    rotary_rows: how the rows of q and k lie: "interleaved" when the converter paired (2i, 2i+1)
    where Hugging Face pairs (i, i + d/2). experts: stacked tensors -> the matrix of each expert.
    has_latent: attention over a latent, whose matrix up to keys and values may be in two.
    whole_names: names with their suffix -> names.
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    rotary_rows: Literal["half", "interleaved"] = "half"
    experts: Mapping[str, str] = field(default_factory=dict)
    has_latent: bool = False
    whole_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SplitUp:
    """One matrix, [heads * (key + value), latent], in two tensors: keys [heads, latent, key] and
    values [heads, value, latent]."""

    keys: GgufTensor
    values: GgufTensor


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _DENSE_BLOCK, "interleaved"),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _DENSE_BLOCK),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {**_DENSE_BLOCK, **_HEAD_NORMS}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**_DENSE_BLOCK, **_HEAD_NORMS, **_ROUTER},
        experts=_EXPERTS,
    ),
    # V3, unless the metadata says that it is V2 (gguf_mixtures.py). The converter leaves the rows
    # of rope as they are, side by side in Hugging Face's files too.
    "deepseek2": Architecture(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**_LATENT_BLOCK, **_ROUTER},
        experts=_EXPERTS,
        has_latent=True,
        whole_names=_CHOICE_BIAS,
    ),
}


def architecture(name: str, shown: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"{shown}: general.architecture",
            expected=f"one of {', '.join(ARCHITECTURES)}",
            found=quoted(name),
        )
    return ARCHITECTURES[name]


def place_weights(
    tensors: Mapping[str, GgufTensor],
    kind: Architecture,
    num_layers: int,
    num_experts: int,
    shown: str,
) -> dict[str, GgufTensor | SplitUp]:
    """Hugging Face name -> where the weight lies.

    Raises UnsupportedError for a name that the architecture does not have, TensorError for a layer
    beyond `num_layers` and a stack of other than `num_experts`, FormatError for too many weights.
    """
    result: dict[str, GgufTensor | SplitUp] = {}
    for stored in tensors.values():
        if stored.name == ROPE_FREQS:
            continue
        for name, place in _places(stored, tensors, kind, num_layers, num_experts, shown):
            if name in result:
                raise TensorError(f"{shown}: {quoted(name)} is stored twice, whole and in two")
            result[name] = place
        if len(result) > MAX_TENSORS:
            raise FormatError(
                f"{shown}: too many weights",
                expected=f"at most {MAX_TENSORS:,}, experts one by one",
            )
    return result


def _places(
    stored: GgufTensor,
    tensors: Mapping[str, GgufTensor],
    kind: Architecture,
    num_layers: int,
    num_experts: int,
    shown: str,
) -> Iterable[tuple[str, GgufTensor | SplitUp]]:
    """The weights that one tensor holds, or begins."""
    if stored.name in OUTER:
        return [(OUTER[stored.name], stored)]
    match = _BLOCK_NAME.fullmatch(stored.name)
    if match is None:
        raise _unknown(stored.name, kind, shown)
    layer, inner, suffix = match.groups()
    if int(layer) >= num_layers:
        raise TensorError(
            f"{shown}: tensor {quoted(stored.name)}",
            expected=f"layers 0 to {num_layers - 1} (block_count)",
            found=f"layer {layer}",
        )
    ours, own = f"model.layers.{layer}", f"{inner}.{suffix}"
    if inner in kind.block:
        return [(f"{ours}.{kind.block[inner]}.{suffix}", stored)]
    if own in kind.whole_names:
        return [(f"{ours}.{kind.whole_names[own]}", stored)]
    if inner in kind.experts and suffix == "weight":
        prefix = f"{ours}.mlp.experts"
        return _expert_slices(stored, prefix, kind.experts[inner], num_experts, shown)
    if kind.has_latent and own in (_KEY_UP, _VALUE_UP):
        halves = [tensors.get(f"blk.{layer}.{half}") for half in (_KEY_UP, _VALUE_UP)]
        split = _joined(halves[0], halves[1], f"{shown}: blk.{layer}")
        return [(f"{ours}.{_BOTH_UP}", split)] if own == _KEY_UP else []
    raise _unknown(stored.name, kind, shown)


def _unknown(name: str, kind: Architecture, shown: str) -> UnsupportedError:
    return UnsupportedError(
        f"{shown}: tensor {quoted(name)} is not known for {kind.model_type}",
        fix="The model may be a variant of the architecture that localr1 does not compute yet.",
    )


def _expert_slices(
    stored: GgufTensor, prefix: str, part: str, num_experts: int, shown: str
) -> Iterator[tuple[str, GgufTensor]]:
    """Each expert of a stack as a tensor of its own: whole rows, so whole blocks."""
    if len(stored.shape) != 3 or stored.shape[0] != num_experts:
        raise TensorError(
            f"{shown}: tensor {quoted(stored.name)}",
            expected=f"three dimensions, the first of {num_experts:,} experts (expert_count)",
            found=f"{list(stored.shape)}",
        )
    nbytes = stored.nbytes // num_experts
    for expert in range(num_experts):
        begin = stored.begin + expert * nbytes
        yield (
            f"{prefix}.{expert}.{part}.weight",
            replace(stored, shape=stored.shape[1:], begin=begin, nbytes=nbytes),
        )


def _joined(keys: GgufTensor | None, values: GgufTensor | None, shown: str) -> SplitUp:
    if keys is None or values is None:
        raise TensorError(f"{shown}: {_KEY_UP if keys is None else _VALUE_UP} is missing")
    fits = len(keys.shape) == len(values.shape) == 3 and (keys.shape[0], keys.shape[1]) == (
        values.shape[0],
        values.shape[2],
    )
    if not fits:
        raise TensorError(
            f"{shown}: {_KEY_UP} and {_VALUE_UP}",
            expected="[heads, latent, key] and [heads, value, latent]",
            found=f"{list(keys.shape)} and {list(values.shape)}",
        )
    return SplitUp(keys, values)
