"""A conversation as it is kept: the messages and the settings, in JSON."""

import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from localr1.checkpoint.strict_json import expect, optional, parse_json, parse_object, required
from localr1.errors import FormatError, UsageError

FORMAT: Final = "localr1-conversation-1"
MAX_BYTES: Final = 64 << 20
MAX_NAME: Final = 60
TITLE_LENGTH: Final = 60
_ID: Final = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9a-f]{4}")
ROLES: Final = ("user", "assistant")


def new_id() -> str:
    """Sorts by when it was made."""
    return time.strftime("%Y%m%d-%H%M%S-", time.localtime()) + secrets.token_hex(2)


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def checked_name(name: str) -> str:
    """Raises UsageError for what is no name of a session."""
    name = " ".join(name.split())
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise UsageError(
            "a session's name", expected=f"1 to {MAX_NAME} characters", found=repr(name)[:80]
        )
    if name == "last" or is_id(name):
        raise UsageError("a session's name", expected="no other session's ID", found=repr(name))
    return name


@dataclass
class SessionDocument:
    """model: what it was held with, a path. turns: {"role", "content"}, user and assistant in
    turn, without thinking. name: given by the user, or None. begun, changed: seconds since 1970.
    parameters, system, thinking, think_budget, drops_oldest: as the chat's Conversation has them.
    schema: the JSON schema that answers must fit, itself, as its file may change; None for any
    text; schema_name: what people call it. context, kv_bits: as --context and --kv-bits had them,
    None for what comes by itself."""

    id: str
    model: str
    turns: list[dict[str, str]]
    name: str | None = None
    begun: float = field(default_factory=time.time)
    changed: float = field(default_factory=time.time)
    parameters: dict[str, int | float] = field(default_factory=dict)
    system: str | None = None
    thinking: bool | None = None
    think_budget: int | None = None
    drops_oldest: bool = False
    schema: Any = None
    schema_name: str | None = None
    context: int | None = None
    kv_bits: int | None = None

    @property
    def title(self) -> str:
        """Its name, or how its first message begins."""
        first = " ".join(self.turns[0]["content"].split()) if self.turns else ""
        cut = first if len(first) <= TITLE_LENGTH else first[: TITLE_LENGTH - 1] + "…"
        return self.name or cut

    def to_bytes(self) -> bytes:
        document = {
            "format": FORMAT,
            "id": self.id,
            "name": self.name,
            "model": self.model,
            "begun": self.begun,
            "changed": self.changed,
            "system": None if self.system is None else _sound(self.system),
            "thinking": self.thinking,
            "think_budget": self.think_budget,
            "drops_oldest": self.drops_oldest,
            # As text, so that it may be as deep as its own file.
            "schema": None if self.schema is None else json.dumps(self.schema),
            "schema_name": None if self.schema_name is None else _sound(self.schema_name),
            "context": self.context,
            "kv_bits": self.kv_bits,
            "parameters": self.parameters,
            "turns": [{key: _sound(text) for key, text in turn.items()} for turn in self.turns],
        }
        return json.dumps(document, indent=1).encode("ascii")

    @staticmethod
    def from_bytes(data: bytes, path: Path) -> "SessionDocument":
        """Raises FormatError."""
        shown = str(path)
        values = parse_object(data, shown, max_bytes=MAX_BYTES)
        if (found := values.get("format")) != FORMAT:
            raise FormatError(f"{shown}: format", expected=FORMAT, found=repr(found)[:60])
        parameters = required(values, "parameters", dict, shown)
        schema = optional(values, "schema", str, shown)
        return SessionDocument(
            id=required(values, "id", str, shown),
            model=required(values, "model", str, shown),
            turns=_turns(required(values, "turns", list, shown), shown),
            name=optional(values, "name", str, shown),
            begun=_number(values, "begun", shown),
            changed=_number(values, "changed", shown),
            parameters={key: _number(parameters, key, shown) for key in parameters},
            system=optional(values, "system", str, shown),
            thinking=optional(values, "thinking", bool, shown),
            think_budget=optional(values, "think_budget", int, shown),
            drops_oldest=optional(values, "drops_oldest", bool, shown) or False,
            schema=None if schema is None else parse_json(schema.encode(), f"{shown}: schema"),
            schema_name=optional(values, "schema_name", str, shown),
            context=optional(values, "context", int, shown),
            kv_bits=optional(values, "kv_bits", int, shown),
        )


def _sound(text: str) -> str:
    """Without lone surrogates, which a terminal may send and no JSON reader should take."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _turns(values: list[Any], shown: str) -> list[dict[str, str]]:
    turns = []
    for place, value in enumerate(values):
        fields = expect(value, dict, f"{shown}: turn {place + 1}")
        role = required(fields, "role", str, f"{shown}: turn {place + 1}")
        if role != ROLES[place % 2]:
            raise FormatError(
                f"{shown}: turn {place + 1}: role", expected=ROLES[place % 2], found=repr(role)[:40]
            )
        content = required(fields, "content", str, f"{shown}: turn {place + 1}")
        turns.append({"role": role, "content": content})
    if len(turns) % 2:
        raise FormatError(f"{shown}: turns", expected="an answer to each message", found="one less")
    return turns


def _number(values: Mapping[str, Any], key: str, shown: str) -> int | float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise FormatError(f"{shown}: {key}", expected="a number", found=repr(value)[:40])
    return value
