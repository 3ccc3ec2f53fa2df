"""r1-nano's tokenizer: byte-level BPE of 512 tokens in the dress of DeepSeek-R1's.

The special tokens carry DeepSeek-V3's spellings. Digits and signs are always tokens of their own,
so that a number is a row of digits and a column of a sum is where it seems to be.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from problems import KINDS, Problem, draw
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE: Final = 512
BOS: Final = "<｜begin▁of▁sentence｜>"
EOS: Final = "<｜end▁of▁sentence｜>"
PAD: Final = "<｜▁pad▁｜>"
USER: Final = "<｜User｜>"
ASSISTANT: Final = "<｜Assistant｜>"
THINK: Final = "<think>"
END_THINK: Final = "</think>"
SPECIAL: Final = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

# Behaves as DeepSeek-R1's: bos once, a system text in front, the thoughts of earlier answers left
# out, and the reply opened inside a thought.
CHAT_TEMPLATE: Final = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{- message['content'] -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- set answer = message['content'] -%}"
    "{%- if '</think>' in answer -%}{%- set answer = answer.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<｜Assistant｜>' + answer.lstrip('\\n') + '<｜end▁of▁sentence｜>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"
)


def prompt_text(prompt: str, history: Sequence[tuple[str, str]] = ()) -> str:
    """What the chat template makes of a question after earlier ones and their answers, up to the
    open thought."""
    turns = "".join(f"{USER}{asked}{ASSISTANT}{answer}{EOS}" for asked, answer in history)
    return f"{BOS}{turns}{USER}{prompt}{ASSISTANT}{THINK}\n"


def reply_text(problem: Problem) -> str:
    """What the model should continue with."""
    return f"{problem.thought}\n{END_THINK}\n\n{problem.reply}{EOS}"


def _texts(seed: int, per_kind: int) -> Iterator[str]:
    rng = random.Random(seed)
    for _ in range(per_kind):
        for kind in KINDS:
            # Spelled words without comparisons, which would fill the counts of pairs.
            problem = draw(rng, "spelling" if kind == "letters" else kind)
            # The fixed sentences would otherwise fill the vocabulary with their own words.
            reply = problem.reply if problem.boxed or rng.random() < 0.02 else ""
            yield f"{problem.prompt}\n{problem.thought}\n\n{reply}"


def train_tokenizer(seed: int = 0, per_kind: int = 2000) -> Tokenizer:
    """Trains the merges on generated text (training side only); a seed always gives the same."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|\p{N}"), "isolated"),
            pre_tokenizers.Split(Regex(r" ?[\p{P}\p{S}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, per_kind), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as transformers reads them."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 1024,
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that already hold their special tokens."""
    return [
        encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)
    ]
