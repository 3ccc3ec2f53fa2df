"""A model as a GGUF file, for llama.cpp: float or quantized here, dense or a mixture.

The inverse of checkpoint/gguf_file.py, which reads the result back to the same weights. 4-bit codes
in groups of 32 are those of Q4_0, 8-bit ones those of Q8_0, in another order of bytes, and a larger
group is several blocks of one scale: they are carried over, not rounded again. Rows of a llama's q
and k are reordered, DeepSeek's matrix from latent to keys and values is split and transposed, and
the experts of a layer are stacked, as llama.cpp's converter does.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from localr1.checkpoint.api import Checkpoint
from localr1.checkpoint.gguf_names import ARCHITECTURES as NAMES
from localr1.checkpoint.gguf_names import OUTER, ROPE_FREQS, Architecture
from localr1.checkpoint.gguf_rope import llama3_factors
from localr1.checkpoint.packed import PackedReader
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import OutputError, TensorError, UnsupportedError
from localr1.kernels.api import PackedWeight
from localr1.kernels.codes import unpack_codes
from localr1.layers.rope import Llama3Rope
from localr1.models.config import LAYER_PREFIX, ModelConfig
from localr1.models.registry import parse_config
from localr1.quant.gguf_keys import ARCHITECTURES, architecture_keys
from localr1.quant.gguf_vocabulary import vocabulary_of
from localr1.quant.plan import RECOMPUTED

Array = NDArray[Any]

BLOCK: Final = 32
"""Columns of a block of Q4_0 and Q8_0."""
STORED: Final = "stored"
TYPES: Final = {
    "q4_0": (Type.Q4_0, gguf.LlamaFileType.MOSTLY_Q4_0),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
}
"""What matrices become; STORED leaves each as it is, as near as the format has it."""
_BLOCK_TYPES: Final = {4: Type.Q4_0, 8: Type.Q8_0}
_FLOATS: Final = {"F32": Type.F32, "F16": Type.F16}
HEADER_BYTES: Final = 64 << 20
"""Room for metadata, in the check of the free space."""

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all and the tensor's name."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file. shape: row-major, of values. modules: of the source, without
    ".weight"; several are stacked; none for factors that config.json determines. suffix: of each in
    the source. part: "keys" or "values" of a matrix that is split, "" else."""

    name: str
    shape: tuple[int, ...]
    type: Type
    modules: tuple[str, ...]
    suffix: str = ".weight"
    part: str = ""

    @property
    def nbytes(self) -> int:
        return int(np.prod(gguf.quant_shape_to_byte_shape(self.shape, self.type)))


@dataclass(frozen=True)
class Exported:
    """types: GGUF type -> how many tensors."""

    out: Path
    architecture: str
    nbytes: int
    types: dict[str, int]


def export_gguf(
    model: Path,
    out: Path,
    kind: str = STORED,
    *,
    with_tokenizer: bool = True,
    progress: Progress | None = None,
) -> Exported:
    """Write the new file `out`. kind: STORED or one of TYPES. with_tokenizer: else llama.cpp is
    told that tokens are numbers. Memory: the largest stack of experts, and one matrix in float32.

    Raises the errors of `open_checkpoint` and of reading, UnsupportedError for what GGUF or
    llama.cpp has no form for, and OutputError; after an error nothing is left under `out`.
    """
    assert kind == STORED or kind in TYPES
    if os.path.lexists(out):
        raise OutputError(f"{out} exists", expected="the name of a new file")
    with open_checkpoint(model) as checkpoint:
        config = parse_config(checkpoint.config)
        if config.architecture not in ARCHITECTURES:
            raise UnsupportedError(
                "GGUF", expected=" or ".join(ARCHITECTURES), found=config.architecture
            )
        name = ARCHITECTURES[config.architecture]
        converter = _Converter(checkpoint, config, NAMES[name], kind)
        entries = list(converter.entries())
        converter.check_complete(entries)
        total = sum(entry.nbytes for entry in entries)
        _check_space(out, total + HEADER_BYTES)
        partial = out.with_name(f".{out.name}.partial")
        try:
            writer = gguf.GGUFWriter(partial, name)
            _add_general(writer, model, name, config, kind)
            _add_tokenizer(writer, checkpoint, config, with_tokenizer)
            for entry in entries:
                shape = gguf.quant_shape_to_byte_shape(entry.shape, entry.type)
                writer.add_tensor_info(
                    entry.name, shape, np.dtype(np.uint8), entry.nbytes, entry.type
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for entry in entries:
                if progress is not None:
                    progress(done, total, entry.name)
                writer.write_tensor_data(converter.read(entry))
                done += entry.nbytes
            writer.close()
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
            partial.rename(out)
        except OSError as error:
            raise OutputError(f"{out}: cannot be written", found=error.strerror) from error
        finally:
            partial.unlink(missing_ok=True)
    types = [entry.type.name for entry in entries]
    return Exported(out, name, out.stat().st_size, {each: types.count(each) for each in set(types)})


def _check_space(out: Path, nbytes: int) -> None:
    folder = out.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a directory")
    if (free := shutil.disk_usage(folder).free) < nbytes:
        raise OutputError(
            f"{out}: the disk is too small", expected=f"{nbytes:,} bytes free", found=f"{free:,}"
        )


def _add_general(
    writer: gguf.GGUFWriter, model: Path, name: str, config: ModelConfig, kind: str
) -> None:
    writer.add_name(model.name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if kind != STORED:
        writer.add_file_type(TYPES[kind][1])
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in architecture_keys(config).items():
        adders[type(value)](f"{name}.{key}", value)


def _add_tokenizer(
    writer: gguf.GGUFWriter, checkpoint: Checkpoint, config: ModelConfig, is_wanted: bool
) -> None:
    if not is_wanted:
        writer.add_tokenizer_model("none")
        return
    files = checkpoint.tokenizer_files()
    vocabulary = vocabulary_of(files, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for role, token_id in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token_id)
    writer.add_add_bos_token(files.add_bos)
    if files.chat_template is not None:
        writer.add_chat_template(files.chat_template)


class _Converter:
    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, architecture: Architecture, kind: str
    ) -> None:
        self._checkpoint = checkpoint
        self._config = config
        self._architecture = architecture
        self._kind = kind
        self._packed = PackedReader(checkpoint, _BLOCK_TYPES)

    def entries(self) -> Iterator[Entry]:
        """In the order of the file. Raises TensorError where a matrix is missing."""
        for name, theirs in OUTER.items():
            module = theirs.removesuffix(".weight")
            if self._has(module):
                yield self._entry(name, module)
        if isinstance(self._config.rope, Llama3Rope):
            yield Entry(ROPE_FREQS, (self._config.head_dim // 2,), Type.F32, ())
        for layer in range(self._config.num_layers):
            yield from self._layer(layer)

    def _layer(self, layer: int) -> Iterator[Entry]:
        prefix, block = f"{LAYER_PREFIX}{layer}.", f"blk.{layer}."
        names = self._checkpoint.tensors
        for name, inner in self._architecture.block.items():
            module = f"{prefix}{inner}"
            if name == "attn_kv_b":
                yield from self._split(block, module)
            elif self._has(module):
                yield self._entry(f"{block}{name}.weight", module)
            if f"{module}.bias" in names:
                shape = names[f"{module}.bias"].shape
                yield Entry(f"{block}{name}.bias", shape, Type.F32, (module,), ".bias")
        for name, inner in self._architecture.whole_names.items():
            if f"{prefix}{inner}" in names:
                module = f"{prefix}{inner}"
                yield Entry(f"{block}{name}", names[module].shape, Type.F32, (module,), "")
        moe = self._config.moe
        if moe is None or layer not in moe.layers:
            return
        for name, part in self._architecture.experts.items():
            experts = tuple(
                f"{prefix}mlp.experts.{expert}.{part}" for expert in range(moe.router.num_experts)
            )
            types = {self._type(expert) for expert in experts}
            if len(types) > 1:
                raise UnsupportedError(
                    f"GGUF: {prefix}mlp.experts: {part}",
                    expected="one type for the experts of a layer",
                    found=" and ".join(sorted(each.name for each in types)),
                    fix="Name the type: --type q4_0, q8_0 or f16.",
                )
            shape = (len(experts), *self._shape(experts[0]))
            yield Entry(f"{block}{name}.weight", shape, types.pop(), experts)

    def check_complete(self, entries: list[Entry]) -> None:
        """Raises UnsupportedError for a tensor that no entry has: the file would be another
        model."""
        known = {f"{module}{entry.suffix}" for entry in entries for module in entry.modules}
        for name in self._checkpoint.tensors:
            module, _, suffix = name.rpartition(".")
            own = f"{module}.weight" if suffix.startswith("weight_") else name
            is_used = own in known or self._config.is_left_out(name) or RECOMPUTED.search(name)
            tied = self._config.tie_embeddings and module == "lm_head"
            if not is_used and not tied:
                raise UnsupportedError(f"GGUF: there is no name for tensor {name}")

    def read(self, entry: Entry) -> Array:
        """The tensor's bytes, uint8."""
        if entry.name == ROPE_FREQS:
            parts = [self._rope_factors()]
        elif entry.part:
            parts = [self._read_part(entry)]
        else:
            parts = [self._read_one(entry, module) for module in entry.modules]
        stacked = np.stack(parts) if len(entry.modules) > 1 else parts[0]
        return np.ascontiguousarray(stacked).view(np.uint8).reshape(-1)

    def _read_one(self, entry: Entry, module: str) -> Array:
        packed = self._packed.read(module) if entry.suffix == ".weight" else None
        if packed is None:
            values = self._checkpoint.read(f"{module}{entry.suffix}")
        elif _BLOCK_TYPES[packed.scheme.bits] is entry.type and packed.zero_point is None:
            return self._reordered(_blocks(packed), module)
        else:
            values = _values(packed)
        return _encoded(self._reordered(_float32(values), module), entry.type)

    def _reordered(self, rows: Array, module: str) -> Array:
        """Of q and k in the order of rows that the architecture has: of a head first the halves,
        then the pairs (convert_hf_to_gguf.py of llama.cpp, LlamaModel.permute)."""
        heads = {
            "q_proj": self._config.num_heads,
            "k_proj": self._config.num_kv_heads,
        }.get(module.rpartition(".")[2])
        if self._architecture.rotary_rows != "interleaved" or heads is None:
            return rows
        halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)

    def _split(self, block: str, module: str) -> Iterator[Entry]:
        latent, heads = self._config.latent, self._config.num_heads
        assert latent is not None
        for name, part, shape in (
            ("attn_k_b", "keys", (heads, latent.latent_size, latent.key_size)),
            ("attn_v_b", "values", (heads, latent.value_size, latent.latent_size)),
        ):
            # Floats in a quantized model, where this is the one large matrix that is kept, take the
            # type of the matrix behind it, as in a file that llama.cpp's quantizer has made.
            like = self._type(module.replace("kv_b_proj", "o_proj"))
            kind = _fitting(like, shape[-1])
            yield Entry(f"{block}{name}.weight", shape, kind, (module,), part=part)

    def _read_part(self, entry: Entry) -> Array:
        latent, heads = self._config.latent, self._config.num_heads
        assert latent is not None
        (module,) = entry.modules
        packed = self._packed.read(module)
        kept = self._checkpoint.read(f"{module}.weight") if packed is None else _values(packed)
        per_head = _float32(kept).reshape(heads, -1, latent.latent_size)
        keys, rest = np.split(per_head, [latent.key_size], axis=1)
        part = keys.transpose(0, 2, 1) if entry.part == "keys" else rest
        return _encoded(np.ascontiguousarray(part), entry.type)

    def _rope_factors(self) -> Array:
        rope = self._config.rope
        assert isinstance(rope, Llama3Rope)
        scaling = {
            "factor": rope.factor,
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
            "original_max_position_embeddings": rope.original_positions,
        }
        factors = llama3_factors(scaling, rope.theta, self._config.head_dim)
        return np.array(factors, dtype=np.float32)

    def _entry(self, name: str, module: str) -> Entry:
        return Entry(name, self._shape(module), self._type(module), (module,))

    def _has(self, module: str) -> bool:
        names = self._checkpoint.tensors
        if module == "lm_head" and self._config.tie_embeddings:
            return False
        return f"{module}.weight" in names or f"{module}.weight_packed" in names

    def _shape(self, module: str) -> tuple[int, ...]:
        kept = self._checkpoint.tensors.get(f"{module}.weight")
        if kept is not None:
            return kept.shape
        layout = self._packed.layout(module)
        if layout is None:
            raise TensorError(f"tensor {module}.weight is missing")
        return layout.out_features, layout.in_features

    def _type(self, module: str) -> Type:
        """Vectors and routers in float32, as llama.cpp wants them."""
        shape = self._shape(module)
        if len(shape) == 1 or module.endswith(".mlp.gate"):
            return Type.F32
        if self._kind == STORED:
            return _fitting(self._stored_type(module), shape[-1])
        wanted = TYPES[self._kind][0]
        is_table = f"{module}.weight" in OUTER.values()
        if is_table and wanted is Type.Q4_0:  # As llama.cpp's quantizer spares them.
            wanted = Type.Q8_0
        return _fitting(wanted, shape[-1])

    def _stored_type(self, module: str) -> Type:
        kept = self._checkpoint.tensors.get(f"{module}.weight")
        if kept is not None:
            return _FLOATS.get(kept.dtype, Type.BF16)
        layout = self._packed.layout(module)
        assert layout is not None
        if layout.zero_point is not None:
            raise UnsupportedError(
                f"GGUF: {module}",
                expected="codes without zero points",
                found="zero points",
                fix="Name a type to round to: --type q4_0, q8_0 or f16.",
            )
        return _BLOCK_TYPES[layout.scheme.held_in(_BLOCK_TYPES).bits]


def _fitting(kind: Type, columns: int) -> Type:
    """F16 where blocks do not divide the rows, as llama.cpp's quantizer does."""
    return Type.F16 if kind in _BLOCK_TYPES.values() and columns % BLOCK else kind


def _encoded(values: Array, kind: Type) -> Array:
    """float32 [..., columns] -> as the file has it, a row a row."""
    if kind is Type.F32:
        return values
    encoded: Array = gguf.quants.quantize(values, kind)
    return encoded


def _blocks(weight: PackedWeight) -> Array:
    """uint8 [rows, bytes of a row]: of each block the scale as float16, then its codes."""
    rows, blocks = weight.out_features, weight.in_features // BLOCK
    repeats = weight.scheme.group_size // BLOCK
    scale = weight.scale.float().repeat_interleave(repeats, dim=1).numpy().astype(np.float16)
    if not np.isfinite(scale).all():
        raise UnsupportedError("GGUF: scales", expected="within float16", found="larger ones")
    head = scale.view(np.uint8).reshape(rows, blocks, 2)
    stored = weight.packed.numpy().view(np.uint8).reshape(rows, blocks, -1)
    if weight.scheme.bits == 8:
        codes = stored ^ 128  # Offset binary to two's complement.
    else:
        ordered = np.stack((stored & 15, stored >> 4), axis=3).reshape(rows, blocks, BLOCK)
        codes = ordered[:, :, : BLOCK // 2] | ordered[:, :, BLOCK // 2 :] << 4
    return np.concatenate((head, codes), axis=2).reshape(rows, -1)


def _values(weight: PackedWeight) -> Tensor:
    """float32 [rows, columns]."""
    codes = unpack_codes(weight.packed, weight.scheme.bits, weight.in_features).to(torch.float32)
    groups = codes.view(weight.out_features, -1, weight.scheme.group_size)
    if weight.zero_point is not None:
        groups = groups - weight.zero_point.float()[:, :, None]
    scaled: Tensor = groups * weight.scale.float()[:, :, None]
    return scaled.view(weight.out_features, weight.in_features)


def _float32(value: Tensor) -> Array:
    result: Array = value.float().contiguous().numpy()
    return result
