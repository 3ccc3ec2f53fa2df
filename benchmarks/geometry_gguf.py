"""A quantized mixture as the GGUF file that llama.cpp's converter and quantizer would make of it.

4-bit matrices become Q4_0, 8-bit ones Q8_0: both hold the same codes in groups of 32, in another
order, so both programs compute the same model. Experts are stacked a layer; the matrix from
DeepSeek's latent to keys and values is split and transposed for the absorbed form, and quantized to
the bits of the matrices beside it, as a Q4_0 file has it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.gguf_names import ARCHITECTURES, Architecture
from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import TensorError, UnsupportedError
from localr1.kernels.api import PackedWeight, Scoring
from localr1.models.config import LAYER_PREFIX, LatentConfig, ModelConfig
from localr1.models.registry import parse_config

Array = NDArray[Any]

BLOCK = 32
"""Columns of a block of Q4_0 and Q8_0."""
OUTER = {
    "token_embd.weight": "model.embed_tokens",
    "output_norm.weight": "model.norm",
    "output.weight": "lm_head",
}
GATING = {Scoring.SOFTMAX: 1, Scoring.SIGMOID: 2}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: of a type that numpy does not know, blocks as bytes, uint8 [..., row
    bytes]. shape: row-major, of values."""

    name: str
    shape: tuple[int, ...]
    type: Type
    source: tuple[str, ...]
    """Modules side by side, or the one tensor, in the checkpoint."""


def convert(model: Path, out: Path) -> None:
    """Writes `out`. Memory: the largest stack of experts. Raises UnsupportedError for another
    architecture, and for matrices in other groups than 32."""
    with open_checkpoint(model) as checkpoint:
        config = parse_config(checkpoint.config)
        name, architecture = _architecture(config)
        converter = _Converter(checkpoint, config, architecture)
        entries = list(converter.entries())
        writer = gguf.GGUFWriter(out, name)
        # The tokens are numbers here: llama.cpp then wants no texts, only how many there are.
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
        _add_keys(writer, name, metadata(config, checkpoint.config))
        for entry in entries:
            shape = gguf.quant_shape_to_byte_shape(entry.shape, entry.type)
            nbytes = int(np.prod(shape))
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), nbytes, entry.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(converter.read(entry))
        writer.close()


def metadata(config: ModelConfig, source: Mapping[str, Any]) -> dict[str, Any]:
    """Keys without the architecture's prefix. source: config.json, for what a ModelConfig has in
    another form."""
    moe = config.moe
    assert moe is not None
    router = moe.router
    keys: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(source["rope_theta"]),
        "expert_count": router.num_experts,
        "expert_used_count": router.experts_per_token,
        "expert_feed_forward_length": moe.intermediate_size,
    }
    if config.latent is None:
        return keys | {
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
        }
    return keys | _latent_keys(config, config.latent, source)


def _latent_keys(
    config: ModelConfig, latent: LatentConfig, source: Mapping[str, Any]
) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    keys: dict[str, Any] = {
        "leading_dense_block_count": source["first_k_dense_replace"],
        "expert_shared_count": source["n_shared_experts"],
        "expert_weights_scale": float(source["routed_scaling_factor"]),
        "expert_weights_norm": moe.router.normalized,
        "expert_gating_func": GATING[moe.router.scoring],
        "expert_group_count": moe.router.num_groups,
        "expert_group_used_count": moe.router.groups_per_token,
        # In absorbed form all heads share one key and value, the latent.
        "attention.head_count_kv": 1,
        "attention.key_length": latent.latent_size + latent.rope_size,
        "attention.value_length": latent.latent_size,
        "attention.key_length_mla": latent.key_size + latent.rope_size,
        "attention.value_length_mla": latent.value_size,
        "attention.kv_lora_rank": latent.latent_size,
        "rope.dimension_count": latent.rope_size,
    }
    if latent.query_rank is not None:
        keys["attention.q_lora_rank"] = latent.query_rank
    scaling = source["rope_scaling"]
    if scaling is not None:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(scaling["factor"]),
            "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * scaling["mscale_all_dim"],
            "rope.scaling.yarn_beta_fast": float(scaling["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(scaling["beta_slow"]),
        }
    return keys


class _Converter:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, architecture: Architecture
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._architecture = architecture
        self._packed = PackedReader(checkpoint)

    def entries(self) -> Iterator[Entry]:
        """In the order of the file."""
        for name, module in OUTER.items():
            yield self._entry(name, module)
        moe = self._config.moe
        assert moe is not None
        for layer in range(self._config.num_layers):
            prefix, block = f"{LAYER_PREFIX}{layer}.", f"blk.{layer}."
            for name, inner in self._architecture.block.items():
                if name == "attn_kv_b":
                    yield from self._split(block, f"{prefix}{inner}")
                elif self._has(f"{prefix}{inner}"):
                    yield self._entry(f"{block}{name}.weight", f"{prefix}{inner}")
            for name, inner in self._architecture.whole_names.items():
                if f"{prefix}{inner}" in self._checkpoint.tensors:
                    experts_only = (moe.router.num_experts,)
                    yield Entry(f"{block}{name}", experts_only, Type.F32, (f"{prefix}{inner}",))
            if layer in moe.layers:
                for name, part in self._architecture.experts.items():
                    experts = [
                        f"{prefix}mlp.experts.{expert}.{part}"
                        for expert in range(moe.router.num_experts)
                    ]
                    shape = (len(experts), *self._shape(experts[0]))
                    kind = self._type(experts[0])
                    yield Entry(f"{block}{name}.weight", shape, kind, tuple(experts))

    def read(self, entry: Entry) -> Array:
        """The tensor's bytes, uint8."""
        if entry.name.endswith(("attn_k_b.weight", "attn_v_b.weight")):
            return self._read_split(entry)
        parts = []
        for module in entry.source:
            packed = self._packed.read(module)
            if packed is not None:
                parts.append(_blocks(packed))
                continue
            name = module if module in self._checkpoint.tensors else f"{module}.weight"
            value = self._checkpoint.read(name)
            if entry.type is Type.BF16:
                parts.append(gguf.quants.quantize(_float32(value), Type.BF16))
            else:
                parts.append(_float32(value))
        stacked = np.stack(parts) if len(entry.shape) == 3 else parts[0]
        return np.ascontiguousarray(stacked).view(np.uint8)

    def _split(self, block: str, module: str) -> Iterator[Entry]:
        latent, heads = self._config.latent, self._config.num_heads
        assert latent is not None
        kind = self._type(module.replace("kv_b_proj", "o_proj"))
        keys = (heads, latent.latent_size, latent.key_size)
        values = (heads, latent.value_size, latent.latent_size)
        yield Entry(f"{block}attn_k_b.weight", keys, kind, (module,))
        yield Entry(f"{block}attn_v_b.weight", values, kind, (module,))

    def _read_split(self, entry: Entry) -> Array:
        latent, heads = self._config.latent, self._config.num_heads
        assert latent is not None
        both = _float32(self._checkpoint.read(f"{entry.source[0]}.weight"))
        per_head = both.reshape(heads, -1, latent.latent_size)
        keys, values = np.split(per_head, [latent.key_size], axis=1)
        part = keys.transpose(0, 2, 1) if "attn_k_b" in entry.name else values
        blocks: Array = gguf.quants.quantize(np.ascontiguousarray(part), entry.type)
        return blocks.view(np.uint8)

    def _entry(self, name: str, module: str) -> Entry:
        return Entry(name, self._shape(module), self._type(module), (module,))

    def _has(self, module: str) -> bool:
        names = self._checkpoint.tensors
        return f"{module}.weight" in names or f"{module}.weight_packed" in names

    def _shape(self, module: str) -> tuple[int, ...]:
        kept = self._checkpoint.tensors.get(f"{module}.weight")
        if kept is not None:
            return kept.shape
        scale = self._checkpoint.tensors.get(f"{module}.weight_scale")
        if scale is None:
            raise TensorError(f"tensor {module}.weight is missing")
        return scale.shape[0], scale.shape[1] * BLOCK

    def _type(self, module: str) -> Type:
        """Vectors and routers in float32, as llama.cpp wants them; a kept table as it is."""
        if f"{module}.weight_packed" not in self._checkpoint.tensors:
            return Type.BF16 if module in OUTER.values() and "norm" not in module else Type.F32
        scheme = self._packed.scheme(module)
        group = getattr(scheme, "group_size", None)
        if group != BLOCK:
            raise UnsupportedError(f"{module}", expected=f"groups of {BLOCK}", found=f"{group}")
        return Type.Q4_0 if getattr(scheme, "bits", None) == 4 else Type.Q8_0


def _architecture(config: ModelConfig) -> tuple[str, Architecture]:
    """llama.cpp's name: its deepseek2 is V2 and V3."""
    wanted = "qwen3moe" if config.architecture == "qwen3_moe" else "deepseek2"
    if config.moe is None:
        raise UnsupportedError("GGUF", expected="a mixture of experts", found=config.architecture)
    return wanted, ARCHITECTURES[wanted]


def _blocks(weight: PackedWeight) -> Array:
    """uint8 [rows, bytes of a row]: of each group the scale as float16, then its codes."""
    rows, groups = weight.scale.shape
    scale = weight.scale.float().numpy().astype(np.float16).view(np.uint8).reshape(rows, groups, 2)
    stored = weight.packed.numpy().view(np.uint8).reshape(rows, groups, -1)
    if weight.scheme.bits == 8:
        codes = stored ^ 128  # Offset binary to two's complement.
    else:
        ordered = np.stack((stored & 15, stored >> 4), axis=3).reshape(rows, groups, BLOCK)
        codes = ordered[:, :, : BLOCK // 2] | ordered[:, :, BLOCK // 2 :] << 4
    return np.concatenate((scale, codes), axis=2).reshape(rows, -1)


def _float32(value: Tensor) -> Array:
    result: Array = value.float().contiguous().numpy()
    return result


def _add_keys(writer: gguf.GGUFWriter, prefix: str, keys: Mapping[str, Any]) -> None:
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in keys.items():
        adders[type(value)](f"{prefix}.{key}", value)
