"""What answers must look like: `--format json`, `--schema FILE`, `/set format`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localr1.errors import UsageError

if TYPE_CHECKING:
    from localr1.engine.constraint import Grammar
    from localr1.engine.engine import Engine


TEXT, JSON = "text", "json"


@dataclass(frozen=True)
class AnswerSchema:
    """schema: a JSON schema, as `json` reads it. name: what people call it."""

    schema: Any
    name: str


def answer_schema(answer_format: str | None, path: Path | None) -> AnswerSchema | None:
    """None for any text. Raises UsageError, NotFoundError, FormatError."""
    if answer_format not in (None, TEXT, JSON):
        raise UsageError("--format", expected="json or text", found=repr(answer_format)[:40])
    if path is not None and answer_format == TEXT:
        raise UsageError("--schema and --format text", expected="one of them", found="both")
    if path is not None:
        from localr1.structured import read_schema

        return AnswerSchema(read_schema(path), str(path))
    if answer_format != JSON:
        return None
    from localr1.structured import ANY_OBJECT

    return AnswerSchema(dict(ANY_OBJECT), "any object")


def grammar_of(engine: "Engine", wanted: AnswerSchema) -> "Grammar":
    """Raises UsageError for a schema that cannot be followed."""
    from localr1.structured import JsonGrammar

    return JsonGrammar(engine.tokenizer, wanted.schema, wanted.name)
