"""Opening a checkpoint, whatever its format."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from localr1.checkpoint import bnb, fp8
from localr1.checkpoint.dequantized import method_of
from localr1.checkpoint.gguf_file import GgufFile
from localr1.checkpoint.gguf_split import split_set
from localr1.checkpoint.hf_directory import CONFIG_NAME, HuggingFaceDirectory
from localr1.checkpoint.index import PICKLE_SUFFIXES, ArrivingFile
from localr1.checkpoint.stored import StoredCheckpoint
from localr1.errors import NotFoundError, UnsupportedError, UsageError

DEQUANTIZED_BY: dict[str, Callable[[StoredCheckpoint], StoredCheckpoint]] = {
    fp8.METHOD: fp8.Fp8Checkpoint,
    bnb.METHOD: bnb.BnbCheckpoint,
}
"""By `quant_method` of config.json: what presents a checkpoint's codes as numbers."""


def open_checkpoint(
    path: str | Path, arriving: Mapping[str, ArrivingFile] | None = None
) -> StoredCheckpoint:
    """Open a Hugging Face directory or a GGUF file. No tensor is read yet.

    arriving: safetensors files of the directory that lie elsewhere or are not whole yet, by their
    names in it. The tensors of one that is not whole can be read after `shards.attach`.

    Raises NotFoundError when nothing is there, UnsupportedError for formats that are not read, and
    CheckpointError (its kinds: errors.py) for damaged files.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path, arriving or {})
    if not os.path.lexists(path):
        raise NotFoundError(
            f"{path}: there is no such file or directory",
            fix="Give the directory of a model (with config.json) or a .gguf file.",
        )
    if path.suffix == ".safetensors" or path.name.endswith(".json"):
        raise UsageError(
            f"{path} is one file of a model",
            fix=f"Give the directory that holds it: {path.parent}",
        )
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedError(
            f"{path} is a pickle",
            fix="A pickle can run any program when it is opened, so localr1 never opens one. "
            "Use a release of the model in safetensors or GGUF.",
        )
    return GgufFile.open(path)


def _open_directory(path: Path, arriving: Mapping[str, ArrivingFile]) -> StoredCheckpoint:
    if not os.path.lexists(path / CONFIG_NAME):
        found = sorted(name for name in os.listdir(path) if name.endswith(".gguf"))
        if len(found) == 1:
            return GgufFile.open(path / found[0])
        if found and (first := split_set(found)):
            return GgufFile.open(path / first)
        if found:
            raise UsageError(
                f"{path} holds {len(found)} GGUF files", fix=f"Give one, such as {path / found[0]}"
            )
        raise NotFoundError(
            f"{path}: {CONFIG_NAME} is missing", fix="Give the directory of a Hugging Face model."
        )
    checkpoint = HuggingFaceDirectory(path, arriving)
    method = method_of(checkpoint.config)
    wrap = DEQUANTIZED_BY.get(method)
    if wrap is None:
        return checkpoint
    try:
        if method == bnb.METHOD and not all(file.is_whole for file in arriving.values()):
            raise UnsupportedError(
                f"{path}: a checkpoint of {bnb.METHOD} that is not there whole",
                expected="all its files, since the sizes of its matrices are among its tensors",
                fix="Download the whole model first.",
            )
        return wrap(checkpoint)
    except BaseException:
        checkpoint.close()
        raise
