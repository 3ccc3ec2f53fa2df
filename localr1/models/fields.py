"""Typed, strict reading of config.json: every field is read, known to be harmless, or refused.

A field that is not read here and not harmless may change what the model computes, so it is an
error that names it, unless its value is the one that switches a feature off (null, false, zero,
empty).
"""

import math
from collections.abc import Mapping, Sequence

from localr1.errors import ConfigError, UnsupportedError

MAX_SHOWN = 60
"""Characters of a bad value that an error message quotes."""

# fmt: off
HARMLESS = frozenset({
    # Files and other programs.
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "name_or_path",
    "_name_or_path", "_commit_hash", "tokenizer_class", "model_name", "model_max_length",
    "max_sequence_length", "transformers.js_config", "is_llama_config", "unsloth_fixed",
    "unsloth_version", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "_attn_implementation_internal", "torchscript",
    "use_bfloat16", "tf_legacy_loss", "gradient_checkpointing",
    # Special tokens, which the tokenizer knows.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id",
    # Training.
    "initializer_range", "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop",
    "hidden_dropout", "classifier_dropout", "pretraining_tp",
    # What a call returns, and other heads.
    "use_cache", "output_attentions", "output_hidden_states", "output_scores", "return_dict",
    "use_return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "finetuning_task",
    "task_specific_params", "problem_type", "id2label", "label2id", "num_labels",
    # Defaults of generation.
    "prefix", "max_length", "min_length", "max_new_tokens", "do_sample", "early_stopping",
    "num_beams", "num_beam_groups", "num_return_sequences", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "exponential_decay_length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values",
})
# fmt: on
"""Fields of released checkpoints that do not change a forward pass: they speak of training,
generation defaults, file handling or other programs. `pretraining_tp` only says into how many
slices the training run cut its matrix products, which sum to the same numbers."""


def describe(value: object) -> str:
    """A bad value as an error message shows it: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 128:  # repr refuses thousands of digits.
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)} entries"
    if isinstance(value, bool):
        return str(value).lower()
    text = "null" if value is None else repr(value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


class Fields:
    """One JSON object of a config. Names in errors are prefixed with `where`; null is absent."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self._where = where
        self._read: set[str] = set()

    def has(self, name: str) -> bool:
        """Present and not null."""
        self._read.add(name)
        return self._values.get(name) is not None

    def integer(self, name: str, minimum: int, maximum: int, default: int | None = None) -> int:
        """An integer within bounds. Without a default the field is required."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self.error(name, f"an integer from {minimum} to {maximum}", value)
        return value

    def number(
        self, name: str, minimum: float, maximum: float, default: float | None = None
    ) -> float:
        """A finite number within bounds, an integer or not."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(name, "a number", value)
        if not (minimum <= value <= maximum and math.isfinite(value)):
            raise self.error(name, f"a finite number from {minimum:g} to {maximum:g}", value)
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false", value)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, "a string", value)
        return value

    def strings(self, name: str) -> Sequence[str]:
        """A list of strings; absent is empty."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(name, "a list of strings", value)
        return value

    def integers(self, name: str, minimum: int, maximum: int) -> Sequence[int]:
        """A list of integers within bounds; absent is empty."""
        value = self._get(name, [])
        if not isinstance(value, list):
            raise self.error(name, "a list of integers", value)
        for item in value:
            if type(item) is not int or not minimum <= item <= maximum:
                raise self.error(name, f"integers from {minimum} to {maximum}", item)
        return value

    def nested(self, name: str) -> "Fields | None":
        """A nested object, or None when absent."""
        if not self.has(name):
            return None
        value = self._values[name]
        if not isinstance(value, Mapping):
            raise self.error(name, "an object", value)
        return Fields(value, f"{self._where}: {name}")

    def same_as(self, other: "Fields") -> bool:
        return dict(self._values) == dict(other._values)

    def only(self, name: str, *honoured: object) -> None:
        """A field that is optional and may have these values alone; another is not supported."""
        if self.has(name) and self._values[name] not in honoured:
            raise self.unsupported(name, " or ".join(describe(value) for value in honoured))

    def skip(self, *names: str) -> None:
        """Count fields as read that the caller has shown to change nothing."""
        self._read.update(names)

    def error(self, name: str, expected: str, found: object) -> ConfigError:
        return ConfigError(f"{self._where}: {name}", expected=expected, found=describe(found))

    def unsupported(self, name: str, expected: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self._where}: {name} is not honoured",
            expected=expected,
            found=describe(self._values.get(name)),
            fix="It changes what the model computes, so the model is not loaded.",
        )

    def refuse_unread(self) -> None:
        """Raise UnsupportedError for the first field that nobody read and that may matter."""
        for name, value in self._values.items():
            if name in self._read or name in HARMLESS or _is_off(value):
                continue
            raise UnsupportedError(
                f"{self._where}: unknown field {name}",
                expected="a field this architecture is known to have",
                found=describe(value),
                fix="It may change what the model computes, so the model is not loaded. "
                "If it does not, remove it from the file.",
            )

    def _get(self, name: str, default: object) -> object:
        if self.has(name):
            return self._values[name]
        if default is None:
            found = "null" if name in self._values else "nothing"
            raise ConfigError(f"{self._where}: {name}", expected="a value", found=found)
        return default


def _is_off(value: object) -> bool:
    return value is None or value is False or value in (0, "", [], {})
