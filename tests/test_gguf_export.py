"""A model written as GGUF and read back by our reader, which tests hold to llama.cpp's library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from byte_tokenizer import tokenizer_document
from gguf.constants import GGMLQuantizationType
from quant_sources import MIXTURES, dequantized, read_output, relative_error, save_source
from tiny_models import prompt, transformer_logits
from typer.testing import CliRunner

from localr1.checkpoint.api import TokenizerFiles
from localr1.checkpoint.gguf_file import GgufFile
from localr1.checkpoint.gguf_names import ARCHITECTURES
from localr1.checkpoint.gguf_pretokenizers import PRE_TOKENIZERS
from localr1.checkpoint.gguf_tokenizer import build_tokenizer_files
from localr1.checkpoint.reader import open_checkpoint
from localr1.cli.main import app
from localr1.errors import OutputError, UnsupportedError, UsageError
from localr1.kernels.reference import ReferenceKernels
from localr1.models.registry import load_model, parse_config
from localr1.models.step import Step
from localr1.quant import gguf_export
from localr1.quant.gguf_export import export_gguf
from localr1.quant.pipeline import quantize
from localr1.quant.recipe import Recipe
from localr1.tokenizer import Tokenizer

CLOSE = 1e-9
"""Relative squared difference of logits in float32 of the same weights; a swapped pair of rows
gives 1e-3 and more."""
ROUNDED = {"f16": 1e-6, "q8_0": 1e-4, "q4_0": 0.02}
"""Relative squared error of a matrix."""
IDS = prompt(0, 24)
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT_YARN = {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
V3, V2, MOE = (MIXTURES[name] for name in ("deepseek_v3", "deepseek_v2", "qwen3_moe"))
ONE_GROUP = {"n_group": 1, "topk_group": 1}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied-biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "max_position_embeddings": 131072}),
    "qwen2": ("qwen2", {}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", {**MOE, "norm_topk_prob": True}),
    "v2-lite": ("deepseek_v2", {**V2, **ONE_GROUP}),
    "v2": ("deepseek_v2", {**V2, "q_lora_rank": 64, "topk_method": "group_limited_greedy"}),
    "v3": ("deepseek_v3", V3),
    "v3-yarn": ("deepseek_v3", {**V3, "rope_parameters": LATENT_YARN}),
}
QUANTIZED = ("llama", "qwen3-tied", "qwen3-moe", "v3")


def known_tokenizer(folder: Path, pre: str = "qwen2") -> None:
    """A tokenizer that llama.cpp knows, in place of the bytes' own."""
    document = tokenizer_document()
    kind = PRE_TOKENIZERS[pre]
    document["pre_tokenizer"] = kind.to_json()
    document["normalizer"] = {"type": "NFC"} if kind.nfc else None
    document["model"]["ignore_merges"] = kind.ignore_merges
    vocabulary = document["model"]["vocab"]
    free = max(*vocabulary.values(), *(added["id"] for added in document["added_tokens"])) + 1
    vocabulary["th"] = free
    document["model"]["merges"] = [["t", "h"]]
    (folder / "tokenizer.json").write_text(json.dumps(document))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """case -> (the transformers model, its directory), made once."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(case: str) -> tuple[Any, Path]:
        if case not in made:
            folder = tmp_path_factory.mktemp("gguf") / "source"
            model_type, changes = CASES[case]
            made[case] = save_source(folder, model_type, **changes), folder
            known_tokenizer(folder)
        return made[case]

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_same_model_comes_back(case: str, sources: Any, tmp_path: Path) -> None:
    model, folder = sources(case)
    made = export_gguf(folder, tmp_path / "a.gguf")
    assert made.nbytes == (tmp_path / "a.gguf").stat().st_size
    with open_checkpoint(tmp_path / "a.gguf") as found, open_checkpoint(folder) as source:
        # Layers for multi-token prediction, which no checkpoint here has, are left out.
        assert parse_config(found.config) == replace(parse_config(source.config), mtp_layers=0)
        assert found.tensors.keys() == source.tensors.keys()
        for name in source.tensors:
            assert torch.equal(found.read(name).float(), source.read(name).float()), name
        ours = load_model(found, ReferenceKernels())
    logits = ours.forward(Step(IDS, 0, all_logits=True), ours.new_cache(len(IDS)))
    assert relative_error(transformer_logits(model, IDS), logits) < CLOSE


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("case", QUANTIZED)
def test_codes_are_carried_over(case: str, group: int, sources: Any, tmp_path: Path) -> None:
    """Groups of 64 are two blocks of one scale. The matrix to keys and values, kept, is rounded."""
    _, folder = sources(case)
    quantize(folder, tmp_path / "out", Recipe.uniform(4, group if "v3" not in case else 32))
    made = export_gguf(tmp_path / "out", tmp_path / "a.gguf")
    assert {"Q4_0", "Q8_0"} <= made.types.keys()
    expected = dequantized(read_output(tmp_path / "out"))
    with open_checkpoint(tmp_path / "a.gguf") as found:
        assert found.tensors.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("kv_b_proj.weight"):
                assert relative_error(value, found.read(name).float()) < ROUNDED["q8_0"]
            else:
                assert torch.equal(found.read(name).float(), value), name


def test_codes_of_five_and_six_bits_become_eight(sources: Any, tmp_path: Path) -> None:
    _, folder = sources("llama")
    quantize(folder, tmp_path / "out", Recipe.uniform(5, 32, attention_bits=6, head_bits=4))
    made = export_gguf(tmp_path / "out", tmp_path / "a.gguf")
    assert {"Q4_0", "Q8_0"} <= made.types.keys()
    expected = dequantized(read_output(tmp_path / "out"))
    with open_checkpoint(tmp_path / "a.gguf") as found:
        for name, value in expected.items():
            assert torch.equal(found.read(name).float(), value), name


@pytest.mark.parametrize("kind", ROUNDED)
@pytest.mark.parametrize("case", ["llama", "v3"])
def test_named_types(kind: str, case: str, sources: Any, tmp_path: Path) -> None:
    _, folder = sources(case)
    made = export_gguf(folder, tmp_path / "a.gguf", kind)
    # The matrix to the keys, whose rows have 12 columns in absorbed form, does not divide.
    assert made.types.keys() == {"F32", kind.upper(), *(["Q8_0"] if kind == "q4_0" else [])} | (
        {"F16"} if case == "v3" else set()
    )
    with open_checkpoint(tmp_path / "a.gguf") as found, open_checkpoint(folder) as source:
        for name, info in source.tensors.items():
            error = relative_error(source.read(name).float(), found.read(name).float())
            if len(info.shape) == 1 or name.endswith("mlp.gate.weight"):
                assert error == 0.0
            else:
                assert error < ROUNDED[kind], name


def test_what_is_quantized_is_rounded_to_another_type(sources: Any, tmp_path: Path) -> None:
    _, folder = sources("llama")
    quantize(folder, tmp_path / "out", Recipe.uniform(4, 32))
    export_gguf(tmp_path / "out", tmp_path / "a.gguf", "f16")
    expected = dequantized(read_output(tmp_path / "out"))
    with open_checkpoint(tmp_path / "a.gguf") as found:
        for name, value in expected.items():
            assert relative_error(value, found.read(name).float()) < ROUNDED["f16"]


def files_of(folder: Path) -> TokenizerFiles:
    with open_checkpoint(folder) as checkpoint:
        return checkpoint.tokenizer_files()


TEXTS = ("The weather: 3.14 is\tthere,\n\n  then  that’s déjà vu!", "<think>\nthe</s> 東京 42")


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "smollm", "deepseek-v3", "gpt-2"])
def test_the_tokenizer_comes_back(pre: str, tmp_path: Path) -> None:
    save_source(tmp_path / "source", vocab_size=310)
    known_tokenizer(tmp_path / "source", pre)
    export_gguf(tmp_path / "source", tmp_path / "a.gguf")
    source = files_of(tmp_path / "source")
    with GgufFile.open(tmp_path / "a.gguf") as file:
        found = build_tokenizer_files(file.metadata)
        assert len(file.metadata.strings("tokenizer.ggml.tokens")) == 310
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "add_bos"):
        assert getattr(found, name) == getattr(source, name), name
    assert found.eos_token_ids == source.eos_token_ids
    ours, theirs = (Tokenizer.from_files(each, 310) for each in (source, found))
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert theirs.decode(theirs.encode(text)) == ours.decode(ours.encode(text))
    assert theirs.encode("th") == ours.encode("th") == [ours.encode("th")[0]]


def test_the_way_transformers_writes_a_cut(tmp_path: Path) -> None:
    """SmolLM2's: digits one by one, then GPT-2's pattern inside ByteLevel."""
    save_source(tmp_path / "source")
    known_tokenizer(tmp_path / "source", "smollm")
    path = tmp_path / "source" / "tokenizer.json"
    document = json.loads(path.read_text())
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**byte_level, "use_regex": True},
        ],
    }
    path.write_text(json.dumps(document))
    export_gguf(tmp_path / "source", tmp_path / "a.gguf")
    with GgufFile.open(tmp_path / "a.gguf") as file:
        assert file.metadata.string("tokenizer.ggml.pre") == "smollm"


def change_tokenizer(folder: Path, **parts: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Split, Digits, ByteLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "none or NFC, found 'Lowercase'"),
        ({"model": {"type": "Unigram", "vocab": []}}, "byte-level BPE, found 'Unigram'"),
        ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"}},
         "expected ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x"}, "behavior": "Isolated"},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]}},
         "llama.cpp has no name for this one"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_has_no_name_for(
    parts: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_source(tmp_path / "source")
    known_tokenizer(tmp_path / "source")
    change_tokenizer(tmp_path / "source", **parts)
    with pytest.raises(UnsupportedError, match=message):
        export_gguf(tmp_path / "source", tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {**MOE, "norm_topk_prob": False}, "norm_topk_prob false"),
        ("qwen3_moe", {**MOE, "norm_topk_prob": True, "mlp_only_layers": [0]}, "dense layers"),
        ("deepseek_v3", {**V3, "rope_interleave": False}, "rope in halves"),
        ("deepseek_v3", {**V3, "rope_parameters": {**LATENT_YARN, "mscale": 0.5}}, "alike"),
    ],
)
def test_what_llama_cpp_has_no_key_for(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_source(tmp_path / "source", model_type, **changes)
    known_tokenizer(tmp_path / "source")
    with pytest.raises(UnsupportedError, match=message):
        export_gguf(tmp_path / "source", tmp_path / "a.gguf")


def test_a_tensor_without_a_name(sources: Any, tmp_path: Path) -> None:
    """Norms of q and k in a llama: left out, the file would be another model."""
    _, folder = sources("llama")
    with open_checkpoint(folder) as checkpoint:
        config = parse_config(checkpoint.config)
        converter = gguf_export._Converter(
            checkpoint, config, ARCHITECTURES["llama"], gguf_export.STORED
        )
        entries = list(converter.entries())
        converter.check_complete(entries)
        with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.down_proj\.weight"):
            converter.check_complete(
                [entry for entry in entries if entry.name != "blk.1.ffn_down.weight"]
            )


def test_nothing_is_left_after_an_error(
    sources: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = sources("llama")
    encoded = gguf_export._encoded
    calls = iter(range(100))

    def fail(values: Any, kind: Any) -> Any:
        if next(calls) == 5:
            raise OSError(28, "No space left on device")
        return encoded(values, kind)

    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "_encoded", fail)
        with pytest.raises(OutputError, match=r"a\.gguf: cannot be written: found No space"):
            export_gguf(folder, tmp_path / "a.gguf")
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(gguf_export, "HEADER_BYTES", 1 << 60)
        with pytest.raises(OutputError, match="disk is too small"):
            export_gguf(folder, tmp_path / "a.gguf")
    export_gguf(folder, tmp_path / "a.gguf")
    with pytest.raises(OutputError, match="exists"):
        export_gguf(folder, tmp_path / "a.gguf")
    with pytest.raises(OutputError, match="is not a directory"):
        export_gguf(folder, tmp_path / "none" / "a.gguf")


def test_the_same_bytes_again(sources: Any, tmp_path: Path) -> None:
    _, folder = sources("v3")
    for name in ("a", "b"):
        export_gguf(folder, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_command(sources: Any, tmp_path: Path) -> None:
    _, folder = sources("llama")
    run = CliRunner().invoke
    done = run(app, ["export", str(folder), str(tmp_path / "a.gguf"), "--type", "q8_0", "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["architecture"] == "llama"
    assert document["types"]["Q8_0"] == 16
    shown = run(app, ["export", str(folder), str(tmp_path / "b.gguf")])
    assert "16 BF16" in shown.stdout
    for option in (("--type", "q5_0"), ("--format", "onnx")):
        result = run(app, ["export", str(folder), str(tmp_path / "c.gguf"), *option])
        assert isinstance(result.exception, UsageError)


def test_q4_0_of_the_library_is_what_the_codes_mean() -> None:
    """Both ways to Q4_0 on one matrix that it holds exactly."""
    codes = torch.randint(-8, 8, (4, 64), generator=torch.Generator().manual_seed(0))
    codes[:, ::32] = -8
    values = (codes * 0.5).float().numpy()
    blocks = gguf_export._encoded(values, GGMLQuantizationType.Q4_0)
    assert np.array_equal(gguf.quants.dequantize(blocks, GGMLQuantizationType.Q4_0), values)
