"""An engine that says what a test wants, with the interface of localr1.engine.engine.Engine."""

import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from localr1.chat_template import ChatPrompt
from localr1.cli.conversation import Conversation
from localr1.engine.engine import Engine
from localr1.engine.events import (
    Closing,
    Delta,
    Done,
    Event,
    GenerationParams,
    Progress,
    Reason,
    Usage,
)
from localr1.tokenizer import Tokenizer


@dataclass
class FakeTemplate:
    source: str = "a template"
    has_system: bool = True

    def supports_system(self) -> bool:
        return self.has_system


@dataclass
class FakeModel:
    weight_bytes: int = 1 << 20


class FakeTokenizer:
    """A token a character."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@dataclass
class FakeEngine:
    """replies: one list of deltas a generation, the last one for all that follow. prompts, params:
    what was asked. pause: seconds between deltas. error: raised in place of a reply."""

    replies: list[list[Delta]]
    reason: Reason = "stop"
    pause: float = 0.0
    error: Exception | None = None
    template: FakeTemplate = field(default_factory=FakeTemplate)
    defaults: dict[str, int | float] = field(default_factory=dict)
    prompts: list[list[dict[str, str]]] = field(default_factory=list)
    params: list[GenerationParams] = field(default_factory=list)
    model: FakeModel = field(default_factory=FakeModel)
    tokenizer: FakeTokenizer | Tokenizer = field(default_factory=FakeTokenizer)
    name: str = "fake"
    kernels: str = "none"
    threads: int = 1
    context: int = 64
    closed: bool = False
    experts: None = None
    path: None = None
    can_think: bool = True
    options: list[dict[str, Any]] = field(default_factory=list)

    def prompt(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> ChatPrompt:
        self.prompts.append([dict(message) for message in messages])
        self.options.append(options)
        return ChatPrompt(ids=[1, 2, 3], text="", starts_in_thinking=False)

    def read_ahead(self, ids: Sequence[int], cancel: threading.Event) -> int:
        return 0

    def close(self) -> None:
        self.closed = True

    def generate(
        self,
        ids: Sequence[int],
        params: GenerationParams,
        cancel: threading.Event | None = None,
        answer_now: threading.Event | None = None,
    ) -> Generator[Event]:
        cancel = cancel or threading.Event()
        answer_now = answer_now or threading.Event()
        self.params.append(params)
        if self.error is not None:
            raise self.error
        yield Progress(len(ids), len(ids))
        deltas = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        reason = self.reason
        closed: Closing | None = None
        count = thinking = 0
        for delta in deltas:
            if cancel.wait(self.pause) if self.pause else cancel.is_set():
                reason = "cancelled"
                break
            if answer_now.is_set() and delta.channel == "thinking":
                closed = "asked"
                continue
            count += 1
            thinking += delta.channel == "thinking"
            yield replace(delta, tokens=count, thinking_tokens=thinking)
        yield Done(reason, Usage(len(ids), 0, count, thinking, 0.25, 2.0), closed)


def answer(*pieces: str) -> list[Delta]:
    return [Delta("answer", piece) for piece in pieces]


def thinking(*pieces: str) -> list[Delta]:
    return [Delta("thinking", piece) for piece in pieces]


def conversation(engine: FakeEngine, **options: Any) -> Conversation:
    return Conversation(cast(Engine, engine), **options)


def endless_answer() -> list[Delta]:
    return answer(*(f"word{number} " for number in range(10_000)))


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Fails when the condition does not become true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
