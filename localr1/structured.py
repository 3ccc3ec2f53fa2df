"""Answers that are JSON, or fit a JSON schema: grammars over tokens, by llguidance."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import llguidance
import numpy as np
from numpy.typing import NDArray

from localr1.checkpoint.files import read_bounded
from localr1.checkpoint.strict_json import kind_of, parse_json
from localr1.errors import UnsupportedError, UsageError
from localr1.tokenizer import Tokenizer

MAX_SCHEMA_BYTES: Final = 1 << 20
ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}
"""What --format json asks for: an object, as OpenAI's JSON mode gives."""
WHITE_SPACE: Final = r"[ \n\t]{0,40}"
"""Between two parts of an answer: a model must not fill the context with spaces."""
FIX: Final = "Correct the schema, or leave out what is not supported."


def read_schema(path: Path) -> Any:
    """The JSON in a file. Raises NotFoundError and FormatError."""
    return parse_json(read_bounded(path, str(path), MAX_SCHEMA_BYTES), str(path))


class JsonGrammar:
    """Answers that fit `schema` (JSON Schema). name: what the user calls it.

    Raises UsageError, before any answer, for a schema that is none, that nothing fits, or that uses
    what llguidance does not enforce: nothing in it is silently ignored but keywords that JSON
    Schema does not know.
    """

    def __init__(self, tokenizer: Tokenizer, schema: Any, name: str = "schema") -> None:
        self._tokenizer = tokenizer
        eos = sorted(tokenizer.eos_ids)
        if not eos:
            raise UnsupportedError(
                "structured answers", expected="a model with a token that ends a turn", found="none"
            )
        # A token that is no text by itself must not stand for its name inside a string.
        self._never = np.array(sorted({*tokenizer.control_ids.values()} - {*eos}), np.int64)
        try:
            self._vocabulary = llguidance.LLTokenizer(
                tokenizer.to_json(), n_vocab=tokenizer.num_ids, eos_token=eos
            )
        except ValueError as error:
            raise UnsupportedError(
                "structured answers",
                expected="a tokenizer that llguidance can read",
                found=f"{error}"[:200],
            ) from error
        if not isinstance(schema, dict):
            raise UsageError(name, expected="a JSON schema, an object", found=kind_of(schema))
        self._grammar = llguidance.LLMatcher.grammar_from_json_schema(
            json.dumps(schema), overrides={"whitespace_pattern": WHITE_SPACE}
        )
        failed, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            self._grammar, self._vocabulary
        )
        if failed:
            found = " ".join(" ".join(messages).split())[:300]
            raise UsageError(
                name, expected="a JSON schema that can be followed", found=found, fix=FIX
            )

    def start(self) -> "JsonConstraint":
        matcher = llguidance.LLMatcher(self._vocabulary, self._grammar, log_level=0)
        return JsonConstraint(matcher, self._tokenizer, self._never)


class JsonConstraint:
    """`localr1.engine.constraint.Constraint` of one answer."""

    def __init__(
        self, matcher: llguidance.LLMatcher, tokenizer: Tokenizer, never: NDArray[np.int64]
    ) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer
        self._never = never

    def allowed(self) -> NDArray[np.bool_]:
        """[vocab]. Raises UnsupportedError where the grammar is too complex to go on."""
        bias = np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)
        allowed: NDArray[np.bool_] = bias[: self._tokenizer.vocab_size] != 0
        allowed[self._never] = False
        self._check()
        if not allowed.any():
            raise UnsupportedError(
                "schema",
                expected="something that can follow",
                found="nothing in this model's vocabulary",
                fix=FIX,
            )
        return allowed

    def accept(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    def accept_text(self, text: str) -> None:
        self._matcher.consume_tokens(self._tokenizer.encode(text))
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UnsupportedError(
                "structured answer", found=self._matcher.get_error()[:300], fix=FIX
            )
