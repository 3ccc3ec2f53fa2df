"""The messages of one conversation and how the next reply is made. Prints nothing."""

import threading
from collections.abc import Generator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from localr1.chat_template import R1_ASSISTANT, ChatPrompt
from localr1.cli.output import format_bytes
from localr1.engine.engine import Engine
from localr1.engine.events import Delta, Event, GenerationParams
from localr1.sampler import SamplingParams


@dataclass
class Conversation:
    """engine: answers. parameters: what the user set, by the names of cli.parameters; the model's
    own defaults speak where he did not. system: the prompt or None. turns: the messages so far,
    without thinking. thinking, think_budget: as prepare_chat and GenerationParams have them."""

    engine: Engine
    parameters: dict[str, int | float] = field(default_factory=dict)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    thinking: bool | None = None
    think_budget: int | None = None

    def generation(self, **changes: int | float) -> GenerationParams:
        """What the next reply is asked for, `changes` on top. Raises UsageError for a parameter
        outside its range."""
        sampling: dict[str, Any] = {**self.engine.defaults, **self.parameters, **changes}
        max_tokens = sampling.pop("max_tokens", None)
        return GenerationParams(
            SamplingParams(**sampling), max_tokens, think_budget=self.think_budget
        )

    def set_parameter(self, name: str, value: int | float) -> None:
        """Raises UsageError, and changes nothing, for a value outside its range."""
        self.generation(**{name: value})
        self.parameters[name] = value

    def set_thinking(self, thinking: bool, budget: int | None = None) -> None:
        """Whether the model thinks from the next message on, and for how many tokens at most."""
        self.thinking, self.think_budget = thinking, budget

    def clear(self) -> None:
        self.turns.clear()

    @cached_property
    def folds_system(self) -> bool:
        """Whether a system prompt goes into the first user message: R1 was trained without one, as
        its makers say, and some templates drop or refuse it."""
        template = self.engine.template
        return R1_ASSISTANT in template.source or not template.supports_system()

    def prompt(self, text: str) -> ChatPrompt:
        """The conversation with `text` as the next user message, as the model reads it."""
        messages = [dict(turn) for turn in self.turns] + [{"role": "user", "content": text}]
        if self.system is not None:
            if self.folds_system:
                messages[0]["content"] = f"{self.system}\n\n{messages[0]['content']}"
            else:
                messages.insert(0, {"role": "system", "content": self.system})
        return self.engine.prompt(messages, thinking=self.thinking)

    def coming_prompt(self) -> list[int]:
        """The ids that the next prompt begins with, whatever its message says; [] before the first
        turn. Found by asking the template twice: some write the last answer in another way as long
        as nothing follows it."""
        if not self.turns:
            return []
        first, second = (self.prompt(probe).ids for probe in ("a", "b"))
        pairs = zip(first, second, strict=False)
        return first[: next((i for i, (one, other) in enumerate(pairs) if one != other), 0)]

    def describe(self) -> dict[str, str]:
        """The state of the conversation, for people."""
        engine = self.engine
        sampling = self.generation().sampling
        max_tokens = self.parameters.get("max_tokens", "until the context is full")
        return {
            "model": engine.name,
            "kernels": f"{engine.kernels}, {engine.threads} threads",
            "weights": format_bytes(engine.model.weight_bytes),
            "context": f"{engine.context:,} tokens",
            "turns": str(len(self.turns) // 2),
            "system": self.system or "none",
            "thinking": self._describe_thinking(),
            **{name: f"{value}" for name, value in asdict(sampling).items() if value is not None},
            "max_tokens": f"{max_tokens}",
        }

    def _describe_thinking(self) -> str:
        if not self.engine.can_think:
            return "none: the model's template has none"
        if self.thinking is False:
            return "off"
        budget = self.think_budget
        return "on" if budget is None else f"on, at most {budget:,} tokens"

    def reply(
        self, text: str, cancel: threading.Event, answer_now: threading.Event | None = None
    ) -> Generator[Event]:
        """The events of the answer to `text`; cancel, answer_now: as Engine.generate has them. The
        turn joins the conversation as soon as the reply has begun, also when it was stopped. Raises
        ContextError when the conversation no longer fits; it is then as it was."""
        prompt = self.prompt(text)
        params = replace(self.generation(), starts_in_thinking=prompt.starts_in_thinking)
        answer = ""
        begun = False
        try:
            for event in self.engine.generate(prompt.ids, params, cancel, answer_now):
                if isinstance(event, Delta):
                    begun = True
                    answer += event.text if event.channel == "answer" else ""
                yield event
        finally:
            if begun:
                self.turns.append({"role": "user", "content": text})
                self.turns.append({"role": "assistant", "content": answer})
