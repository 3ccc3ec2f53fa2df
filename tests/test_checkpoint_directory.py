"""A Hugging Face directory: shards behind an index, and the JSON files beside them."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import gguf_bytes, refused, tree
from safetensors.torch import save_file

from localr1.checkpoint.index import INDEX_NAME, SINGLE_NAME
from localr1.checkpoint.reader import open_checkpoint
from localr1.errors import (
    FormatError,
    LocalR1Error,
    NotFoundError,
    TensorError,
    TruncatedError,
    UnsupportedError,
    UsageError,
)

FIRST = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
SECOND = {"c": torch.arange(5)}
NAMES = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
TENSOR_BYTES = 24 + 8 + 40


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with two shards, in which each test spoils something."""
    save_file(FIRST, tmp_path / "one.safetensors")
    save_file(SECOND, tmp_path / "two.safetensors")
    write_json(
        tmp_path / INDEX_NAME, {"metadata": {"total_size": TENSOR_BYTES}, "weight_map": NAMES}
    )
    write_json(tmp_path / "config.json", {"model_type": "llama", "eos_token_id": 7})
    return tmp_path


def change_index(**fields: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        index = json.loads((model / INDEX_NAME).read_text())
        write_json(model / INDEX_NAME, {**index, **fields})

    return change


def test_shards_are_one_checkpoint(model: Path) -> None:
    before = tree(model)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.format == "safetensors"
        assert checkpoint.path == model
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.generation_config == {}
        assert checkpoint.tensors.keys() == {"a", "b", "c"}
        for name, expected in {**FIRST, **SECOND}.items():
            assert torch.equal(checkpoint.read(name), expected)
        with pytest.raises(TensorError, match="'d'"):
            checkpoint.read("d")
    assert tree(model) == before


def test_a_single_file_needs_no_index(model: Path) -> None:
    (model / INDEX_NAME).unlink()
    save_file(FIRST, model / SINGLE_NAME)
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.tensors.keys() == {"a", "b"}


FILE_BYTES = "file bytes"


@pytest.mark.parametrize("total", [TENSOR_BYTES, float(TENSOR_BYTES), 2 * 15, FILE_BYTES, None])
def test_totals_that_released_checkpoints_state(total: object, model: Path) -> None:
    """The bytes of the tensors, of the files, or two for each value (DeepSeek-V3 and R1)."""
    if total == FILE_BYTES:
        total = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    change_index(metadata={} if total is None else {"total_size": total})(model)
    open_checkpoint(model).close()


def mapped(**names: str) -> Callable[[Path], None]:
    return change_index(weight_map={**NAMES, **names})


def save(name: str, tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda model: save_file(tensors, model / name)


def swap(model: Path) -> None:
    (model / "one.safetensors").rename(model / "x")
    (model / "two.safetensors").rename(model / "one.safetensors")
    (model / "x").rename(model / "two.safetensors")


def duplicate(model: Path) -> None:
    (model / "two.safetensors").write_bytes((model / "one.safetensors").read_bytes())


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def put(model: Path) -> None:
        (model / name).write_bytes(content)

    return put


def remove(*names: str) -> Callable[[Path], None]:
    def delete(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return delete


BAD_DIRECTORIES: dict[str, tuple[Callable[[Path], None], type[LocalR1Error], str]] = {
    "missing shard": (remove("two.safetensors"), NotFoundError, "'two.safetensors' is missing"),
    "swapped shards": (swap, TensorError, "tensor 'a'"),
    "a shard twice": (
        duplicate,
        TensorError,
        "is in two files",
    ),
    "tensor in two shards": (
        save("two.safetensors", {**SECOND, "a": FIRST["a"]}),
        TensorError,
        "one.safetensors and two.safetensors",
    ),
    "key absent from its shard": (mapped(d="two.safetensors"), TensorError, "'d'"),
    "key in another shard": (mapped(c="one.safetensors"), TensorError, "'c'"),
    "tensor not in the index": (save("two.safetensors", {**SECOND, "d": FIRST["a"]}), TensorError,
                                "'d' is not in"),
    "total too small": (
        change_index(metadata={"total_size": TENSOR_BYTES - 1}), FormatError, "found 71"),
    "total too large": (
        change_index(metadata={"total_size": TENSOR_BYTES + 1}), FormatError, "expected 72"),
    "total of text": (change_index(metadata={"total_size": "72"}), FormatError, "an integer"),
    "total true": (change_index(metadata={"total_size": True}), FormatError, "an integer"),
    "total negative": (change_index(metadata={"total_size": -72}), FormatError, "-72"),
    "metadata list": (change_index(metadata=[]), FormatError, "metadata"),
    "no map": (write(INDEX_NAME, b"{}"), FormatError, "weight_map is missing"),
    "empty map": (change_index(weight_map={}), FormatError, "weight_map"),
    "map of a list": (change_index(weight_map=[]), FormatError, "an object"),
    "name of a number": (change_index(weight_map={"a": 1}), FormatError, "a string"),
    "index not JSON": (write(INDEX_NAME, b"{"), FormatError, "not valid JSON"),
    "index twice": (write(INDEX_NAME, b'{"weight_map":{},"weight_map":{}}'), FormatError, "twice"),
    "../": (mapped(a="../one.safetensors"), FormatError, "inside the model's directory"),
    "absolute": (mapped(a="/tmp/one.safetensors"), FormatError, "inside the model's directory"),
    "drive": (mapped(a="C:one.safetensors"), FormatError, "file name"),
    "UNC": (mapped(a="\\\\host\\share\\one.safetensors"), FormatError, "file name"),
    "NUL": (mapped(a="one\0.safetensors"), FormatError, "file name"),
    "/dev/zero": (mapped(a="/dev/zero"), UnsupportedError, "a .safetensors file"),
    "a pickle": (mapped(a="one.bin"), UnsupportedError, "a .safetensors file"),
    "too many files": (
        change_index(weight_map={f"t{n}": f"{n}.safetensors" for n in range(3000)}),
        FormatError,
        "too many files",
    ),
    "shard cut": (
        lambda model: os.truncate(model / "one.safetensors", 50), TruncatedError, "header"),
    "no index": (remove(INDEX_NAME), NotFoundError, INDEX_NAME),
    "no weights": (
        remove(INDEX_NAME, "one.safetensors", "two.safetensors"), NotFoundError, "no weights"),
    "no config": (remove("config.json"), NotFoundError, "config.json"),
    "config NaN": (write("config.json", b'{"a": NaN}'), FormatError, "NaN"),
    "config list": (write("config.json", b"[]"), FormatError, "a JSON object"),
    "config large": (write("config.json", b" " * (5 << 20)), FormatError, "too large"),
    "generation config": (write("generation_config.json", b'{"a": 1e999}'), FormatError, "1e999"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_DIRECTORIES)
def test_bad_directories_are_refused(name: str, model: Path) -> None:
    spoil, error, said = BAD_DIRECTORIES[name]
    spoil(model)
    with refused(model, error, said):
        open_checkpoint(model)


@pytest.mark.skipif(sys.platform == "win32", reason="needs links and pipes of POSIX")
def test_shards_behind_links_and_pipes_are_refused(model: Path, tmp_path_factory: Any) -> None:
    outside = tmp_path_factory.mktemp("outside") / "one.safetensors"
    save_file(FIRST, outside)
    (model / "one.safetensors").unlink()
    (model / "one.safetensors").symlink_to(outside)
    with refused(model, FormatError, "a link to"):
        open_checkpoint(model)
    (model / "one.safetensors").unlink()
    os.mkfifo(model / "one.safetensors")
    with refused(model, FormatError, "a named pipe"):
        open_checkpoint(model)
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(outside)
    with refused(model, FormatError, "a link to"):
        open_checkpoint(model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(name: str, model: Path) -> None:
    remove(INDEX_NAME, "one.safetensors", "two.safetensors")(model)
    (model / name).write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with refused(model, UnsupportedError, "A pickle can run any program"):
        open_checkpoint(model)
    with refused(model, UnsupportedError, "A pickle can run any program"):
        open_checkpoint(model / name)


def test_remote_code_is_ignored(model: Path) -> None:
    (model / "evil.py").write_text("raise SystemExit(3)")
    write_json(
        model / "config.json",
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    )
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.config["model_type"] == "llama"


def test_what_a_path_can_be(tmp_path: Path) -> None:
    with refused(tmp_path, NotFoundError, "no such file or directory"):
        open_checkpoint(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refused(tmp_path, UsageError, f"Give the directory that holds it: {tmp_path}"):
        open_checkpoint(tmp_path / "model.safetensors")
    with refused(tmp_path, NotFoundError, "config.json is missing"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(gguf_bytes())
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "gguf"
    (tmp_path / "y.gguf").write_bytes(gguf_bytes())
    with refused(tmp_path, UsageError, "2 GGUF files"):
        open_checkpoint(tmp_path)


# The tokenizer's files.

TOKENIZER = {"model": {"type": "BPE"}, "post_processor": None}
ADDS_BOS = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
}


def tokenizer_files(model: Path, options: object, tokenizer: object = TOKENIZER) -> Any:
    write_json(model / "tokenizer.json", tokenizer)
    write_json(model / "tokenizer_config.json", options)
    with open_checkpoint(model) as checkpoint:
        return checkpoint.tokenizer_files()


def test_special_tokens_are_text_or_objects(model: Path) -> None:
    files = tokenizer_files(
        model,
        {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "pad_token": None},
    )
    assert (files.bos_token, files.eos_token, files.pad_token) == ("<s>", "</s>", None)
    assert json.loads(files.tokenizer_json) == TOKENIZER
    assert files.chat_template is None
    assert files.eos_token_ids == (7,)
    write_json(model / "generation_config.json", {"eos_token_id": [3, 4]})
    assert tokenizer_files(model, {}).eos_token_ids == (3, 4)
    (model / "tokenizer_config.json").unlink()
    with open_checkpoint(model) as checkpoint:
        assert checkpoint.tokenizer_files().bos_token is None


@pytest.mark.parametrize(
    ("options", "processor", "adds"),
    [
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, ADDS_BOS, False),
        ({}, None, False),
        ({}, ADDS_BOS, True),
        ({}, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, ADDS_BOS]}, True),
        ({}, {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}, False),
        ({}, {"type": "TemplateProcessing", "single": []}, False),
    ],
)
def test_whether_bos_is_added(
    options: dict[str, Any], processor: object, adds: bool, model: Path
) -> None:
    """tokenizer_config.json says it; where it does not, tokenizer.json's own post-processor."""
    tokenizer = {**TOKENIZER, "post_processor": processor}
    assert tokenizer_files(model, {"bos_token": "<s>", **options}, tokenizer).add_bos is adds


def test_where_the_chat_template_is(model: Path) -> None:
    assert tokenizer_files(model, {"chat_template": "plain"}).chat_template == "plain"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert tokenizer_files(model, {"chat_template": named}).chat_template == "d"
    write_json(model / "chat_template.json", {"chat_template": "json"})
    assert tokenizer_files(model, {"chat_template": "plain"}).chat_template == "json"
    (model / "chat_template.jinja").write_text("jinja ｜", encoding="utf-8")
    assert tokenizer_files(model, {"chat_template": "plain"}).chat_template == "jinja ｜"


BAD_OPTIONS: dict[str, tuple[object, type[LocalR1Error], str]] = {
    "template number": ({"chat_template": 1}, FormatError, "chat_template"),
    "no default": ({"chat_template": [{"name": "a", "template": "b"}]}, FormatError, "default"),
    "template list": ({"chat_template": ["a"]}, FormatError, "an object"),
    "bos number": ({"bos_token": 1}, FormatError, "bos_token"),
    "add_bos text": ({"add_bos_token": "true"}, FormatError, "true or false"),
    "list": ([], FormatError, "a JSON object"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_tokenizer_options_are_refused(name: str, model: Path) -> None:
    options, error, said = BAD_OPTIONS[name]
    with pytest.raises(error, match=said):
        tokenizer_files(model, options)


@pytest.mark.parametrize("ids", [True, -1, 1 << 40, 1.0, "7", [1, None], [[1]]])
def test_bad_end_ids_are_refused(ids: object, model: Path) -> None:
    write_json(model / "config.json", {"eos_token_id": ids})
    with pytest.raises(FormatError, match="eos_token_id"):
        tokenizer_files(model, {})


def test_a_missing_tokenizer_is_named(model: Path) -> None:
    with open_checkpoint(model) as checkpoint:
        with refused(model, NotFoundError, "tokenizer.json is missing"):
            checkpoint.tokenizer_files()
        (model / "tokenizer.model").write_bytes(b"x")
        with refused(model, UnsupportedError, "only tokenizer.model"):
            checkpoint.tokenizer_files()
        (model / "tokenizer.json").write_bytes(b"\xff\xfe")
        with refused(model, FormatError, "is not UTF-8"):
            checkpoint.tokenizer_files()
