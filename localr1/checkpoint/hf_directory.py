"""A Hugging Face model directory as a Checkpoint: JSON files beside safetensors.

Only data is read. `auto_map`, `custom_generate` and other invitations to run code are ignored.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.checkpoint.files import read_text
from localr1.checkpoint.index import ArrivingFile, FileRange, ShardSet
from localr1.checkpoint.manifest import expert_checksums
from localr1.checkpoint.paths import model_root, quoted, resolve
from localr1.checkpoint.rows import Rows
from localr1.checkpoint.strict_json import expect, kind_of, optional, parse_object, read_object
from localr1.errors import FormatError, NotFoundError, UnsupportedError

CONFIG_NAME = "config.json"
GENERATION_CONFIG_NAME = "generation_config.json"
TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
TEMPLATE_JSON_NAME = "chat_template.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_TOKENIZER_BYTES = 40 << 20
MAX_TOKENIZER_VALUES = 4_000_000
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKEN_ID = 2**31 - 1


class HuggingFaceDirectory:
    """The StoredCheckpoint (stored.py) of a directory. Opening reads the JSON files and the tensor
    headers. arriving: as ShardSet."""

    def __init__(self, path: Path, arriving: Mapping[str, ArrivingFile] | None = None) -> None:
        self._root = model_root(path)
        self._path = path
        self._config = self._json(CONFIG_NAME, MAX_CONFIG_BYTES)
        self._generation_config = self._json(GENERATION_CONFIG_NAME, MAX_CONFIG_BYTES, {})
        self._shards = ShardSet(self._root, arriving)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def format(self) -> str:
        return "safetensors"

    @property
    def config(self) -> Mapping[str, Any]:
        return self._config

    @property
    def generation_config(self) -> Mapping[str, Any]:
        return self._generation_config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._shards.tensors

    def read(self, name: str) -> Tensor:
        return self._shards.read(name)

    def pieces(self, name: str, max_nbytes: int) -> Iterator[Rows]:
        return self._shards.pieces(name, max_nbytes)

    @property
    def shards(self) -> ShardSet | None:
        return self._shards

    def stored_names(self, name: str) -> tuple[str, ...]:
        return (name,)

    def location(self, name: str) -> FileRange:
        """Where a tensor's bytes lie. Raises TensorError for an unknown name."""
        return self._shards.location(name)

    def expert_checksums(self) -> Mapping[str, tuple[int, ...]]:
        """What localr1.json has recorded (manifest.py), read anew; {} where it has nothing."""
        return expert_checksums(self._root, self._path)

    def tokenizer_files(self) -> TokenizerFiles:
        """Read tokenizer.json, tokenizer_config.json and the chat template.

        Raises NotFoundError without tokenizer.json, FormatError for values of the wrong kind.
        """
        if not self._has(TOKENIZER_NAME):
            if self._has("tokenizer.model"):
                raise UnsupportedError(
                    f"{self._path}: only tokenizer.model is here",
                    expected=TOKENIZER_NAME,
                    fix="Save the tokenizer with transformers once to get it.",
                )
            raise NotFoundError(f"{self._path}: {TOKENIZER_NAME} is missing")
        text = read_text(
            resolve(self._root, TOKENIZER_NAME), self._shown(TOKENIZER_NAME), MAX_TOKENIZER_BYTES
        )
        options = self._json(TOKENIZER_CONFIG_NAME, MAX_CONFIG_BYTES, {})
        shown = self._shown(TOKENIZER_CONFIG_NAME)
        bos_token = _token_text(options, "bos_token", shown)
        add_bos = optional(options, "add_bos_token", bool, shown)
        if add_bos is None:
            add_bos = self._post_processor_adds(text, bos_token)
        return TokenizerFiles(
            tokenizer_json=text,
            chat_template=self._chat_template(options),
            bos_token=bos_token,
            eos_token=_token_text(options, "eos_token", shown),
            pad_token=_token_text(options, "pad_token", shown),
            eos_token_ids=self._eos_token_ids(),
            add_bos=add_bos,
        )

    def close(self) -> None:
        self._shards.close()

    def __enter__(self) -> "HuggingFaceDirectory":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _has(self, name: str) -> bool:
        return os.path.lexists(self._root / name)

    def _shown(self, name: str) -> str:
        return str(self._path / name)

    def _json(
        self, name: str, max_bytes: int, default: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        if default is not None and not self._has(name):
            return default
        return read_object(resolve(self._root, name), self._shown(name), max_bytes=max_bytes)

    def _eos_token_ids(self) -> tuple[int, ...]:
        for name, document in (
            (GENERATION_CONFIG_NAME, self._generation_config),
            (CONFIG_NAME, self._config),
        ):
            value = document.get("eos_token_id")
            if value is not None:
                return token_ids(value, f"{self._shown(name)}: eos_token_id")
        return ()

    def _chat_template(self, options: Mapping[str, Any]) -> str | None:
        """chat_template.jinja, else chat_template.json, else tokenizer_config.json, as
        transformers."""
        if self._has(TEMPLATE_NAME):
            return read_text(
                resolve(self._root, TEMPLATE_NAME), self._shown(TEMPLATE_NAME), MAX_TEMPLATE_BYTES
            )
        shown = self._shown(TOKENIZER_CONFIG_NAME)
        if self._has(TEMPLATE_JSON_NAME):
            options, shown = (
                self._json(TEMPLATE_JSON_NAME, MAX_CONFIG_BYTES),
                self._shown(TEMPLATE_JSON_NAME),
            )
        template = options.get("chat_template")
        if template is None or isinstance(template, str):
            return template
        return _default_template(expect(template, list, f"{shown}: chat_template"), shown)

    def _post_processor_adds(self, tokenizer_json: str, bos_token: str | None) -> bool:
        """Whether tokenizer.json itself puts bos first (Llama 3 says it nowhere else)."""
        if bos_token is None:
            return False
        document = parse_object(
            tokenizer_json.encode(),
            self._shown(TOKENIZER_NAME),
            max_bytes=MAX_TOKENIZER_BYTES,
            max_values=MAX_TOKENIZER_VALUES,
        )
        return _adds_bos(document.get("post_processor"), bos_token)


def token_ids(value: object, shown: str) -> tuple[int, ...]:
    """One token id or a list of them, as configs give both."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if type(item) is not int or not 0 <= item <= MAX_TOKEN_ID:
            raise FormatError(
                shown,
                expected="a token id or a list of them",
                found=f"{kind_of(item)} {quoted(item)}",
            )
    return tuple(values)


def _token_text(options: Mapping[str, Any], key: str, shown: str) -> str | None:
    """A special token is given as its text, or as an object with `content`."""
    value = options.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return None if value is None else expect(value, str, f"{shown}: {key}")


def _default_template(templates: list[Any], shown: str) -> str:
    """Of several named templates the one called "default"."""
    where = f"{shown}: chat_template"
    named: dict[str, str] = {}
    for entry in templates:
        fields = expect(entry, dict, where)
        name = expect(fields.get("name"), str, f"{where}: name")
        named[name] = expect(fields.get("template"), str, f"{where}: template")
    if "default" not in named:
        raise FormatError(where, expected='one named "default"', found=quoted(", ".join(named)))
    return named["default"]


def _adds_bos(processor: object, bos_token: str) -> bool:
    """Whether a post-processor (tokenizers' JSON) begins a single text with bos."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence" and isinstance(processor.get("processors"), list):
        return any(_adds_bos(each, bos_token) for each in processor["processors"])
    single = processor.get("single")
    if processor.get("type") != "TemplateProcessing" or not isinstance(single, list) or not single:
        return False
    first = single[0].get("SpecialToken") if isinstance(single[0], dict) else None
    return isinstance(first, dict) and first.get("id") == bos_token
