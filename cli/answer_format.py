"""What answers must look like: `--format json`, `--schema FILE`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.engine.constraint import Grammar
    from localr1.engine.engine import Engine


@dataclass(frozen=True)
class AnswerSchema:
    """name: what it is called in errors."""

    schema: Any
    name: str


def answer_schema(answer_format: str | None, path: Path | None) -> AnswerSchema | None:
    """None for any text. Raises UsageError, NotFoundError, FormatError."""
    if answer_format not in (None, "json"):
        raise UsageError("--format", expected="json", found=repr(answer_format)[:40])
    if path is not None:
        from localr1.structured import read_schema

        return AnswerSchema(read_schema(path), str(path))
    if answer_format is None:
        return None
    from localr1.structured import ANY_OBJECT

    return AnswerSchema(dict(ANY_OBJECT), "an object")


def grammar_of(engine: "Engine", wanted: AnswerSchema) -> "Grammar":
    """Raises UsageError for a schema that cannot be followed."""
    from localr1.structured import JsonGrammar

    return JsonGrammar(engine.tokenizer, wanted.schema, wanted.name)
