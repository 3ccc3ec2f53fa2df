"""The messages of one conversation and how the next reply is made. Prints nothing."""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from localr1.chat_template import encode_chat
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Event, GenerationParams
from localr1.sampler import SamplingParams

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@dataclass
class Conversation:
    """engine: answers. defaults: the model's own sampling parameters (generation_config).
    parameters: what the user set, by the names of cli.parameters. system: the prompt or None."""

    engine: Engine
    defaults: Mapping[str, int | float] = field(default_factory=dict)
    parameters: dict[str, int | float] = field(default_factory=dict)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def generation(self) -> GenerationParams:
        """Raises UsageError for a parameter outside its range."""
        values: dict[str, Any] = {**self.defaults, **self.parameters}
        return GenerationParams(
            sampling=SamplingParams(**{name: values[name] for name in SAMPLING if name in values}),
            max_tokens=values.get("max_tokens"),
        )

    def set_parameter(self, name: str, value: int | float) -> None:
        """Raises UsageError, and changes nothing, for a value outside its range."""
        before = self.parameters
        self.parameters = {**before, name: value}
        try:
            _ = self.generation
        except BaseException:
            self.parameters = before
            raise

    def clear(self) -> None:
        self.turns.clear()

    def prompt_ids(self, text: str) -> list[int]:
        """The conversation with `text` as the next user message, as the model reads it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *self.turns, {"role": "user", "content": text}]
        return encode_chat(self.engine.template, self.engine.tokenizer, messages)

    def reply(self, text: str, cancel: threading.Event) -> Iterator[Event]:
        """The events of the answer to `text`. The turn joins the conversation, also when it was
        stopped, as soon as the reply has begun; thinking stays out of it. Raises ContextError when
        the conversation no longer fits; it is then as it was."""
        answer = ""
        begun = False
        try:
            for event in self.engine.generate(self.prompt_ids(text), self.generation, cancel):
                if isinstance(event, Delta):
                    begun = True
                    answer += event.text if event.channel == "answer" else ""
                yield event
        finally:
            if begun:
                self.turns.append({"role": "user", "content": text})
                self.turns.append({"role": "assistant", "content": answer})
