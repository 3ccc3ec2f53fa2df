"""A checkpoint that has names, shapes and a tokenizer, but no float weights: what the quantizer
plans by when random codes take the place of quantized ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from byte_vocabulary import NUM_BYTES, byte_level_document
from torch import Tensor

from localr1.checkpoint.api import TensorInfo, TokenizerFiles
from localr1.errors import TensorError
from localr1.models.registry import parse_config
from localr1.models.tensor_list import CHOICE_BIAS, tensor_shapes

CONTROL: Final = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
EOS_ID: Final = NUM_BYTES + CONTROL.index("<|eos|>")
CONTROL_IDS: Final = tuple(range(NUM_BYTES, NUM_BYTES + len(CONTROL)))
TEMPLATE: Final = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CONSONANTS, _VOWELS = "bdfghjklmnprstvz", "aeiou"


def word(index: int) -> str:
    """A word of three syllables for each number below 512,000, as the library writes " word"."""
    syllables = len(_CONSONANTS) * len(_VOWELS)
    parts = []
    for _ in range(3):
        index, syllable = divmod(index, syllables)
        parts.append(_CONSONANTS[syllable // len(_VOWELS)] + _VOWELS[syllable % len(_VOWELS)])
    return "Ġ" + "".join(reversed(parts))


class GeometrySource:
    """A `Checkpoint` whose weights cannot be read."""

    format = "random"
    generation_config: Mapping[str, Any] = {}

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.path = Path(name)
        self.config: Mapping[str, Any] = {**config, "eos_token_id": EOS_ID}
        self.tensors: Mapping[str, TensorInfo] = {
            tensor: TensorInfo(tensor, "F32" if tensor.endswith(CHOICE_BIAS) else "BF16", shape, 0)
            for tensor, shape in tensor_shapes(parse_config(self.config)).items()
        }

    def read(self, name: str) -> Tensor:
        raise TensorError(f"{self.path}: tensor {name}", expected="weights", found="a size only")

    def tokenizer_files(self) -> TokenizerFiles:
        words = map(word, range(self.config["vocab_size"] - NUM_BYTES - len(CONTROL)))
        text = json.dumps(byte_level_document(CONTROL, words=words), ensure_ascii=False)
        return TokenizerFiles(text, TEMPLATE, "<|bos|>", "<|eos|>", None, (EOS_ID,), False)

    def close(self) -> None:
        return

    def __enter__(self) -> "GeometrySource":
        return self

    def __exit__(self, *exc: object) -> None:
        return
