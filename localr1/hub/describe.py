"""What a model is, in a word each, from its config.json, index, manifest or GGUF keys. No tensor is
read, and torch is not imported: a list of twenty models must be there at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.manifest import MANIFEST_NAME
from localr1.checkpoint.strict_json import read_object
from localr1.errors import FormatError, LocalR1Error
from localr1.hub.known import known_models

CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 32 << 20
MAX_MANIFEST_BYTES: Final = 16 << 20
MAX_WORD: Final = 24
DTYPES: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
UNKNOWN: Final = "?"
PRE_QUANTIZED, ORIGINAL, QUANTIZED, GGUF = "pre-quantized", "original", "quantized", "gguf"
"""Kinds of a local model: packed by others; as released; packed by localr1; a GGUF file."""


@dataclass(frozen=True)
class Facts:
    """kind: one of the four. quantization: "int4 g32", "BF16", "Q4_K_M", or UNKNOWN. context:
    tokens, None where it is not said. missing: files that the model names and that are not there.
    """

    kind: str
    quantization: str
    context: int | None
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Origin:
    """Where a quantized model's source came from, by its manifest; None: not from a cache."""

    repository: str | None
    commit: str | None


def describe_directory(read: Callable[[str], Path | None], shown: Path) -> Facts:
    """read: the path of a file by its name, None where it is not there. shown: how errors call the
    directory. Raises FormatError and its like for what cannot be read."""
    config = _document(read, CONFIG_NAME, shown)
    text, packed = quantization_of(config)
    kind = PRE_QUANTIZED if packed else ORIGINAL
    if read(MANIFEST_NAME) is not None:
        kind = QUANTIZED
    return Facts(kind, text, _size(config.get("max_position_embeddings")), _missing(read, shown))


def is_language_model(config: Mapping[str, Any]) -> bool:
    """Whether config.json says so: its class ends in ForCausalLM or LMHeadModel; where it names no
    class, its type is that of a model known by name."""
    names = config.get("architectures")
    if names is None:
        types = [model.config["model_type"] for model in known_models().values()]
        return config.get("model_type") in types
    return isinstance(names, list) and any(
        isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel")) for name in names
    )


def read_config(path: Path) -> dict[str, Any]:
    return read_object(path, str(path))


def quantization_of(config: Mapping[str, Any]) -> tuple[str, bool]:
    """(in a word, whether the weights are packed into few bits)."""
    packing = config.get("quantization_config")
    if not isinstance(packing, Mapping):
        dtype = config.get("torch_dtype", config.get("dtype"))
        return (DTYPES.get(dtype, _word(dtype)) if isinstance(dtype, str) else UNKNOWN), False
    method = packing.get("quant_method")
    if method == "fp8":
        return "FP8", False
    if method == "bitsandbytes":
        if packing.get("load_in_4bit") is True:
            return f"bnb-{_word(packing.get('bnb_4bit_quant_type', 'fp4'))}", True
        return "bnb-int8", True
    if method == "compressed-tensors":
        return _groups(packing.get("config_groups")), True
    bits = packing.get("bits")
    return _word(method) + (f"-int{bits}" if type(bits) is int and 0 < bits < 33 else ""), True


def _groups(groups: object) -> str:
    """Of compressed-tensors, each scheme once: "int4 g32 + int8 g32"."""
    schemes: dict[str, None] = {}
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        kind = "fp" if weights.get("type") == "float" else "int"
        size = weights.get("group_size")
        grouped = f"g{size}" if type(size) is int and size > 0 else _word(weights.get("strategy"))
        schemes[_word(f"{kind}{weights.get('num_bits')} {grouped}")] = None
    return " + ".join(list(schemes)[:3]) or UNKNOWN


def describe_gguf(path: Path) -> Facts:
    """Of a GGUF file, or the first of several parts. Raises FormatError and its like."""
    from localr1.checkpoint.gguf_header import read_description

    file = RandomAccessFile(path)
    try:
        metadata = read_description(file)
    finally:
        file.close()
    kind = _word(metadata.string("general.architecture", ""))
    context = metadata.integer(f"{kind}.context_length", -1)
    file_type = metadata.integer("general.file_type", -1)
    return Facts(GGUF, _file_type(file_type), _size(context))


def _file_type(number: int) -> str:
    """ggml's name of a mixture of block types: Q4_K_M."""
    from gguf.constants import LlamaFileType

    try:
        return str(LlamaFileType(number).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        return UNKNOWN


def gguf_models(names: list[str]) -> dict[str, list[str]]:
    """The models among file names: that of a single file, or of its first part -> all that belong
    to it and are there."""
    from localr1.checkpoint.gguf_split import part_names

    found: dict[str, list[str]] = {}
    for name in sorted(names):
        folder, _, base = name.rpartition("/")
        first = f"{folder}/{part_names(base)[0]}".removeprefix("/")
        if base.endswith(".gguf") and not base.startswith("mmproj"):
            found.setdefault(first, []).append(name)
    return found


def missing_parts(first: str, there: list[str]) -> tuple[str, ...]:
    """Of a GGUF model in several parts those that are not among `there`."""
    from localr1.checkpoint.gguf_split import part_names

    folder, _, base = first.rpartition("/")
    wanted = [f"{folder}/{name}".removeprefix("/") for name in part_names(base)]
    return tuple(name for name in wanted if name not in there)


def origin_of(path: Path) -> Origin:
    """Of localr1.json at `path`. Raises FormatError."""
    source = read_object(path, str(path), max_bytes=MAX_MANIFEST_BYTES).get("source")
    values = source if isinstance(source, Mapping) else {}
    repository, commit = values.get("repository"), values.get("commit")
    return Origin(
        repository if isinstance(repository, str) else None,
        commit if isinstance(commit, str) else None,
    )


def _missing(read: Callable[[str], Path | None], shown: Path) -> tuple[str, ...]:
    """Weights that the directory lacks. Whether a tokenizer should be there nothing in it says."""
    if read(WEIGHTS_NAME) is not None:
        return ()
    if read(INDEX_NAME) is None:
        return (WEIGHTS_NAME,)
    weight_map = _document(read, INDEX_NAME, shown, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise FormatError(f"{shown / INDEX_NAME}: weight_map", expected="names of files")
    return tuple(name for name in sorted(set(weight_map.values())) if read(name) is None)


def _document(
    read: Callable[[str], Path | None], name: str, shown: Path, max_bytes: int = 16 << 20
) -> dict[str, Any]:
    path = read(name)
    if path is None:
        raise FormatError(f"{shown / name}", expected="a file", found="none")
    return read_object(path, str(shown / name), max_bytes=max_bytes)


def _word(value: object) -> str:
    """Of an untrusted text so much as fits a column."""
    return value[:MAX_WORD] if isinstance(value, str) and value else UNKNOWN


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 31 else None


def problem_of(error: LocalR1Error | OSError) -> str:
    """As a row of a table says it."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}"
    return str(error)
