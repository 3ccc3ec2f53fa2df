"""What a GGUF file says: its weights as the gguf library has them, under Hugging Face's names, and
the config rebuilt from its metadata as transformers understands it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoint_files import ARRAY, F32, I32, STRING, U32, gguf_bytes, value, with_keys
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.gguf_file import GgufFile
from localr1.checkpoint.gguf_rope import LLAMA3_TOLERANCE, llama3_factors
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import TensorError, UnsupportedError

HIDDEN, LAYERS, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM, MIDDLE = 64, 2, 8, 4, 2, 16, 32
PLAIN = {"F32", "F16", "BF16"}
NOT_DEQUANTIZED = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}

Arrays = Mapping[str, np.ndarray[Any, Any]]


def write_model(
    path: Path,
    tensors: Arrays,
    architecture: str = "llama",
    *,
    raw: GGMLQuantizationType | None = None,
    keys: Mapping[str, Any] | None = None,
) -> None:
    """With the library's own writer. raw: the type of tensors given as bytes."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MIDDLE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, content in (keys or {}).items():
        if isinstance(content, str):
            writer.add_string(key, content)
        elif isinstance(content, float):
            writer.add_float32(key, content)
        else:
            writer.add_uint32(key, content)
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=raw if values.dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


BLOCKS = sorted({kind.name for kind in GGMLQuantizationType} - PLAIN - NOT_DEQUANTIZED)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_type_equals_the_library(name: str, tmp_path: Path) -> None:
    """Random bytes, so that every code and scale occurs; NaN must come back as the same NaN."""
    kind = GGMLQuantizationType[name]
    block, nbytes = GGML_QUANT_SIZES[kind]
    columns = block * 2
    generator = np.random.default_rng(kind.value)
    raw = generator.integers(0, 256, (VOCABULARY, 2 * nbytes), dtype=np.uint8)
    path = tmp_path / "a.gguf"
    write_model(path, {"token_embd.weight": raw}, raw=kind)
    try:
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, kind)
    except NotImplementedError:
        with pytest.raises(UnsupportedError, match=name):
            open_checkpoint(path)
        return
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read("model.embed_tokens.weight")
        info = checkpoint.tensors["model.embed_tokens.weight"]
    assert (info.dtype, info.shape, info.nbytes) == (name, (VOCABULARY, columns), raw.size)
    assert found.dtype == torch.float32
    assert found.shape == (VOCABULARY, columns)
    assert found.is_contiguous()
    assert torch.equal(bits(found), bits(torch.from_numpy(expected)))


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_floats_come_as_they_are_stored(name: str, tmp_path: Path) -> None:
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    values = torch.from_numpy(random(VOCABULARY, HIDDEN)).to(dtype)
    path = tmp_path / "a.gguf"
    raw = values.view(torch.uint8).numpy()
    write_model(path, {"token_embd.weight": raw}, raw=GGMLQuantizationType[name])
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.read("model.embed_tokens.weight")
    assert found.dtype == dtype
    assert torch.equal(found, values)


@pytest.mark.parametrize("name", sorted(NOT_DEQUANTIZED))
def test_types_that_nobody_dequantizes_are_named(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    block, nbytes = GGML_QUANT_SIZES[kind]
    path = tmp_path / "a.gguf"
    raw = np.zeros((VOCABULARY, 256 // block * nbytes), dtype=np.uint8)
    write_model(path, {"token_embd.weight": raw}, raw=kind)
    with pytest.raises(UnsupportedError, match=f"found {name}"):
        open_checkpoint(path)


def test_smollm2_equals_the_library(smollm2_gguf: Path) -> None:
    """The real file: the tensors outside of layers and of one, against the library's reader."""
    reader = gguf.GGUFReader(smollm2_gguf)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    pairs = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    inner = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for ours, theirs in inner.items():
        pairs[f"model.layers.29.{ours}.weight"] = f"blk.29.{theirs}.weight"
    with open_checkpoint(smollm2_gguf) as checkpoint:
        assert len(checkpoint.tensors) == len(stored) == 272
        for ours, theirs in pairs.items():
            tensor = stored[theirs]
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(checkpoint.read(ours).numpy(), expected)


def test_only_the_bytes_asked_for_are_read(
    smollm2_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    read_into = RandomAccessFile.read_into

    def watched(self: RandomAccessFile, offset: int, buffer: memoryview) -> None:
        reads.append(len(buffer))
        read_into(self, offset, buffer)

    monkeypatch.setattr(RandomAccessFile, "read_into", watched)
    with open_checkpoint(smollm2_gguf) as checkpoint:
        assert sum(reads) < 4 << 20  # A header of 1.8 MB in a file of 98 MB.
        reads.clear()
        info = checkpoint.tensors["model.layers.7.mlp.up_proj.weight"]
        checkpoint.read(info.name)
    assert reads == [info.nbytes] == [1536 * 576 // 32 * 20]


# Names and the order of rows.


def converter_rows(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to q and k of a llama: row i of the first half of a head
    goes to 2i, row i of the second to 2i + 1."""
    result = np.empty_like(weight)
    size = weight.shape[0] // heads
    for head in range(heads):
        for row in range(size):
            half, pair = divmod(row, size // 2)
            result[head * size + 2 * pair + half] = weight[head * size + row]
    return result


def model_tensors(*, biases: bool = False, head_norms: bool = False) -> dict[str, Any]:
    """Random weights by their Hugging Face names."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", HEADS * HEAD_DIM), ("k", KV_HEADS * HEAD_DIM)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if biases:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
            if head_norms:
                shapes[f"{prefix}.self_attn.{name}_norm.weight"] = (HEAD_DIM,)
        shapes[f"{prefix}.self_attn.v_proj.weight"] = (KV_HEADS * HEAD_DIM, HIDDEN)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, MIDDLE)
    return {name: random(*shape, seed=n) for n, (name, shape) in enumerate(shapes.items())}


def gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.down_proj", "ffn_down"),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_weights_are_those_the_file_was_made_from(architecture: str, tmp_path: Path) -> None:
    """Every architecture's names; for llama the converter's order of rows is undone, also in
    biases."""
    original = model_tensors(biases=architecture != "qwen3", head_norms=architecture == "qwen3")
    stored = {}
    for name, values in original.items():
        permuted = values
        if architecture == "llama" and ".q_proj." in name:
            permuted = converter_rows(values, HEADS)
        if architecture == "llama" and ".k_proj." in name:
            permuted = converter_rows(values, KV_HEADS)
        stored[gguf_name(name)] = permuted
    path = tmp_path / "a.gguf"
    write_model(path, stored, architecture)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.tensors.keys() == original.keys()
        for name, expected in original.items():
            found = checkpoint.read(name)
            assert found.is_contiguous()
            assert np.array_equal(found.numpy(), expected), name
        with pytest.raises(TensorError, match="'nothing'"):
            checkpoint.read("nothing")


def test_rows_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tensors = {"token_embd.weight": random(VOCABULARY, HIDDEN)}
    tensors["blk.0.attn_q.weight"] = random(6, 4)
    write_model(path, tensors)
    with open_checkpoint(path) as checkpoint, pytest.raises(TensorError, match="4 heads"):
        checkpoint.read("model.layers.0.self_attn.q_proj.weight")


# The config.


def config_of(path: Path, architecture: str = "llama", **options: Any) -> dict[str, Any]:
    tensors = {"token_embd.weight": random(VOCABULARY, HIDDEN), **options.pop("tensors", {})}
    keys = {f"{architecture}.{key}": content for key, content in options.pop("keys", {}).items()}
    write_model(path, tensors, architecture, keys=keys)
    with open_checkpoint(path) as checkpoint:
        return dict(checkpoint.config)


def test_the_config_of_smollm2(smollm2_gguf: Path) -> None:
    with open_checkpoint(smollm2_gguf) as checkpoint:
        assert checkpoint.config == {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100_000.0,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_transformers_accepts_the_config(architecture: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    config = config_of(tmp_path / "a.gguf", architecture, keys={"attention.key_length": 32})
    theirs = AutoConfig.for_model(**config)
    assert theirs.architectures == [f"{architecture.capitalize()}ForCausalLM"]
    assert theirs.head_dim == 32
    assert theirs.num_key_value_heads == KV_HEADS
    assert theirs.rms_norm_eps == 1e-6
    assert theirs.tie_word_embeddings


def test_heads_tied_and_biases_follow_from_the_tensors(tmp_path: Path) -> None:
    config = config_of(tmp_path / "a.gguf")
    assert (config["tie_word_embeddings"], config["attention_bias"]) == (True, False)
    bias = random(HEADS * HEAD_DIM)
    config = config_of(
        tmp_path / "b.gguf",
        tensors={"output.weight": random(VOCABULARY, HIDDEN), "blk.0.attn_q.bias": bias},
    )
    assert (config["tie_word_embeddings"], config["attention_bias"]) == (False, True)


def test_counts_given_by_layer_may_be_uniform(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    counts = with_keys(llama__attention__head_count=value(ARRAY, (I32, [2])))
    path.write_bytes(gguf_bytes(counts))
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.config["num_attention_heads"] == 2


ROPES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "none": ({"rope.scaling.type": "none"}, None),
    "linear": (
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
    ),
    "linear of 1": ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
    "linear of 2023": ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
    "yarn": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "yarn in full": (
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.attn_factor": 0.5,
        },
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 0.5 * (0.1 * 1.3862943611198906 + 1.0),  # ln 4
        },
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scaling(name: str, tmp_path: Path) -> None:
    keys, expected = ROPES[name]
    assert config_of(tmp_path / "a.gguf", keys=keys).get("rope_scaling") == expected


def llama3(factor: float, original: int, low: float = 1.0, high: float = 4.0) -> dict[str, Any]:
    return {
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def transformers_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> Tensor:
    """transformers' frequencies without scaling over those with it, float32."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "llama3", "rope_theta": theta, **scaling},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    factors: Tensor = plain / scaled
    return factors


RELEASED_LLAMA3 = [
    (llama3(8.0, 8192), 500_000.0, 128),  # Llama 3.1, R1-Distill-Llama
    (llama3(32.0, 8192), 500_000.0, 64),  # Llama 3.2 1B
    (llama3(32.0, 8192), 500_000.0, 128),
    (llama3(2.5, 4096, high=6.5), 100_000.0, 128),
]


@pytest.mark.parametrize(("scaling", "theta", "head_dim"), RELEASED_LLAMA3)
def test_llama3_is_recovered_from_its_factors(
    scaling: dict[str, Any], theta: float, head_dim: int, tmp_path: Path
) -> None:
    """transformers' own factors, written as by llama.cpp's converter, give the parameters back."""
    factors = transformers_factors(scaling, theta, head_dim)
    ours = torch.tensor(llama3_factors(scaling, theta, head_dim))
    assert float((ours / factors - 1).abs().max()) < LLAMA3_TOLERANCE
    config = config_of(
        tmp_path / "a.gguf",
        keys={"rope.freq_base": theta, "attention.key_length": head_dim},
        tensors={"rope_freqs.weight": factors.numpy()},
    )
    assert config["rope_scaling"] == {"rope_type": "llama3", **scaling}


def test_the_tolerance_sees_the_next_context() -> None:
    right = llama3_factors(llama3(8.0, 8192), 500_000.0, 128)
    wrong = llama3_factors(llama3(8.0, 8191), 500_000.0, 128)
    difference = max(abs(a / b - 1) for a, b in zip(right, wrong, strict=True))
    assert difference > LLAMA3_TOLERANCE


@pytest.mark.parametrize(
    "factors",
    [
        np.ones(HEAD_DIM // 2),
        np.full(HEAD_DIM // 2, 8.0),
        np.linspace(1.0, 8.0, HEAD_DIM // 2),
        np.full(HEAD_DIM // 2, np.nan),
        -np.ones(HEAD_DIM // 2),
        np.zeros(HEAD_DIM // 2),
    ],
)
def test_other_factors_are_refused(factors: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="llama3"):
        config_of(tmp_path / "a.gguf", tensors={"rope_freqs.weight": factors.astype(np.float32)})


@pytest.mark.parametrize("wrong", [np.ones(3, np.float32), np.ones((1, 8), np.float32)])
def test_factors_of_another_shape_are_refused(wrong: Any, tmp_path: Path) -> None:
    with pytest.raises(TensorError, match="rope_freqs"):
        config_of(tmp_path / "a.gguf", tensors={"rope_freqs.weight": wrong})


def test_factors_are_not_a_weight(tmp_path: Path) -> None:
    factors = transformers_factors(llama3(8.0, 8192), 500_000.0, 128).numpy()
    path = tmp_path / "a.gguf"
    keys = {"llama.rope.freq_base": 500_000.0, "llama.attention.key_length": 128}
    tensors = {"token_embd.weight": random(VOCABULARY, HIDDEN), "rope_freqs.weight": factors}
    write_model(path, tensors, keys=keys)
    with GgufFile.open(path) as file:
        assert file.tensors.keys() == {"model.embed_tokens.weight"}


def test_decimals_are_the_shortest(tmp_path: Path) -> None:
    """A float32 of 1e-06 reads as 1e-06, not as 9.999999974752427e-07."""
    path = tmp_path / "a.gguf"
    keys = with_keys(
        llama__attention__layer_norm_rms_epsilon=value(F32, 1e-6),
        llama__rope__freq_base=value(F32, 5e5),
        general__name=value(STRING, "x"),
        llama__context_length=value(U32, 1 << 17),
    )
    path.write_bytes(gguf_bytes(keys))
    with open_checkpoint(path) as checkpoint:
        assert str(checkpoint.config["rms_norm_eps"]) == "1e-06"
        assert checkpoint.config["rope_theta"] == 500_000.0
        assert checkpoint.config["max_position_embeddings"] == 131_072
