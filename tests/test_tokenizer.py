"""Text to ids and back: exactly what the library says of ordinary text, and never a control token
from it; hostile files are errors within a second."""

import copy
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from byte_tokenizer import CONTROL, VOCAB_SIZE, byte_tokenizer, tokenizer_document, tokenizer_files
from hypothesis import given, settings
from hypothesis import strategies as st

from localr1.checkpoint.gguf_file import GgufFile
from localr1.errors import FormatError, TokenizerError
from localr1.token_stream import WINDOW
from localr1.tokenizer import MARK, MAX_TEXT, Tokenizer, strip_marks
from localr1.tokenizer_rules import check_pattern

BYTES = byte_tokenizer()
SECONDS_TO_REFUSE = 1.0
SECONDS_FOR_A_LONG_WORD = 20.0
"""Two megabytes take about two seconds on an idle core; a quadratic algorithm would take hours."""

# Pieces that meet control tokens halfway, overlap with them, or imitate the mark.
NASTY = st.lists(
    st.sampled_from(
        [
            *CONTROL,
            "<",
            ">",
            "</",
            "<|",
            "|>",
            "think",
            "<think",
            "user",
            MARK,
            *MARK,
            "a ",
            "é日👩‍👩‍👧",
        ]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


def real_tokenizer(path: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    """Ours, and the library's own of the same file."""
    with GgufFile.open(path, allow_truncated=True) as checkpoint:
        files = checkpoint.tokenizer_files()
    library = tokenizers.Tokenizer.from_str(files.tokenizer_json)
    return Tokenizer.from_files(files, library.get_vocab_size()), library


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return real_tokenizer(smollm2_gguf)


@pytest.fixture(scope="module")
def r1(r1_header_gguf: Path) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    return real_tokenizer(r1_header_gguf)


@settings(max_examples=300, deadline=None)
@given(NASTY)
def test_ordinary_text_comes_back_and_holds_no_control_token(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    ids = BYTES.encode(text)
    assert not set(ids) & set(BYTES.control_ids.values())
    assert BYTES.decode(ids) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(CONTROL), NASTY), max_size=5))
def test_only_what_is_not_protected_becomes_control_tokens(parts: list[tuple[str, str]]) -> None:
    text = "".join(control + BYTES.protect(ordinary) for control, ordinary in parts)
    ids = BYTES.encode(text, allow_special=True)
    control = set(BYTES.control_ids.values())
    assert [i for i in ids if i in control] == [BYTES.control_ids[c] for c, _ in parts]
    assert BYTES.decode(ids) == strip_marks(text) == "".join(c + o for c, o in parts)


def test_what_is_kept_from_protection_stays_a_control_token() -> None:
    text = BYTES.protect("<think>a</think><|user|>", keep=["<think>", "</think>"])
    ids = BYTES.encode(text, allow_special=True)
    assert [i for i in ids if i >= 256] == [BYTES.control_ids[t] for t in ("<think>", "</think>")]


def test_tokens_that_overlap_are_all_broken() -> None:
    document = tokenizer_document()
    document["added_tokens"].append({"id": 280, "content": "abab", "special": True})
    tokenizer = Tokenizer.from_files(tokenizer_files(document), VOCAB_SIZE)
    assert tokenizer.encode("abab", allow_special=True) == [280]
    ids = tokenizer.encode("ababab")
    assert 280 not in ids
    assert tokenizer.decode(ids) == "ababab"


def test_tokens_that_are_plain_text_are_used() -> None:
    assert BYTES.encode("\n\n\n") == [263]
    assert BYTES.special_id("\n\n\n") is None
    assert BYTES.special_id("<think>") == 260


def test_bos_only_where_asked_and_eos_from_every_source() -> None:
    assert BYTES.encode("a", add_bos=True) == [256, *BYTES.encode("a")]
    assert BYTES.encode("<s>a", allow_special=True)[0] == BYTES.bos_id == 256
    assert byte_tokenizer(eos_token_ids=(258, 259)).eos_ids == {257, 258, 259}
    without = byte_tokenizer(bos_token=None, eos_token=None)
    assert without.encode("a", add_bos=True) == BYTES.encode("a")
    assert byte_tokenizer(add_bos=True).adds_bos
    assert not byte_tokenizer(bos_token=None, add_bos=True).adds_bos


@pytest.mark.parametrize("name", ["smollm2", "r1"])
def test_real_vocabularies_agree_with_the_library(
    name: str, request: pytest.FixtureRequest
) -> None:
    ours, library = request.getfixturevalue(name)
    texts = [
        "Hello, world! 12345  two spaces\n\n\tand a tab",
        "naïve 日本語 العربية 👩‍👩‍👧‍👦 ﬁ \ufffd",
        "def f(x):\r\n    return x ** 2  # ok\n" * 20,
    ]
    for text in texts:
        assert ours.encode(text) == library.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text
    random.seed(0)
    for _ in range(100):
        ids = [random.randrange(ours.vocab_size) for _ in range(60)]
        assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["smollm2", "r1"])
def test_what_users_type_never_becomes_a_control_token(
    name: str, request: pytest.FixtureRequest
) -> None:
    ours, library = request.getfixturevalue(name)
    known = {t.content: i for i, t in library.get_added_tokens_decoder().items()}
    assert set(known) <= set(ours.control_ids)
    for text in known:
        typed = f"see {text}{text} here"
        ids = ours.encode(typed)
        assert not set(ids) & set(known.values())
        assert ours.decode(ids) == typed
        assert ours.encode(text, allow_special=True) == [known[text]]


def test_known_ids_of_an_r1_distill(r1: tuple[Tokenizer, tokenizers.Tokenizer]) -> None:
    ours, _ = r1
    assert ours.bos_id == 151646
    assert 151643 in ours.eos_ids
    assert ours.special_id("<｜User｜>") == 151644
    assert ours.special_id("<｜Assistant｜>") == 151645
    assert (ours.special_id("<think>"), ours.special_id("</think>")) == (151648, 151649)
    assert ours.encode("<think>\n", allow_special=True) == [151648, 198]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40) | NASTY)
def test_a_stream_never_shows_half_a_character(text: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        return
    stream = BYTES.stream()
    shown = ""
    for identifier in BYTES.encode(text):
        shown += stream.step(identifier) or ""
        assert text.startswith(shown)
    assert shown + stream.flush() == text


def test_a_stream_shows_each_character_with_its_last_byte() -> None:
    stream = BYTES.stream()
    pieces = [stream.step(identifier) for identifier in BYTES.encode("aé👩b")]
    assert pieces == ["a", None, "é", None, None, None, "👩", "b"]


def test_half_characters_and_wrong_bytes_are_replaced_at_the_end() -> None:
    stream = BYTES.stream()
    ids = BYTES.encode("👩")
    assert [stream.step(i) for i in ids[:3]] == [None] * 3
    assert stream.flush() == "\ufffd"
    # The stream starts anew after that.
    assert "".join(stream.step(i) or "" for i in ids) == "👩"
    assert BYTES.decode([ids[1], *BYTES.encode("a"), ids[2]]) == "\ufffda\ufffd"


def test_a_stream_of_replacement_characters_costs_the_same_at_every_step() -> None:
    lengths: list[int] = []
    stream = BYTES.stream()
    decode = stream._decode

    def measured(ids: list[int]) -> str:
        lengths.append(len(ids))
        return decode(ids)

    stream._decode = measured
    text = "\ufffd" * 400 + "👩"
    shown = "".join(stream.step(identifier) or "" for identifier in BYTES.encode(text))
    assert shown + stream.flush() == text
    assert max(lengths) <= 2 * WINDOW


def test_a_decoder_that_drops_the_first_space_keeps_the_others() -> None:
    document = {
        **tokenizer_document(),
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "added_tokens": [],
        "model": {
            "type": "BPE",
            "vocab": {"▁a": 0, "▁b": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4},
            "merges": [],
            "byte_fallback": True,
        },
    }
    files = tokenizer_files(document, bos_token=None, eos_token=None, eos_token_ids=())
    tokenizer = Tokenizer.from_files(files, 5)
    assert tokenizer.decode([0, 1, 2, 3, 4, 2, 3, 4, 1, 0]) == "a b€€ b a"
    stream = tokenizer.stream()
    pieces = [stream.step(identifier) for identifier in (0, 1, 2, 3, 4, 1)]
    assert pieces == ["a", " b", None, None, "€", " b"]


def test_two_megabytes_without_a_space_are_encoded() -> None:
    begin = time.perf_counter()
    ids = BYTES.encode("a" * 2_000_000)
    assert len(ids) == 2_000_000
    assert time.perf_counter() - begin < SECONDS_FOR_A_LONG_WORD


def test_texts_that_cannot_be_encoded_are_errors() -> None:
    with pytest.raises(TokenizerError, match="at most"):
        BYTES.encode("a" * (MAX_TEXT + 1))
    with pytest.raises(TokenizerError):
        BYTES.encode("half a pair: \ud800")
    for identifier in (-1, VOCAB_SIZE, 2**40):
        with pytest.raises(TokenizerError, match=f"found {identifier}"):
            BYTES.decode([identifier])


def test_a_vocabulary_that_spells_control_tokens_in_ordinary_text_is_refused() -> None:
    document = tokenizer_document()
    # The words are looked up whole, and one of them is a control token's place in the vocabulary.
    document["model"] = {
        "type": "WordLevel",
        "vocab": {"x": 0, "<think>": 260, "[UNK]": 1},
        "unk_token": "[UNK]",
    }
    document["normalizer"] = {"type": "Replace", "pattern": {"String": "x"}, "content": "<think>"}
    document["pre_tokenizer"] = {"type": "WhitespaceSplit"}
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] == "<think>"]
    files = tokenizer_files(document, bos_token=None, eos_token=None, eos_token_ids=())
    tokenizer = Tokenizer.from_files(files, VOCAB_SIZE)
    with pytest.raises(TokenizerError, match="control token"):
        tokenizer.encode("x")


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    document = copy.deepcopy(tokenizer_document())
    change(document)
    return document


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replacement(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def added(**fields: Any) -> Callable[[dict[str, Any]], object]:
    token = {"id": 290, "content": "<new>", "special": True, **fields}
    return lambda d: d["added_tokens"].append(token)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "exponential pattern": lambda d: d.update(pre_tokenizer=split("(a+)+$")),
    "exponential pattern, nested": lambda d: d.update(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split("((a|aa)+b)+")]}
    ),
    "pattern that does not end": lambda d: d.update(pre_tokenizer=split("(a")),
    "pattern in the normalizer": lambda d: d.update(
        normalizer={"type": "Replace", "pattern": {"Regex": "(a*)*b"}, "content": ""}
    ),
    "merge outside the vocabulary": lambda d: d["model"].update(merges=[["xx", "yy"]]),
    "merges of the wrong type": lambda d: d["model"].update(merges=[1, 2]),
    "id of 2^32 - 1": lambda d: d["model"]["vocab"].update(zz=2**32 - 1),
    "id of 2^33": lambda d: d["model"]["vocab"].update(zz=2**33),
    "negative id": lambda d: d["model"]["vocab"].update(zz=-1),
    "id that is true": lambda d: d["model"]["vocab"].update(zz=True),
    "id twice": lambda d: d["model"]["vocab"].update(zz=5),
    "id at the model's vocabulary": lambda d: d["model"]["vocab"].update(zz=VOCAB_SIZE),
    "added id of 2^32 - 1": added(id=2**32 - 1),
    "added id taken": added(id=7),
    "added token twice": added(content="<think>"),
    "added token empty": added(content=""),
    "added token not text": added(content=5),
    "added token with another id": added(content="a", id=290),
    "the reserved mark": added(content=MARK),
    "token of two megabytes": lambda d: d["model"]["vocab"].update({"a" * 2_000_000: 299}),
    "text grown without bound": lambda d: d.update(
        normalizer={"type": "Sequence", "normalizers": [replacement("a", "a" * 1000)] * 4}
    ),
    "long prefix": lambda d: d.update(normalizer={"type": "Prepend", "prepend": "a" * 10**6}),
    "empty search text": lambda d: d.update(normalizer=replacement("", "a")),
    "huge strip": lambda d: d.update(
        decoder={"type": "Strip", "content": "a", "start": 10**12, "stop": 0}
    ),
    "unknown component": lambda d: d.update(normalizer={"type": "Python"}),
    "component that is a list": lambda d: d.update(decoder=[]),
    "unknown model": lambda d: d.update(model={"type": "Script"}),
    "no model": lambda d: d.pop("model"),
    "model that is a list": lambda d: d.update(model=[]),
    "vocabulary that is a list": lambda d: d["model"].update(vocab=[]),
    "a thousand components": lambda d: d.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 1000}
    ),
    "unigram without pairs": lambda d: d.update(model={"type": "Unigram", "vocab": [1]}),
    "unigram, unknown id outside": lambda d: d.update(
        model={"type": "Unigram", "unk_id": 10**9, "vocab": [["a", 0.0]]}, added_tokens=[]
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_an_error_within_a_second(name: str) -> None:
    files = tokenizer_files(changed(HOSTILE[name]), bos_token=None, eos_token=None)
    begin = time.perf_counter()
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Tokenizer.from_files(files, VOCAB_SIZE)
    assert time.perf_counter() - begin < SECONDS_TO_REFUSE


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"model": NaN}',
        '{"a": 1, "a": 2}',
        "[" * 100_000,
        '{"a": "\\ud800"}',
        "\ud800",
    ],
)
def test_what_is_no_json_object_is_an_error(text: str) -> None:
    with pytest.raises((FormatError, TokenizerError), match=r"tokenizer\.json"):
        Tokenizer.from_files(tokenizer_files(tokenizer_json=text), VOCAB_SIZE)


def test_padding_truncation_and_post_processor_are_left_out() -> None:
    template = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    document = tokenizer_document() | {
        "padding": {
            "strategy": {"Fixed": 10**12},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "a",
        },
        "truncation": {
            "max_length": 1,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [template],
            "pair": [template],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}},
        },
    }
    tokenizer = Tokenizer.from_files(tokenizer_files(document), VOCAB_SIZE)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert len(tokenizer.encode("hello")) == 5


@pytest.mark.parametrize(
    "change",
    [
        {"bos_token": "<none>"},
        {"eos_token": "<none>"},
        {"pad_token": "<none>"},
        {"eos_token_ids": (2**32,)},
        {"eos_token_ids": (-1,)},
    ],
)
def test_special_ids_outside_the_vocabulary_are_errors(change: dict[str, Any]) -> None:
    with pytest.raises(TokenizerError, match="expected"):
        byte_tokenizer(**change)


def test_a_panic_of_the_library_is_an_error() -> None:
    document = changed(lambda d: d.update(pre_tokenizer={"type": "FixedLength", "length": 0}))
    tokenizer = Tokenizer.from_files(tokenizer_files(document), VOCAB_SIZE)
    with pytest.raises(TokenizerError, match="cannot be encoded"):
        tokenizer.encode("abc")


def test_ids_with_holes_stay_where_the_file_puts_them() -> None:
    document = tokenizer_document()
    for token in document["added_tokens"]:
        token["id"] += 20
    files = tokenizer_files(document, eos_token_ids=())
    tokenizer = Tokenizer.from_files(files, VOCAB_SIZE)
    assert tokenizer.encode("<think>a", allow_special=True)[0] == 280
    assert tokenizer.decode([280]) == "<think>"
    assert tokenizer.decode([270]) == ""


RELEASED_PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek_v3": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+",
    "possessive": r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}?|\s++$",
    "classes in a class": r"[a-z&&[^aeiou]]+|[]a]|[^]a]|\[(?:x)+",
}


@pytest.mark.parametrize("name", RELEASED_PATTERNS)
def test_patterns_of_released_tokenizers_pass(name: str) -> None:
    check_pattern("pre_tokenizer", RELEASED_PATTERNS[name])


SLOW_PATTERNS = r"""
    (a+)+$ (a|aa)+$ ((a?){30})b (a{1,30}){1,30} (?:a*)* (?:(?:a+)b?)+ a*a*a*a*b (?:a+)++ a**b+*
    (\s|\S)*x (?=a+)* (?:a|b+){2,} (a)\1 (?<n>a)\k<n> \g<0> (?#x) (?x:a) (a a) [a
"""


@pytest.mark.parametrize(
    "pattern",
    SLOW_PATTERNS.split(),
)
def test_patterns_that_can_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(TokenizerError, match="pattern"):
        check_pattern("pre_tokenizer", pattern)


def test_the_document_has_what_the_tests_say() -> None:
    library = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_document()))
    assert library.token_to_id("<think>") == 260
    assert library.encode("<think>").ids == [260]
