"""Which model this is, told by a little of its bytes."""

import hashlib
from pathlib import Path
from typing import Final

from localr1.checkpoint.files import RandomAccessFile
from localr1.checkpoint.gguf_split import part_paths

SAMPLE_BYTES: Final = 4096
SAMPLES: Final = 32
"""Of a large file, evenly spread. Another training run, another revision or another quantization
changes nearly every page of the weights."""
_READ: Final = ("*.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")


def fingerprint(path: Path) -> str:
    """SHA-256 over names, sizes and samples of what the model at `path` (a Hugging Face directory
    or a .gguf file) is made of. It tells models apart, and is no proof against forgery: what was
    changed between two samples goes unseen. Raises CheckpointError where a file cannot be read."""
    if path.is_dir():
        files = [file for pattern in _READ for file in sorted(path.glob(pattern))]
    else:
        files = part_paths(path)
    digest = hashlib.sha256()
    for file in files:
        opened = RandomAccessFile(file)
        try:
            digest.update(f"{len(file.name)} {file.name} {opened.size} ".encode())
            for offset, length in _samples(opened.size):
                digest.update(opened.read(offset, length))
        finally:
            opened.close()
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """(offset, bytes): the whole of a small file."""
    if size <= SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    last = size - SAMPLE_BYTES
    return [(last * place // (SAMPLES - 1), SAMPLE_BYTES) for place in range(SAMPLES)]
